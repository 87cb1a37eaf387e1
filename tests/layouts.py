"""Tiny models under a layout: loaded from a checkpoint as `LLM` loads them, and run."""

from pathlib import Path

import jax
import numpy as np

from jaxllm.loading import Plan, Wishes, load_params, plan_load
from jaxllm.modeling.forward import full_forward
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.choice import sharders
from jaxllm.sharding.layouts import LAYOUTS

SIZES = {
    "data": {"data": 8},
    "data_tensor": {"tensor": 4, "data": 2},
    "replicated": {"tensor": 2},
}
"""By preset: how the eight devices are used, where not for one model."""

EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
"""Changes of a tiny config: a query head a device, and fewer KV heads than devices."""


def sharder_of(name: str) -> Sharder:
    """The last engine's of a preset over eight devices."""
    return sharders(name, **SIZES.get(name, {"tensor": 8}))[-1]


assert set(SIZES) < set(LAYOUTS)


def load(folder: Path, sharder: Sharder) -> tuple[Plan, tuple[jax.Array, ...]]:
    """A checkpoint on the sharder's devices."""
    wishes = Wishes(max_model_len=64, max_num_seqs=4, cache_bytes=1 << 20)
    plan = plan_load(folder, wishes, sharder, "auto")
    return plan, load_params(plan, seed=0, show_progress=False)


def logits(plan: Plan, params, sharder: Sharder, tokens: np.ndarray) -> np.ndarray:
    """Of a forward without a cache, float32 [T, V], padding included."""
    run = jax.jit(lambda p, t: full_forward(plan.model.merge(p), t, sharder))
    return np.asarray(run(params, tokens))
