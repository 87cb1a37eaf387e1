"""Every family split over two devices: the same logits, and a sum for each branch."""

import jax
import numpy as np
import pytest

from jaxllm.modeling import registry
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.forward import full_forward
from jaxllm.modeling.registry import ARCHITECTURES
from jaxllm.program_report import report
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh
from tests.tiny import Naive, tiny_model

FAMILIES = sorted(set(ARCHITECTURES.values()))
CASES = {
    **{name: (name, {}) for name in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "gpt_neox parallel": ("gpt_neox", {"use_parallel_residual": True}),
}
SUMS = {"gpt_neox parallel": 1}
"""All-reduces a layer where they are not 2: branches side by side are added on each device."""

TOKENS = np.random.default_rng(0).integers(0, 100, 64).astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_two_devices_give_the_logits_of_one_with_a_sum_for_each_branch(case):
    family, changes = CASES[case]
    config, model, params = tiny_model(family, **{"vocab_size": 104, **changes})
    layout = preset("tensor", tensor=2)
    on_two = Sharder(layout, make_mesh(layout))
    split = abstract_model(config, registry.family(family).build, "float32", on_two)
    placed = [
        jax.device_put(param, leaf.shape.sharding)
        for param, leaf in zip(params, split.leaves, strict=True)
    ]

    run = jax.jit(lambda p, t: full_forward(split.merge(p), t, on_two)).lower(placed, TOKENS)
    compiled = run.compile()

    want = Naive(model, params, length=64).logits(TOKENS.tolist())
    np.testing.assert_allclose(compiled(placed, TOKENS), want, atol=2e-4)
    inside = [c for c in report(compiled).collectives if "_run_layer" in c.source]
    assert [c.opcode for c in inside] == ["all-reduce"] * SUMS.get(case, 2) * config.num_layers
