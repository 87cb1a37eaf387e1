"""The sampler's noise, its order of operations, what it returns, and what it leaves out."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from jaxllm.config import LOGPROBS_MODES
from jaxllm.flags import SamplingFlags
from jaxllm.inputs import SamplingInputs
from jaxllm.sampler import (
    choose,
    greatest,
    gumbel_noise,
    logprobs_of,
    process,
    score_tokens,
    threefry2x32,
)
from jaxllm.sampling_params import SamplingParams
from tests import oracle
from tests.oracle import Row

cipher = jax.jit(threefry2x32)
noise = jax.jit(gumbel_noise, static_argnums=2)
processed = jax.jit(process, static_argnames="flags")
chosen = jax.jit(choose, static_argnames=("flags", "logprobs_mode"))
logprobs = jax.jit(logprobs_of, static_argnums=2, static_argnames="normalize")

PI_SQUARED = np.pi**2
INF = np.inf


def words(*values):
    return tuple(jnp.asarray(value, jnp.uint32) for value in values)


def seed_words(seeds):
    """uint32 [B, 2], as `batch` sends them."""
    seeds = np.asarray(seeds, np.uint64)
    return np.stack([seeds & 0xFFFFFFFF, seeds >> 32], axis=1).astype(np.uint32)


def positions(count, value=5):
    return np.full(count, value, np.int32)


def draw(logits, temperature, seeds, at, *, sampled=True):
    """int32 [B], the tokens of rows that ask for a temperature alone."""
    inputs = oracle.step_inputs(SamplingInputs(temperature, seeds), at)
    flags = SamplingFlags(sampled=sampled)
    return chosen(logits, inputs, None, flags=flags, logprobs_mode="raw_logprobs").tokens[:, 0]


# -------------------------------------------------------------------- random bits


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(key, counter, expected):
    out = cipher(words(*key), words(*counter))

    assert tuple(int(word) for word in out) == expected


def test_threefry_is_the_one_of_jax():
    rng = np.random.default_rng(0)
    key = rng.integers(0, 2**32, 2, np.uint32)
    counter = rng.integers(0, 2**32, 200, np.uint32)

    ours = cipher(words(*key), words(counter[:100], counter[100:]))

    np.testing.assert_array_equal(np.concatenate(ours), threefry_2x32(jnp.asarray(key), counter))


# -------------------------------------------------------------------- noise


@jax.jit
def noise_of_sizes(seeds, at):
    """{V: [noise of V tokens, of V + 13]}"""
    sizes = (1, 33, 50)
    return {v: [gumbel_noise(seeds, at, v + more) for more in (0, 13)] for v in sizes}


def test_the_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary():
    seeds, at = seed_words([1, 2]), positions(2)

    for vocab_size, (exact, larger) in noise_of_sizes(seeds, at).items():
        np.testing.assert_array_equal(exact, np.asarray(larger)[:, :vocab_size])
        np.testing.assert_array_equal(exact, np.asarray(noise(seeds, at, 64))[:, :vocab_size])


def test_the_noise_of_a_row_does_not_depend_on_the_batch():
    seeds = seed_words(range(10, 17))
    at = np.arange(7, dtype=np.int32) ** 2
    batch = np.asarray(noise(seeds, at, 32))
    order = [4, 2, 0, 6]

    shuffled = noise(seeds[order], at[order], 32)

    np.testing.assert_array_equal(shuffled, batch[order])
    for i in range(7):
        np.testing.assert_array_equal(noise(seeds[[i]], at[[i]], 32), batch[[i]])


def test_equal_seeds_and_positions_give_equal_noise():
    rows = np.asarray(noise(seed_words([3, 3]), positions(2), 32))

    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("seeds", "at"),
    [([1, 2], [5, 5]), ([1, 1 + 2**32], [5, 5]), ([1, 1], [5, 6]), ([0, 1], [1, 0])],
    ids=["low word", "high word", "position", "seed and position swapped"],
)
def test_another_seed_or_position_gives_other_noise(seeds, at):
    rows = np.asarray(noise(seed_words(seeds), np.asarray(at, np.int32), 64))

    assert not np.any(rows[0] == rows[1])


@pytest.fixture(scope="module")
def much_noise():
    """Noise of neighbors in everything: seeds, positions and tokens; [seed, position, token]."""
    seeds, at = np.divmod(np.arange(64 * 32), 32)
    rows = noise(seed_words(seeds), at.astype(np.int32), 128)
    return np.asarray(rows, np.float64).reshape(64, 32, 128)


def test_noise_has_the_moments_of_a_gumbel_distribution(much_noise):
    error = 5 / np.sqrt(much_noise.size)  # five standard deviations, of order 1 each

    assert abs(much_noise.mean() - np.euler_gamma) < error * np.sqrt(PI_SQUARED / 6)
    assert abs(much_noise.var() - PI_SQUARED / 6) < error * np.sqrt(4.4) * PI_SQUARED / 6


def test_noise_is_finite_and_its_tail_reaches_far(much_noise):
    # Of n draws the largest is near log(n), 12.5 here; a coarse uniform would cut it off.
    assert np.isfinite(much_noise).all()
    assert 10 < much_noise.max() < 24
    assert -3.5 < much_noise.min() < -2


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "tokens"])
def test_noise_of_neighbors_is_not_correlated(much_noise, axis):
    centered = (much_noise - np.euler_gamma) / np.sqrt(PI_SQUARED / 6)
    left = np.take(centered, range(centered.shape[axis] - 1), axis)
    right = np.take(centered, range(1, centered.shape[axis]), axis)

    assert abs((left * right).mean()) < 5 / np.sqrt(left.size)


# -------------------------------------------------------------------- sampling

LOGITS = np.array([0.0, 1.5, -0.7, 0.3, 0.3, -2.0, 0.9], np.float32)
CRITICAL = 27.9
"""Chi-square of 6 degrees of freedom: exceeded by chance once in ten thousand times."""


def chi_square(tokens, probabilities):
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("varied", ["low words", "high words", "positions"])
def test_sampled_tokens_follow_the_softmax(varied, temperature):
    count = 1 << 16
    numbers = np.arange(count)
    seeds = {"low words": numbers, "high words": numbers << 32, "positions": numbers * 0 + 9}
    at = numbers.astype(np.int32) if varied == "positions" else positions(count)

    tokens = draw(
        np.broadcast_to(LOGITS, (count, LOGITS.size)),
        np.full(count, temperature, np.float32),
        seed_words(seeds[varied]),
        at,
    )

    assert chi_square(np.asarray(tokens), oracle.softmax(LOGITS / temperature)) < CRITICAL


def test_each_row_has_its_own_temperature():
    count = 1 << 15
    temperature = np.tile(np.array([0.5, 0, 2.0, 0.01], np.float32), count)

    tokens = np.asarray(
        draw(
            np.broadcast_to(LOGITS, (4 * count, LOGITS.size)),
            temperature,
            seed_words(range(4 * count)),
            positions(4 * count),
        )
    ).reshape(count, 4)

    assert chi_square(tokens[:, 0], oracle.softmax(LOGITS / 0.5)) < CRITICAL
    assert chi_square(tokens[:, 2], oracle.softmax(LOGITS / 2.0)) < CRITICAL
    assert set(tokens[:, 1]) == set(tokens[:, 3]) == {1}


def test_a_sampled_token_does_not_depend_on_its_batch_or_place():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 50)).astype(np.float32)
    temperature, seeds, at = np.ones(8, np.float32), seed_words(range(8)), positions(8)
    batch = np.asarray(draw(logits, temperature, seeds, at))
    order = [5, 1, 7]

    shuffled = draw(logits[order], temperature[order], seeds[order], at[order])

    np.testing.assert_array_equal(shuffled, batch[order])


def test_a_sampled_token_does_not_depend_on_padding_of_the_vocabulary():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 51)).astype(np.float32)
    padded = np.pad(logits, ((0, 0), (0, 13)), constant_values=-np.inf)
    rest = np.ones(64, np.float32), seed_words(range(64)), positions(64)

    np.testing.assert_array_equal(draw(logits, *rest), draw(padded, *rest))


def test_an_impossible_token_is_never_drawn():
    logits = np.tile(np.array([0, -np.inf, 0, -np.inf], np.float32), (4096, 1))

    tokens = draw(logits, np.full(4096, 2, np.float32), seed_words(range(4096)), positions(4096))

    assert set(np.asarray(tokens).tolist()) == {0, 2}


@pytest.mark.parametrize("size", [3, 128, 640, 647])
def test_the_greatest_is_found_as_numpy_finds_it(size):
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((4, size), np.float32)
    few = rng.integers(0, 3, (4, size)).astype(np.float32)  # many equals
    zeros = np.where(rng.random((4, size)) < 0.5, np.float32(0), np.float32(-0.0))
    nothing = np.full((1, size), -INF, np.float32)
    infinite, broken = plain.copy(), np.concatenate([plain, plain])
    infinite[:, -1] = INF
    for i, row in enumerate(
        broken
    ):  # NumPy's too: the first NaN is the greatest, whatever its sign
        row[[i * size // 8, size - 1]] = np.copysign(np.nan, (-1) ** i)
    logits = np.concatenate([plain, -few, few, zeros, nothing, infinite, broken])

    tokens, finite = jax.jit(greatest)(logits)

    assert tokens.tolist() == np.argmax(logits, axis=-1).tolist()
    assert finite.tolist() == np.isfinite(np.max(logits, axis=-1)).tolist()
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy program", "sampling program"])
def test_a_number_that_is_none_is_noticed_wherever_it_stands(sampled):
    logits = np.zeros((40, 640), np.float32)
    logits[np.arange(39), 16 * np.arange(39) + 3] = np.nan
    inputs = oracle.step_inputs(
        SamplingInputs(np.ones(40, np.float32), seed_words(range(40))), positions(40)
    )

    outputs = chosen(
        logits, inputs, None, flags=SamplingFlags(sampled=sampled), logprobs_mode="raw_logprobs"
    )

    assert outputs.finite.tolist() == [False] * 39 + [True]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy program", "sampling program"])
def test_greedy_takes_the_lowest_id_among_equals(sampled):
    logits = np.array([[0, 3, 1, 3], [2, 2, 2, 2], [-5, -9, -9, -5]], np.float32)
    seeds = seed_words([1, 2, 3])

    tokens = draw(logits, np.zeros(3, np.float32), seeds, positions(3), sampled=sampled)

    assert tokens.tolist() == [1, 0, 0]
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy program", "sampling program"])
def test_greedy_is_the_same_for_every_seed(sampled):
    logits = np.broadcast_to(LOGITS, (100, LOGITS.size))
    seeds = seed_words(range(100))

    tokens = draw(logits, np.zeros(100, np.float32), seeds, positions(100), sampled=sampled)

    assert set(np.asarray(tokens).tolist()) == {1}


# -------------------------------------------------------------------- log-probabilities


@pytest.fixture(scope="module")
def scored():
    """Logits of eight rows with a token chosen in each, and what NumPy makes of them."""
    rng = np.random.default_rng(0)
    logits = (5 * rng.normal(size=(8, 40))).astype(np.float32)
    tokens = rng.integers(0, 40, 8).astype(np.int32)
    return logits, tokens, oracle.log_softmax(logits)


def test_the_logprob_of_the_chosen_token_is_that_of_the_log_softmax(scored):
    logits, tokens, expected = scored

    out = logprobs(logits, tokens, 3)

    assert out.chosen.shape == (8, 1)
    np.testing.assert_allclose(out.chosen[:, 0], expected[range(8), tokens], atol=1e-5)


def test_the_likeliest_tokens_come_in_order_with_their_logprobs(scored):
    logits, tokens, expected = scored

    out = logprobs(logits, tokens, 3)

    ids = np.argsort(-expected, axis=-1)[:, :3]
    assert out.top.shape == out.top_ids.shape == (8, 1, 3)
    np.testing.assert_array_equal(out.top_ids[:, 0], ids)
    np.testing.assert_allclose(out.top[:, 0], np.take_along_axis(expected, ids, 1), atol=1e-5)


def test_the_rank_counts_the_tokens_at_least_as_likely(scored):
    logits, tokens, expected = scored

    out = logprobs(logits, tokens, 0)

    ranks = [(row >= row[token]).sum() for row, token in zip(expected, tokens, strict=True)]
    assert out.rank[:, 0].tolist() == ranks
    assert out.rank.dtype == jnp.int32


def test_the_rank_of_the_likeliest_token_is_one(scored):
    logits, _, _ = scored

    out = logprobs(logits, logits.argmax(axis=-1).astype(np.int32), 0)

    assert set(np.asarray(out.rank).ravel().tolist()) == {1}


def test_equally_likely_tokens_share_the_worse_rank():
    logits = np.array([[1, 1, 0, 1]], np.float32)

    ranks = [int(logprobs(logits, np.array([t], np.int32), 0).rank[0, 0]) for t in range(4)]

    assert ranks == [3, 3, 4, 3]


def test_equally_likely_tokens_are_listed_from_the_lowest_id():
    logits = np.array([[1, 2, 0, 2]], np.float32)

    out = logprobs(logits, np.array([0], np.int32), 4)

    assert out.top_ids[0, 0].tolist() == [1, 3, 0, 2]


def test_no_alternatives_may_be_asked_for(scored):
    logits, tokens, expected = scored

    out = logprobs(logits, tokens, 0)

    assert out.top.shape == out.top_ids.shape == (8, 1, 0)
    np.testing.assert_allclose(out.chosen[:, 0], expected[range(8), tokens], atol=1e-5)


def test_no_more_alternatives_come_than_there_are_tokens():
    logits = np.array([[1, 2, 0]], np.float32)

    out = logprobs(logits, np.array([0], np.int32), 5)

    assert out.top_ids[0, 0].tolist() == [1, 0, 2]


def test_logits_far_apart_give_finite_logprobs():
    logits = np.array([[1e4, -1e4, 0]], np.float32)

    out = logprobs(logits, np.array([1], np.int32), 2)

    assert out.chosen[0, 0] == -2e4
    assert out.top[0, 0].tolist() == [0, -1e4]


def test_logits_may_be_returned_as_they_are(scored):
    logits, tokens, _ = scored
    named = np.tile(np.array([7, 0, 7], np.int32), (8, 1))

    out = logprobs(logits, tokens, 3, named, normalize=False)

    np.testing.assert_array_equal(out.chosen[:, 0], logits[range(8), tokens])
    np.testing.assert_array_equal(out.top[:, 0], -np.sort(-logits)[:, :3])
    np.testing.assert_array_equal(out.named[:, 0], logits[:, [7, 0, 7]])


def test_named_tokens_come_with_their_logprobs_and_ranks(scored):
    logits, tokens, expected = scored
    named = np.random.default_rng(1).integers(0, 40, (8, 5)).astype(np.int32)

    out = logprobs(logits, tokens, 2, named)

    ranks = [[oracle.rank(row, t) for t in ids] for row, ids in zip(logits, named, strict=True)]
    assert out.named.shape == out.named_rank.shape == (8, 1, 5)
    np.testing.assert_allclose(out.named[:, 0], np.take_along_axis(expected, named, 1), atol=1e-5)
    np.testing.assert_array_equal(out.named_rank[:, 0], ranks)


def test_without_named_tokens_there_are_none(scored):
    logits, tokens, _ = scored

    out = logprobs(logits, tokens, 2)

    assert out.named is None
    assert out.named_rank is None


# -------------------------------------------------------------------- the order of operations

EVERYTHING = SamplingFlags(
    sampled=True, min_p=True, top_k=True, top_p=True, penalties=True, edits=16, mask_words=1
)
NOTHING = SamplingFlags()
GREEDY = SamplingFlags(penalties=True, edits=16, mask_words=1)
LOGPROBS = SamplingFlags(
    sampled=True, top_k=True, penalties=True, mask_words=2, logprobs=5, logprob_ids=16
)
NUM_ROWS = 8

PROGRAMS = {
    "nothing": (SamplingFlags(), 33),
    "temperature": (SamplingFlags(sampled=True), 33),
    "min_p": (SamplingFlags(sampled=True, min_p=True), 33),
    "top_k": (SamplingFlags(sampled=True, top_k=True), 33),
    "top_p": (SamplingFlags(sampled=True, top_p=True), 33),
    "penalties": (SamplingFlags(penalties=True), 33),
    "edits": (SamplingFlags(edits=16), 33),
    "mask": (SamplingFlags(mask_words=1), 33),
    "greedy": (GREEDY, 128),
    "everything, 7": (EVERYTHING, 7),
    "everything, 33": (EVERYTHING, 33),
    "everything, 128": (EVERYTHING, 128),
    "everything, 1000": (EVERYTHING, 1000),
}
"""Flags and sizes of vocabulary: few, as each is compiled."""


def number(rng, low, high):
    """As users write them."""
    return round(rng.uniform(low, high), 2)


def few(rng, vocab_size, most):
    """Up to so many tokens, mostly of a few, so that rules meet."""
    size = rng.choice([min(vocab_size, 9), vocab_size])
    return tuple(rng.integers(0, size, rng.integers(0, most + 1)).tolist())


KNOBS = {
    # name -> flag it needs, what it sets
    "greedy": ("sampled", lambda rng, v: {"temperature": 0.0}),
    "temperature": ("sampled", lambda rng, v: {"temperature": number(rng, 0.3, 2)}),
    "min_p": ("min_p", lambda rng, v: {"min_p": number(rng, 0, 1)}),
    "top_k": ("top_k", lambda rng, v: {"top_k": int(rng.integers(1, v + 5))}),
    "top_p": ("top_p", lambda rng, v: {"top_p": number(rng, 0.01, 1)}),
    "repetition": ("penalties", lambda rng, v: {"repetition_penalty": number(rng, 0.2, 3)}),
    "frequency": ("penalties", lambda rng, v: {"frequency_penalty": number(rng, -2, 2)}),
    "presence": ("penalties", lambda rng, v: {"presence_penalty": number(rng, -2, 2)}),
    "bias": ("edits", lambda rng, v: {"logit_bias": {t: bias(rng) for t in few(rng, v, 5)}}),
    "min_tokens": ("edits", lambda rng, v: {"min_tokens": int(rng.integers(0, 8))}),
    "bad_words": ("edits", lambda rng, v: {}),
    "allowed": ("mask_words", lambda rng, v: {"allowed_token_ids": (1, *few(rng, v, 20))}),
    "mask": ("mask_words", lambda rng, v: {}),
    "named": ("logprob_ids", lambda rng, v: {"logprob_token_ids": few(rng, v, 16)}),
}


def bias(rng):
    return float(rng.choice([number(rng, -5, 5), -100, 100], p=[0.8, 0.1, 0.1]))


def bad_words(rng, vocab_size, output):
    """Words of one to three tokens; those of several often follow what was generated."""
    words = []
    for _ in range(rng.integers(0, 5)):
        before = output[-2:] if rng.random() < 0.7 else few(rng, vocab_size, 2)
        cut = rng.integers(0, len(before) + 1)
        words.append((*before[cut:], int(rng.integers(0, vocab_size))))
    return tuple(words)


def make_row(rng, knobs, vocab_size):
    """A row with these knobs in use."""
    temperature = 1.0 if "sampled" in {KNOBS[knob][0] for knob in knobs} else 0.0
    values = {"temperature": temperature}
    for knob in knobs:
        values |= KNOBS[knob][1](rng, vocab_size)
    output = few(rng, vocab_size, 5)
    mask = rng.random(vocab_size) < 0.8
    return Row(
        SamplingParams(**values),
        prompt_ids=(int(rng.integers(0, vocab_size)), *few(rng, vocab_size, 4)),
        output_ids=output,
        stop_ids=few(rng, vocab_size, 3),
        bad_word_ids=bad_words(rng, vocab_size, output) if "bad_words" in knobs else (),
        mask=tuple(mask.tolist()) if "mask" in knobs else None,
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
    )


def make_logits(rng, vocab_size):
    """float32 [V]: with ties, or without; some with tokens that the model itself forbids."""
    logits = rng.normal(size=vocab_size) * rng.choice([0.5, 2, 6])
    if rng.random() < 0.6:
        logits = (4 * logits).round() / 4
    if rng.random() < 0.25:
        logits[rng.random(vocab_size) < 0.2] = -INF
    return logits.astype(np.float32)


def is_clear_cut(logits, row):
    """Whether float32 must find the row's thresholds where float64 does."""
    x, params = oracle.before_truncation(logits, *row.arguments()), row.params
    if x.max() == -INF:
        return False  # no token is possible, and there is nothing to compare
    largest = max(1, np.abs(x[x > -INF]).max())

    def is_near(threshold):
        distance = np.abs(x[x > -INF] - threshold)
        return ((distance > 0) & (distance < 1e-6 * largest)).any()

    near = is_near(x.max())
    if params.min_p > 0:
        near |= is_near(x.max() + np.log(params.min_p))
        x = oracle.min_p(x, params.min_p)
    if 0 < params.top_k < len(x):
        near |= is_near(np.sort(x)[-params.top_k])
        x = oracle.top_k(x, params.top_k)
    if params.top_p < 1:
        masses = np.cumsum(np.sort(oracle.softmax(x))[::-1])
        near |= np.abs(masses - params.top_p).min() < 1e-5 + 3e-7 * largest
        kept = oracle.top_p(x, params.top_p)
        near |= is_near(kept[kept > -INF].min())
    return not near


