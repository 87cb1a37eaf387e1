"""Every family in the engine equals its cacheless forward: small pages, chunks, preemption.

Prompts are longer than the windows, and windows are no multiple of a page or a chunk.
"""

import dataclasses
import functools

import numpy as np
import pytest

from jaxllm.modeling.registry import ARCHITECTURES
from tests.test_engine import Maker, request, run
from tests.tiny import Naive, random_prompts, tiny_model

FAMILIES = sorted(set(ARCHITECTURES.values()))
NUM_NEW = 12
SLIDING, FULL = "sliding_attention", "full_attention"

WINDOWS = {
    "mistral": {"sliding_window": 10},
    "gemma2": {"sliding_window": 7},
    "qwen2": {"sliding_window": 10, "use_sliding_window": True, "layer_types": [FULL, SLIDING]},
    "qwen3": {"sliding_window": 5, "use_sliding_window": True, "layer_types": [SLIDING, FULL]},
}
"""By family that has any."""

OTHERS = {
    "gpt2 by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "gpt_neox parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "llama longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0, 1.0, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 4.0, 9.0],
            }
        },
    ),
}

CASES = {**{name: (name, WINDOWS.get(name, {})) for name in FAMILIES}, **OTHERS}


@functools.cache
def made(case):
    """Engines and oracle of a case, its prompts and what must come of them."""
    family, changes = CASES[case]
    config, model, params = tiny_model(family, **changes)
    naive = Naive(model, params, length=64)
    prompts = {str(i): p for i, p in enumerate(random_prompts(5, 40, seed=2, shortest=12))}
    wanted = {name: naive.generate(prompt, NUM_NEW) for name, prompt in prompts.items()}
    return config, Maker(model, params), prompts, wanted


def asked(prompts):
    return [(0, request(name, prompt, NUM_NEW)) for name, prompt in prompts.items()]


@pytest.mark.parametrize("case", CASES)
def test_chunks_across_page_and_window_edges(case):
    _, make, prompts, wanted = made(case)

    assert run(make(budget=9), asked(prompts)) == wanted


@pytest.mark.parametrize("case", CASES)
def test_random_arrivals_and_preemption(case):
    _, make, prompts, wanted = made(case)
    engine = make(num_pages=1 + 20, budget=27)
    steps = np.random.default_rng(0).integers(0, 5, len(prompts))

    done = run(engine, [(step, r) for step, (_, r) in zip(steps, asked(prompts), strict=True)])

    assert done == wanted
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_are_shorter_than_the_prompts_and_matter(family):
    config, _, prompts, wanted = made(family)
    assert config.windows is not None
    narrow = [window for window in config.windows if window is not None]
    assert 0 < max(narrow) < min(map(len, prompts.values()))

    _, model, params = tiny_model(family, **{**WINDOWS[family], "sliding_window": 1000})
    wide = Naive(model, params, length=64)

    assert {name: wide.generate(prompt, NUM_NEW) for name, prompt in prompts.items()} != wanted


def test_layers_differ_only_where_the_config_says():
    config, *_ = made("gpt2 by layer")
    assert config.attn_scales == (8**-0.5, 8**-0.5 / 2)

    plain, *_ = made("gpt2")
    assert dataclasses.replace(plain, attn_scales=config.attn_scales) == config
