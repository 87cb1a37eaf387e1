"""Every layout gives every family the logits and the tokens of one device.

All pairs are marked `cross` and have a step of their own in CI; everybody else runs a
diagonal, in which each family and each layout comes.
"""

import dataclasses
import functools
from itertools import cycle

import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine import Engine
from jaxllm.modeling.registry import ARCHITECTURES
from jaxllm.programs import ProgramBuilder
from jaxllm.runner import ModelRunner
from jaxllm.scheduler import Scheduler
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.choice import sharders
from jaxllm.sharding.layouts import LAYOUTS
from tests.layouts import EIGHT_HEADS, load, logits, sharder_of
from tests.test_engine import full_of_nan, request, run
from tests.tiny import VOCAB_SIZE, random_prompts

FAMILIES = sorted(set(ARCHITECTURES.values()))
PRESETS = sorted(LAYOUTS)
DIAGONAL = list(zip(FAMILIES, cycle(PRESETS)))
REST = [(f, p) for f in FAMILIES for p in PRESETS if (f, p) not in DIAGONAL]
CROSS = [pytest.mark.cross, pytest.mark.slow]
PAIRS = pytest.mark.parametrize(
    ("family", "preset"), [*DIAGONAL, *(pytest.param(*pair, marks=CROSS) for pair in REST)]
)

CONFIG = EngineConfig(
    # One decode program and two mixed ones: most of the time goes into compiling.
    max_model_len=32,
    page_size=4,
    max_num_seqs=4,
    min_rows=4,
    max_num_batched_tokens=16,
    block_q=8,
)
MOST_PAGES = 64
NUM_NEW = 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 32).astype(np.int32)
PROMPTS = random_prompts(5, 22, seed=3, shortest=14)


def engine_of(plan, params, sharder: Sharder) -> Engine:
    """Few pages, small chunks, a cache that starts poisoned."""
    builder = ProgramBuilder(plan.model, CONFIG, sharder, MOST_PAGES)
    engine = Engine(ModelRunner(builder, params, full_of_nan))
    engine.scheduler = Scheduler(dataclasses.replace(CONFIG, max_num_batched_tokens=9), 1 + 11)
    return engine


def generated(engine: Engine) -> dict[str, list[int]]:
    """Tokens of all prompts, which come one step apart, then of the first, twice again."""
    done = run(engine, [(i, request(str(i), p, NUM_NEW)) for i, p in enumerate(PROMPTS)])
    for name in ("again", "cached"):
        done |= run(engine, [(0, request(name, PROMPTS[0], NUM_NEW))])
    return done


@functools.cache
def on_one_device(folder):
    (sharder,) = sharders()
    plan, params = load(folder, sharder)
    found = logits(plan, params, sharder, TOKENS)
    return found, generated(engine_of(plan, params, sharder))


@PAIRS
def test_a_layout_gives_the_logits_and_the_tokens_of_one_device(checkpoints, family, preset):
    folder, sharder = checkpoints(family, **EIGHT_HEADS), sharder_of(preset)
    want_logits, want_tokens = on_one_device(folder)
    plan, params = load(folder, sharder)

    found = logits(plan, params, sharder, TOKENS)
    engine = engine_of(plan, params, sharder)
    tokens = generated(engine)

    assert np.abs(found[:, :VOCAB_SIZE] - want_logits).max() <= 1e-5 * np.abs(want_logits).max()
    assert (found[:, VOCAB_SIZE:] == -np.inf).all()
    assert tokens == want_tokens
    assert tokens["0"] == tokens["again"] == tokens["cached"]
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.prefixes.num_hit > 0


def test_the_diagonal_has_every_family_and_every_layout():
    assert {family for family, _ in DIAGONAL} == set(FAMILIES)
    assert {preset for _, preset in DIAGONAL} == set(PRESETS)