def batches(flags, vocab_size):
    """Batches of rows with the logits of each: [(logits, row)].

    Hypothesis draws a seed and the knobs in use for each row, NumPy their values.
    """
    usable = [knob for knob, (flag, _) in KNOBS.items() if getattr(flags, flag)]
    knobs = st.sets(st.sampled_from(usable)) if usable else st.just(())

    def pair(seed_and_knobs):
        seed, knobs = seed_and_knobs
        rng = np.random.default_rng(seed)
        while True:
            logits = make_logits(rng, vocab_size)
            row = make_row(rng, sorted(knobs), vocab_size)
            if is_clear_cut(logits, row):
                return logits, row

    one = st.tuples(st.integers(0, 2**32), knobs).map(pair)
    return st.lists(one, min_size=NUM_ROWS, max_size=NUM_ROWS)


def device_form(batch, flags):
    """What the sampler takes: logits, inputs of the step and token counts."""
    logits, rows = np.stack([one for one, _ in batch]), [row for _, row in batch]
    sampling = oracle.sampling_inputs(rows, flags, logits.shape[1])
    at = np.array([row.num_tokens for row in rows], np.int32)
    counts = oracle.token_counts(rows, logits.shape[1]) if flags.penalties else None
    return logits, oracle.step_inputs(sampling, at), counts


