import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from jaxllm.sampler import gumbel_noise, logprobs_of, sample, threefry2x32

cipher = jax.jit(threefry2x32)
noise = jax.jit(gumbel_noise, static_argnums=2)
draw = jax.jit(sample)
logprobs = jax.jit(logprobs_of, static_argnums=2)

PI_SQUARED = np.pi**2


def words(*values):
    return tuple(jnp.asarray(value, jnp.uint32) for value in values)


def seed_words(seeds):
    """uint32 [B, 2], as `batch` sends them."""
    seeds = np.asarray(seeds, np.uint64)
    return np.stack([seeds & 0xFFFFFFFF, seeds >> 32], axis=1).astype(np.uint32)


def positions(count, value=5):
    return np.full(count, value, np.int32)


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


def test_the_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary():
    seeds, at = seed_words([1, 2]), positions(2)

    large = np.asarray(noise(seeds, at, 64))

    for size in (1, 2, 33, 63):
        np.testing.assert_array_equal(noise(seeds, at, size), large[:, :size])


def test_the_noise_of_a_row_does_not_depend_on_the_batch():
    seeds = seed_words(range(10, 17))
    at = np.arange(7, dtype=np.int32) ** 2
    batch = np.asarray(noise(seeds, at, 32))
    order = [4, 2, 0, 6]

    shuffled = noise(seeds[order], at[order], 32)
    alone = noise(seeds[3:4], at[3:4], 32)

    np.testing.assert_array_equal(shuffled, batch[order])
    np.testing.assert_array_equal(alone, batch[3:4])


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


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


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

    assert chi_square(np.asarray(tokens), softmax(LOGITS / temperature)) < CRITICAL


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

    assert chi_square(tokens[:, 0], softmax(LOGITS / 0.5)) < CRITICAL
    assert chi_square(tokens[:, 2], softmax(LOGITS / 2.0)) < CRITICAL
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


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.array([[0, 3, 1, 3], [2, 2, 2, 2], [-5, -9, -9, -5]], np.float32)

    tokens = draw(logits, np.zeros(3, np.float32), seed_words([1, 2, 3]), positions(3))

    assert tokens.tolist() == [1, 0, 0]
    assert tokens.dtype == jnp.int32


def test_greedy_is_the_same_for_every_seed():
    logits = np.broadcast_to(LOGITS, (100, LOGITS.size))

    tokens = draw(logits, np.zeros(100, np.float32), seed_words(range(100)), positions(100))

    assert set(np.asarray(tokens).tolist()) == {1}


# -------------------------------------------------------------------- log-probabilities


def expected_logprobs(logits):
    logits = np.asarray(logits, np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def scored():
    """Logits of eight rows with a token chosen in each, and what NumPy makes of them."""
    rng = np.random.default_rng(0)
    logits = (5 * rng.normal(size=(8, 40))).astype(np.float32)
    tokens = rng.integers(0, 40, 8).astype(np.int32)
    return logits, tokens, expected_logprobs(logits)


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
