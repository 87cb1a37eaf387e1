"""Sampled tokens follow the distribution that the parameters ask for.

Many tokens of one distribution are drawn in one program: once with another seed
each, once with one seed and another position each. A chi-square test compares them
with the exact probabilities; seeds are fixed, so that a test cannot fail by chance
on one day only.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.flags import SamplingFlags
from jaxllm.inputs import SamplingInputs
from jaxllm.sampler import choose
from jaxllm.sampling_params import SamplingParams
from tests import oracle
from tests.oracle import Row

NUM_DRAWS = 20480
CHUNK = 256
"""Rows of logits that exist at once."""

LOGITS = np.array([0.0, 1.5, -0.7, 0.3, 0.3, -2.0, 0.9], np.float32)
LARGE = np.random.default_rng(0).normal(size=5000).astype(np.float32).round(2)
"""Rounded, so that many tokens tie."""


def params(**settings):
    return SamplingParams(max_tokens=None, **settings)


def flags(*names, **settings):
    return SamplingFlags(sampled=True, **dict.fromkeys(names, True), **settings)


CASES = {
    "temperature 1": (Row(params()), flags()),
    "temperature 0.5": (Row(params(temperature=0.5)), flags()),
    "temperature 1.7": (Row(params(temperature=1.7)), flags()),
    "top_k": (Row(params(top_k=2)), flags("top_k")),
    "top_k that ties": (Row(params(top_k=3)), flags("top_k")),
    "top_p": (Row(params(top_p=0.6)), flags("top_p")),
    "top_p that ties": (Row(params(top_p=0.75)), flags("top_p")),
    "min_p": (Row(params(min_p=0.2)), flags("min_p")),
    "repetition": (
        Row(params(repetition_penalty=1.8), prompt_ids=(1, 2), output_ids=(6, 6)),
        flags("penalties"),
    ),
    "frequency": (
        Row(params(frequency_penalty=0.6), prompt_ids=(1,), output_ids=(6, 3, 6)),
        flags("penalties"),
    ),
    "presence": (
        Row(params(presence_penalty=-1.5), prompt_ids=(1,), output_ids=(5, 3, 5)),
        flags("penalties"),
    ),
    "logit_bias": (Row(params(logit_bias={5: 2.5, 1: -1.0, 4: -1.5})), flags(edits=16)),
    "bad words": (Row(params(), output_ids=(2, 3), bad_word_ids=((6,), (3, 1))), flags(edits=16)),
    # Enough for all the positions that are drawn at.
    "min_tokens": (Row(params(min_tokens=NUM_DRAWS), stop_ids=(0, 1)), flags(edits=16)),
    "allowed": (Row(params(allowed_token_ids=[0, 3, 5, 6])), flags(mask_words=1)),
    "temperature, top_k and top_p": (
        Row(params(temperature=1.4, top_k=5, top_p=0.8)),
        flags("top_k", "top_p"),
    ),
    "all": (
        Row(
            params(
                temperature=0.8,
                top_k=5,
                top_p=0.97,
                min_p=0.02,
                repetition_penalty=1.2,
                frequency_penalty=0.2,
                presence_penalty=0.3,
                logit_bias={5: 2.0, 2: 1.0},
                allowed_token_ids=[0, 1, 2, 3, 5, 6],
            ),
            prompt_ids=(1, 2),
            output_ids=(6, 6, 0),
        ),
        flags("top_k", "top_p", "min_p", "penalties", edits=16, mask_words=1),
    ),
}

LARGE_CASES = {
    "temperature 1.3": (Row(params(temperature=1.3)), flags(), "positions"),
    "all": (
        Row(
            params(
                temperature=1.2,
                top_k=3000,
                top_p=0.9,
                min_p=0.001,
                repetition_penalty=1.3,
                frequency_penalty=0.2,
                presence_penalty=0.3,
                logit_bias={17: 7.0, 4999: 6.0, 3: -100.0},
                allowed_token_ids=[*range(1500), *range(2000, 5000)],
            ),
            prompt_ids=tuple(range(0, 5000, 3)),
            output_ids=tuple(range(0, 5000, 5)) * 2,
        ),
        flags("top_k", "top_p", "min_p", "penalties", edits=16, mask_words=157),
        "seeds",
    ),
}


@functools.partial(jax.jit, static_argnames="flags")
def drawn(logits, sampling, counts, seeds, positions, *, flags):
    """A token for each seed and position, all of the same row."""

    def chunk(some):
        seeds, positions = some

        def rows(x):
            return jnp.broadcast_to(x, (CHUNK, *x.shape[1:]))

        sampling_of_all = SamplingInputs(seeds=seeds, **{n: rows(x) for n, x in sampling.items()})
        inputs = oracle.step_inputs(sampling_of_all, positions)
        held = None if counts is None else rows(counts)
        return choose(rows(logits), inputs, held, flags, "raw_logprobs").tokens[:, 0]

    chunks = seeds.reshape(-1, CHUNK, 2), positions.reshape(-1, CHUNK)
    return jax.lax.map(chunk, chunks).ravel()


def draws(logits, row, flags, *, seeds, positions):
    """int [N], the tokens of N seeds and positions."""
    sampling = vars(oracle.sampling_inputs([row], flags, len(logits)))
    sampling = {n: x for n, x in sampling.items() if x is not None and n != "seeds"}
    counts = oracle.token_counts([row], len(logits)) if flags.penalties else None
    seeds, positions = np.broadcast_arrays(np.asarray(seeds, np.uint64), np.int32(positions))
    words = np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)], axis=1)
    tokens = drawn(
        logits[None], sampling, counts, words.astype(np.uint32), positions.copy(), flags=flags
    )
    return np.asarray(tokens)


NUMBERS = np.arange(NUM_DRAWS)


def varied(row, what):
    """Many seeds at one position, or many positions of one seed."""
    if what == "seeds":
        return {"seeds": NUMBERS + (7 << 32), "positions": row.num_tokens}
    return {"seeds": 1234567, "positions": NUMBERS}


def p_value(counts, expected):
    """How often counts are as far from what is expected by chance: of a chi-square test."""
    degrees = len(counts) - 1
    half = ((counts - expected) ** 2 / expected).sum() / 2
    # The upper incomplete gamma function of degrees / 2, by its recurrence.
    p, a = (math.erfc(math.sqrt(half)), 0.5) if degrees % 2 else (math.exp(-half), 1.0)
    while a < degrees / 2:
        p += math.exp(a * math.log(half) - half - math.lgamma(a + 1))
        a += 1
    return p


SIGNIFICANT = 1e-4


def check(tokens, probabilities):
    """Compares tokens with their probabilities, in classes that are likely enough."""
    assert probabilities[tokens].min() > 0, "an impossible token was drawn"
    for classes in (by_probability(probabilities), np.arange(len(probabilities)) % 50):
        counts = np.bincount(classes[tokens], minlength=classes.max() + 1)
        expected = len(tokens) * np.bincount(classes, probabilities)
        if (possible := expected > 0).sum() > 1:
            assert expected[possible].min() > 5
            assert p_value(counts[possible], expected[possible]) > SIGNIFICANT
        else:
            assert counts[possible] == len(tokens)


def by_probability(probabilities):
    """A class for each token: some fifty, each of about as much probability, likeliest first."""
    order = np.argsort(-probabilities, kind="stable")
    reached = np.cumsum(probabilities[order]) - probabilities[order] / 2
    classes = np.empty(len(order), int)
    classes[order] = np.minimum(reached * 50, 49)
    return np.unique(classes, return_inverse=True)[1]


# -------------------------------------------------------------------- the test itself


@pytest.mark.parametrize(
    ("degrees", "statistic", "p"),
    [(1, 10.828, 1e-3), (6, 27.856, 1e-4), (20, 19.337, 0.5), (49, 66.339, 0.05)],
)
def test_the_p_value_is_that_of_a_chi_square(degrees, statistic, p):
    expected = np.full(degrees + 1, 1000.0)
    counts = expected.copy()
    counts[:2] += np.array([1, -1]) * math.sqrt(statistic * 1000 / 2)

    assert p_value(counts, expected) == pytest.approx(p, rel=1e-3)


def test_draws_of_a_slightly_different_distribution_are_noticed():
    tokens = np.random.default_rng(0).choice(7, NUM_DRAWS, p=oracle.softmax(LOGITS / 1.05))

    with pytest.raises(AssertionError):
        check(tokens, oracle.softmax(LOGITS))


# -------------------------------------------------------------------- distributions


@pytest.mark.parametrize("what", ["seeds", "positions"])
@pytest.mark.parametrize(("row", "flags"), CASES.values(), ids=CASES)
def test_sampled_tokens_follow_the_exact_distribution(row, flags, what):
    tokens = draws(LOGITS, row, flags, **varied(row, what))

    check(tokens, oracle.softmax(oracle.process(LOGITS, *row.arguments())))


@pytest.mark.parametrize(("row", "flags", "what"), LARGE_CASES.values(), ids=LARGE_CASES)
def test_sampled_tokens_of_a_large_vocabulary_follow_it_too(row, flags, what):
    tokens = draws(LARGE, row, flags, **varied(row, what))

    check(tokens, oracle.softmax(oracle.process(LARGE, *row.arguments())))


def test_equally_likely_tokens_are_drawn_equally_often():
    tokens = draws(
        np.zeros(7, np.float32),
        Row(params(top_k=2, top_p=0.3)),  # both thresholds tie with all tokens
        flags("top_k", "top_p"),
        seeds=NUMBERS,
        positions=3,
    )

    check(tokens, np.full(7, 1 / 7))


def test_a_banned_token_is_drawn_again_when_min_tokens_is_reached():
    row = Row(params(min_tokens=3), prompt_ids=(4, 4), stop_ids=(0, 1))
    edits = flags(edits=16)

    banned = draws(LOGITS, row, edits, seeds=NUMBERS, positions=4)
    free = draws(LOGITS, row, edits, seeds=NUMBERS, positions=5)

    check(banned, oracle.softmax(oracle.process(LOGITS, *row.arguments())))
    check(free, oracle.softmax(LOGITS))


# -------------------------------------------------------------------- independence


@pytest.mark.parametrize(
    ("seed_step", "position_step"),
    [(0, 1), (1, 0), (1, 1), (1, -1), (1 << 32, 0), (0, 2)],
    ids=["positions", "seeds", "both", "one up one down", "high words of seeds", "next but one"],
)
def test_neighbors_are_independent(seed_step, position_step):
    first = draws(LOGITS, Row(params()), flags(), seeds=5 + 4 * NUMBERS, positions=9 + NUMBERS % 64)
    second = draws(
        LOGITS,
        Row(params()),
        flags(),
        seeds=5 + 4 * NUMBERS + seed_step,
        positions=9 + NUMBERS % 64 + position_step,
    )
    expected = oracle.softmax(LOGITS)

    counts = np.bincount(7 * first + second, minlength=49)

    pairs = NUM_DRAWS * np.outer(expected, expected).ravel()
    assert p_value(counts, pairs) > SIGNIFICANT


def test_tokens_of_one_seed_are_independent_of_the_one_before():
    tokens = draws(LOGITS, Row(params()), flags(), seeds=99, positions=NUMBERS)
    expected = oracle.softmax(LOGITS)

    counts = np.bincount(7 * tokens[::2] + tokens[1::2], minlength=49)

    pairs = NUM_DRAWS / 2 * np.outer(expected, expected).ravel()
    assert p_value(counts, pairs) > SIGNIFICANT


def test_rows_of_one_batch_do_not_share_their_noise():
    # Equal numbers would be drawn much more often than by chance.
    tokens = draws(LARGE[:499], Row(params()), flags(), seeds=NUMBERS, positions=1)
    expected = oracle.softmax(LARGE[:499])

    equal = (tokens[::2] == tokens[1::2]).mean()

    chance = (expected**2).sum()
    assert abs(equal - chance) < 4 * math.sqrt(chance / (NUM_DRAWS / 2))