def sized(flags, vocab_size):
    """Flags with the mask that this vocabulary needs."""
    return replace(flags, mask_words=-(-vocab_size // 32) * bool(flags.mask_words))


repeated = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize(("flags", "vocab_size"), PROGRAMS.values(), ids=PROGRAMS)
@repeated
@given(st.data())
def test_logits_are_processed_as_the_oracle_does(flags, vocab_size, data):
    flags = sized(flags, vocab_size)
    batch = data.draw(batches(flags, vocab_size))
    logits, inputs, counts = device_form(batch, flags)

    out = processed(logits, inputs.sampling, counts, inputs.kv_lens, flags=flags)

    expected = np.stack([oracle.process(one, *row.arguments()) for one, row in batch])
    np.testing.assert_array_equal(np.isneginf(out), np.isneginf(expected))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["greedy", "everything, 33"])
@repeated
@given(st.data())
def test_a_token_is_the_likeliest_or_the_likeliest_with_noise(name, data):
    flags, vocab_size = PROGRAMS[name]
    flags = sized(flags, vocab_size)
    batch = data.draw(batches(flags, vocab_size))
    logits, inputs, counts = device_form(batch, flags)

    out = jax.device_get(chosen(logits, inputs, counts, flags=flags, logprobs_mode="raw_logprobs"))

    draws = np.asarray(noise(inputs.sampling.seeds, inputs.kv_lens, vocab_size), np.float64)
    for (one, row), token, gumbel in zip(batch, out.tokens[:, 0], draws, strict=True):
        expected = oracle.process(one, *row.arguments())
        if row.params.is_greedy:
            assert token == expected.argmax()
        else:
            noisy = expected + gumbel
            assert noisy[token] > noisy.max() - 1e-4
    assert out.finite.all()
    assert out.possible.all()


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
@repeated
@given(st.data())
def test_logprobs_are_those_of_the_oracle_in_every_mode(mode, data):
    flags, vocab_size = LOGPROBS, 40
    batch = data.draw(batches(flags, vocab_size))
    logits, inputs, counts = device_form(batch, flags)

    out = jax.device_get(chosen(logits, inputs, counts, flags=flags, logprobs_mode=mode))

    for i, (one, row) in enumerate(batch):
        source = one if mode.startswith("raw") else oracle.process(one, *row.arguments())
        values = oracle.log_softmax(source) if mode.endswith("logprobs") else source
        found = jax.tree.map(lambda x, i=i: x[i, 0], out.logprobs)
        token, named = int(out.tokens[i, 0]), inputs.sampling.logprob_ids[i]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
        close(found.chosen, values[token])
        close(found.named, values[named])
        close(found.top, -np.sort(-values)[:5])
        close(found.top, values[found.top_ids])
        assert len(set(found.top_ids.tolist())) == 5
        for rank, one_token in [(found.rank, token), *zip(found.named_rank, named, strict=True)]:
            if mode.startswith("raw"):
                assert rank == oracle.rank(source, one_token)
            else:  # processed values that differ by rounding may tie in either precision
                at = source[one_token]
                margin = 1e-5 * max(1, abs(at)) if at > -INF else 0
                assert (source >= at + margin).sum() <= rank <= (source >= at - margin).sum()
        if mode.startswith("raw"):
            assert found.top_ids.tolist() == np.argsort(-source, kind="stable")[:5].tolist()


def test_more_named_tokens_than_a_row_has_are_padding():
    rows = [Row(SamplingParams(logprob_token_ids=ids)) for ids in ([3, 1], None)]
    flags = SamplingFlags(sampled=True, logprobs=0, logprob_ids=16)
    logits, inputs, _ = device_form([(LOGITS, row) for row in rows], flags)

    out = chosen(logits, inputs, None, flags=flags, logprobs_mode="raw_logits").logprobs

    assert out.named[0, 0, :2].tolist() == LOGITS[[3, 1]].tolist()
    assert out.named.shape == (2, 1, 16)


# -------------------------------------------------------------------- what can go wrong


def outcome(logits, *, flags=NOTHING, limits=None, **fields):
    """Runs rows with these logits; `fields` of `SamplingInputs` beside temperature and seeds."""
    logits = np.asarray(logits, np.float32)
    count = len(logits)
    sampling = SamplingInputs(np.ones(count, np.float32), seed_words(range(count)), **fields)
    inputs = oracle.step_inputs(sampling, positions(count))
    if limits is not None:
        inputs = replace(inputs, limits=np.asarray(limits, np.int32))
    return chosen(logits, inputs, None, flags=flags, logprobs_mode="raw_logprobs")


BROKEN = [[0, 1, 2], [0, np.nan, 2], [0, INF, 2], [-INF, -INF, -INF], [-INF, 1, -INF]]


@pytest.mark.parametrize("flags", [SamplingFlags(), SamplingFlags(sampled=True)], ids=str)
def test_rows_without_finite_logits_are_told(flags):
    out = outcome(BROKEN, flags=flags)

    assert out.finite.tolist() == [True, False, False, False, True]


def test_rows_that_do_not_sample_may_hold_anything():
    out = outcome(BROKEN, limits=[0, 0, 0, 0, 3])

    assert out.finite.all()
    assert out.possible.all()
    assert out.num_tokens.tolist() == [0, 0, 0, 0, 1]


def test_rows_of_which_the_mask_leaves_no_token_are_told():
    mask = np.array([[7], [2], [0], [0], [7]], np.uint32)

    out = outcome(
        [[0, 1, 2], [0, 1, -INF], [0, 1, 2], [np.nan, 1, 2], [0, -INF, 2]],
        flags=SamplingFlags(mask_words=1),
        mask=mask,
    )

    assert out.possible.tolist() == [True, True, False, True, True]
    assert out.finite.tolist() == [True, True, True, False, True]


def test_rows_of_which_bans_leave_no_token_are_told():
    fields = {
        "edit_ids": np.array([[0, 1, 2], [0, 1, 1], [0, 1, 2]], np.int32),
        "edit_values": np.full((3, 3), -INF, np.float32),
        "edit_until": np.array([[9, 9, 9], [9, 9, 9], [9, 9, 5]], np.int32),
    }

    out = outcome(np.zeros((3, 3)), flags=SamplingFlags(edits=3), **fields)

    assert out.possible.tolist() == [False, True, True]
    assert out.tokens[1:, 0].tolist() == [2, 2]


def test_an_edit_ends_when_the_row_is_as_long_as_it_says():
    flags = SamplingFlags(edits=16)
    sampling = SamplingInputs(
        np.zeros(3, np.float32),
        seed_words(range(3)),
        edit_ids=np.full((3, 16), 1, np.int32),
        edit_values=np.full((3, 16), -INF, np.float32),
        edit_until=np.full((3, 16), 8, np.int32),
    )

    out = processed(np.zeros((3, 4), np.float32), sampling, None, np.int32([7, 8, 9]), flags=flags)

    assert np.isneginf(out).sum(axis=1).tolist() == [1, 0, 0]


# -------------------------------------------------------------------- scores

WEIGHT = np.random.default_rng(2).normal(size=(4, 11)).astype(np.float32)
HIDDEN = np.random.default_rng(3).normal(size=(13, 4)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("count", "chunk"))
def scores(scored, targets, num_scored, *, count, chunk):
    return score_tokens(
        jnp.asarray(HIDDEN), lambda x: x @ WEIGHT, scored, targets, num_scored, count, chunk
    )


@pytest.mark.parametrize("chunk", [1, 4, 13, 16])
@pytest.mark.parametrize("num_scored", [0, 1, 4, 7, 12, 13])
def test_scores_are_those_of_the_whole_log_softmax(num_scored, chunk):
    rng = np.random.default_rng([num_scored, chunk])
    scored = rng.integers(0, 13, 13).astype(np.int32)
    targets = rng.integers(0, 11, 13).astype(np.int32)

    out = jax.device_get(scores(scored, targets, np.int32(num_scored), count=3, chunk=chunk))

    assert out.logprobs.shape == out.ranks.shape == (13,)
    assert out.top.shape == out.top_ids.shape == (13, 3)
    expected = oracle.log_softmax(HIDDEN @ WEIGHT)[scored]
    for i in range(num_scored):
        row, target = expected[i], targets[i]
        np.testing.assert_allclose(out.logprobs[i], row[target], atol=1e-5)
        assert out.ranks[i] == oracle.rank(row, target)
        assert out.top_ids[i].tolist() == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose(out.top[i], row[out.top_ids[i]], atol=1e-5)


def test_all_tokens_may_be_scored_in_order():
    order, targets = np.arange(13, dtype=np.int32), np.arange(13, dtype=np.int32) % 11

    out = scores(order, targets, np.int32(13), count=3, chunk=4)

    expected = oracle.log_softmax(HIDDEN @ WEIGHT)[order, targets]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-5)


