"""Thresholds found without sorting are those that sorting finds."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxllm import truncation
from tests import oracle

top_k = jax.jit(truncation.top_k)
top_p = jax.jit(truncation.top_p)
min_p = jax.jit(truncation.min_p)

V = 33
INF = np.inf
RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=V)
TINY = np.finfo(np.float32).smallest_subnormal

ROWS = {
    "different": NORMAL,
    "sharp": 30 * NORMAL,
    "all equal": np.full(V, 0.7),
    "all equal and negative": np.full(V, -3.1),
    "tied": RNG.integers(-2, 3, V),
    "one apart": np.where(np.arange(V) == 20, 1, 0),
    "half impossible": np.where(np.arange(V) % 2, NORMAL, -INF),
    "one possible": np.where(np.arange(V) == 20, 5, -INF),
    "zeros of both signs": np.where(np.arange(V) % 2, 0.0, -0.0),
    "zeros among others": np.where(np.arange(V) < 9, [0.0, -0.0, 1.0] * 11, NORMAL.round()),
    "neighbors": np.float32(1) + np.arange(V) * np.finfo(np.float32).eps,
    "smallest normal": NORMAL.round(1) * 2e-37,
    "huge": NORMAL.round(1) * 1e38,
    "largest": np.where(np.arange(V) % 3, 1, -1) * np.finfo(np.float32).max,
    "huge and impossible": np.where(np.arange(V) % 2, NORMAL * 1e38, -INF),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS)
def row(request):
    return np.asarray(request.param, np.float32)


def each(row, count):
    """The same row, `count` times."""
    return np.tile(row, (count, 1))


# -------------------------------------------------------------------- top-k


def test_top_k_keeps_the_k_largest_and_their_ties_for_every_k(row):
    ks = np.arange(1, V + 6, dtype=np.int32)

    out = top_k(each(row, len(ks)), ks)

    np.testing.assert_array_equal(out, [oracle.top_k(row, k) for k in ks])


def test_top_k_of_huge_k_drops_none(row):
    ks = np.full(V + 5, np.iinfo(np.int32).max, np.int32)

    np.testing.assert_array_equal(top_k(each(row, len(ks)), ks), each(row, len(ks)))


def test_top_k_of_numbers_below_the_smallest_normal_keeps_at_least_k():
    # A device may take them all for zero, which makes ties of them and drops too few.
    row = (TINY * np.arange(-16, 17)).astype(np.float32)
    ks = np.arange(1, V + 6, dtype=np.int32)

    out = np.asarray(top_k(each(row, len(ks)), ks))

    kept = np.isfinite(out)
    assert (kept.sum(axis=1) >= np.minimum(ks, V)).all()
    assert kept[:, -1].all()
    np.testing.assert_array_equal(out[kept], each(row, len(ks))[kept])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(
        np.float32,
        (6, 9),
        elements=st.one_of(
            st.floats(width=32, allow_nan=False, allow_subnormal=False, max_value=2.0**127),
            st.sampled_from([-INF, -1.0, 0.0, 1.0, 2.0]),
        ),
    ),
    hnp.arrays(np.int32, 6, elements=st.integers(1, 12)),
)
def test_top_k_is_the_threshold_of_a_sort(rows, ks):
    out = top_k(rows, ks)

    np.testing.assert_array_equal(out, [oracle.top_k(*one) for one in zip(rows, ks, strict=True)])


# -------------------------------------------------------------------- top-p

PS = np.array([1e-30, 1e-6, 0.01, 0.1, 0.3, 0.5, 0.77, 0.9, 0.99, 0.9999, 1 - 2**-24, 1], "f4")


def is_clear_cut(row, p):
    """Whether no mass that decides is so near to p that float32 could see it otherwise."""
    masses = np.cumsum(np.sort(oracle.softmax(row))[::-1])
    return p == 1 or np.abs(masses - np.float64(p)).min() > 1e-5


def test_top_p_keeps_the_likeliest_that_reach_p(row):
    rows = each(row, len(PS))

    out = np.asarray(top_p(rows, PS))

    sure = [is_clear_cut(row, p) for p in PS]
    expected = np.array([oracle.top_p(row, p) for p in PS])
    assert sum(sure) >= 5
    np.testing.assert_array_equal(out[sure], expected[sure])


def test_top_p_always_keeps_the_likeliest_and_their_ties(row):
    out = np.asarray(top_p(each(row, len(PS)), PS))

    best = row == row.max()
    assert np.isfinite(out[:, best]).all()
    np.testing.assert_array_equal(np.isfinite(out[0]), best)


def test_top_p_changes_nothing_that_it_keeps(row):
    out = np.asarray(top_p(each(row, len(PS)), PS))

    assert ((out == row) | (out == -INF)).all()


def test_a_larger_p_keeps_what_a_smaller_one_kept(row):
    kept = np.isfinite(top_p(each(row, len(PS)), PS))

    assert (kept[:-1] <= kept[1:]).all()


def test_top_p_of_one_drops_none_however_unlikely(row):
    out = np.asarray(top_p(each(row, len(PS)), PS))

    np.testing.assert_array_equal(out[-1], row)


@pytest.mark.parametrize(
    ("p", "kept"), [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.87, 3), (0.89, 5), (0.99, 5)]
)
def test_the_token_that_crosses_p_stays_and_ties_stay_together(p, kept):
    row = np.full(V, -INF, np.float32)
    row[[4, 1, 8, 2, 3]] = np.log([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])

    out = top_p(each(row, len(PS)), np.full(len(PS), p, np.float32))

    assert set(np.isfinite(out).sum(axis=1).tolist()) == {kept}


def test_top_p_counts_only_what_top_k_left():
    row = np.full(V, -INF, np.float32)
    row[:4] = np.log([0.4, 0.3, 0.2, 0.1])
    rows = each(row, V + 5)

    left = top_k(rows, np.full(V + 5, 2, np.int32))[: len(PS)]
    out = top_p(left, np.full(len(PS), 0.55, np.float32))

    # Of the two that are left the first has 4/7, more than p; of all four it has 0.4.
    assert np.isfinite(out).sum(axis=1).tolist() == [1] * len(PS)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(
        np.float32,
        (6, 9),
        elements=st.one_of(
            st.floats(-20, 20, width=32, allow_subnormal=False),
            st.sampled_from([-INF, -1.0, 0.0, 1.0, 2.0]),
        ),
    ),
    hnp.arrays(np.float32, 6, elements=st.floats(2**-20, 1, width=32, allow_subnormal=False)),
)
def test_top_p_is_the_threshold_of_a_sort(rows, ps):
    rows[:, 0] = np.maximum(rows[:, 0], -20)  # a row always has a possible token

    out = np.asarray(top_p(rows, ps))

    for row, p, kept in zip(rows, ps, out, strict=True):
        if is_clear_cut(row, p):
            np.testing.assert_array_equal(kept, oracle.top_p(row, p))


# -------------------------------------------------------------------- min-p


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.2, 0.5, 0.9])
def test_min_p_drops_what_is_less_than_p_times_as_likely_as_the_best(row, p):
    out = np.asarray(min_p(each(row, 1), np.full(1, p, np.float32)))[0]

    distance = np.abs(row - (np.float64(row.max()) + np.log(p)))
    sure = (distance == 0) | (distance > 1e-5)
    np.testing.assert_array_equal(out[sure], oracle.min_p(row, p)[sure])


def test_min_p_of_zero_drops_none(row):
    np.testing.assert_array_equal(min_p(each(row, 1), np.zeros(1, np.float32))[0], row)


def test_min_p_of_one_keeps_the_best_alone(row):
    out = np.asarray(min_p(each(row, 1), np.ones(1, np.float32)))

    np.testing.assert_array_equal(np.isfinite(out[0]), row == row.max())


# -------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("drop", "amounts"),
    [
        (top_k, np.array([1, 3, 7, 100], np.int32)),
        (top_p, np.array([0.1, 0.5, 0.9, 1], np.float32)),
        (min_p, np.array([0, 0.1, 0.5, 1], np.float32)),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_each_row_has_its_own_threshold(drop, amounts):
    rows = RNG.normal(size=(4, V)).astype(np.float32)

    together = np.asarray(drop(rows, amounts))

    for i in range(4):
        np.testing.assert_array_equal(drop(rows[[i] * 4], amounts[[i] * 4])[0], together[i])