def test_chunks_behind_the_last_scored_token_are_not_computed():
    out = scores(*np.zeros((2, 13), np.int32), np.int32(3), count=3, chunk=4)

    assert np.asarray(out.ranks > 0).tolist() == [True] * 4 + [False] * 9


# -------------------------------------------------------------------- what is left out

EXPENSIVE = {
    "exponential",
    "log",
    "log_plus_one",
    "tanh",
    "power",
    "sort",
    "top_k",
    "while",
    "scatter",
    "gather",
    "divide",
    "dot_general",
    "custom_call",
}


def operations(flags, mode="raw_logprobs"):
    """The expensive operations of a program that chooses, as XLA gets it."""
    rows = [Row(SamplingParams())] * 2
    inputs = oracle.step_inputs(oracle.sampling_inputs(rows, flags, 40), positions(2))
    counts = oracle.token_counts(rows, 40) if flags.penalties else None
    logits = np.zeros((2, 40), np.float32)
    text = chosen.lower(logits, inputs, counts, flags=flags, logprobs_mode=mode).as_text()
    return EXPENSIVE & set(re.findall(r"\b(?:stablehlo|chlo)\.(\w+)", text))


NOISE = {"log", "log_plus_one", "divide"}  # and a division by the temperature


@pytest.mark.parametrize(
    ("flags", "mode", "expected"),
    [
        (SamplingFlags(), "raw_logprobs", set()),
        (SamplingFlags(), "processed_logprobs", set()),
        (SamplingFlags(mask_words=2), "raw_logprobs", set()),
        (SamplingFlags(edits=16), "raw_logprobs", {"scatter"}),
        (SamplingFlags(penalties=True), "raw_logprobs", {"divide"}),
        (SamplingFlags(sampled=True), "raw_logprobs", NOISE),
        (SamplingFlags(sampled=True, min_p=True), "raw_logprobs", NOISE),
        (SamplingFlags(sampled=True, top_k=True), "raw_logprobs", NOISE | {"while"}),
        (SamplingFlags(sampled=True, top_p=True), "raw_logprobs", NOISE | {"while", "exponential"}),
        (
            SamplingFlags(logprobs=1),
            "raw_logprobs",
            {"exponential", "log", "gather", "top_k"},
        ),
        (SamplingFlags(logprobs=1, logprob_ids=16), "raw_logits", {"gather", "top_k"}),
    ],
    # In a fixed order: the workers of a test run must agree on names.
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value) or "plain",
)
def test_a_batch_pays_only_for_what_it_uses(flags, mode, expected):
    assert operations(flags, mode) == expected


def test_no_program_sorts():
    assert "sort" not in operations(replace(EVERYTHING, mask_words=2, logprobs=5, logprob_ids=16))


def test_without_flags_there_are_no_logprobs():
    out = outcome([[0, 1, 2]])

    assert out.logprobs is None
    assert out.scores is None


def test_a_program_without_penalties_ignores_the_counts_that_the_state_keeps():
    flags = SamplingFlags()
    inputs = oracle.step_inputs(
        oracle.sampling_inputs([Row(SamplingParams(temperature=0))], flags, 7), positions(1)
    )
    counts = np.full((1, 7), 9, np.int32)

    out = chosen(LOGITS[None], inputs, counts, flags=flags, logprobs_mode="raw_logprobs")

    assert out.tokens.tolist() == [[1]]
