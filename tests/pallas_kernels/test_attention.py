"""Every implementation of attention equals the reference, over pages full of NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.pallas_kernels.attention import AttentionSpec, DenseAttend, Tuning
from jaxllm.pallas_kernels.attention.reference import attend_sequence
from jaxllm.pallas_kernels.attention.spec import AT_ONCE, IN_PARTS, TUNING
from tests import attention
from tests.attention import Sizes

PAGE_SIZE = 4
BLOCK_Q = 4
NUM_KV_HEADS, HEAD_DIM = 2, 8

SPECS = {
    "plain": AttentionSpec(scale=HEAD_DIM**-0.5),
    "scaled": AttentionSpec(scale=0.7),
    "window": AttentionSpec(scale=HEAD_DIM**-0.5, window=5),
    "window of one": AttentionSpec(scale=HEAD_DIM**-0.5, window=1),
    "softcap": AttentionSpec(scale=1.0, softcap=2.0),
    "all": AttentionSpec(scale=0.5, window=7, softcap=3.0),
}

# (tokens before the step, tokens in it) of each row: decodes first, then chunks.
STEPS = {
    "decodes": [(0, 1), (3, 1), (4, 1), (17, 1)],
    "chunks": [(0, 3), (0, 4), (2, 9), (16, 5)],
    "mixed": [(6, 1), (15, 1), (0, 11), (5, 2)],
    "one": [(12, 1)],
}

ONE_ROW_AT_A_TIME = Tuning(
    orders=IN_PARTS,
    gather_bytes=1,
    dynamic_trips=True,
    score_bytes=0,
    keys_at_once=2 * PAGE_SIZE,
    upcast=True,
)
# With two of 4 x 6 x 32 scores at once, so that a group has blocks of two rows, or an unused one.
TWO_BLOCKS_AT_ONCE = dataclasses.replace(
    ONE_ROW_AT_A_TIME,
    score_bytes=2 * BLOCK_Q * 6 * 32 * 4 + 1,
    keys_at_once=0,
    orders=AT_ONCE,
)
A_PAGE_AT_A_TIME = dataclasses.replace(TWO_BLOCKS_AT_ONCE, keys_at_once=1, orders=IN_PARTS)
TWO_ROWS_IN_PARTS = dataclasses.replace(
    A_PAGE_AT_A_TIME, gather_bytes=2 * PAGE_SIZE * NUM_KV_HEADS * HEAD_DIM * 4
)
TUNINGS = {
    **TUNING,
    "small groups": ONE_ROW_AT_A_TIME,
    "small groups, no loop": dataclasses.replace(ONE_ROW_AT_A_TIME, unrolled_groups=8),
    "two blocks": TWO_BLOCKS_AT_ONCE,
    "two blocks in parts": A_PAGE_AT_A_TIME,
    "two rows in parts": TWO_ROWS_IN_PARTS,
}


def make_case(rows, spec, tuning, group=3):
    sizes = Sizes(NUM_KV_HEADS, group, HEAD_DIM, PAGE_SIZE)
    return attention.make_case(rows, spec, tuning, sizes, block_q=BLOCK_Q, padded=32, width=8)


def attend_with(case, spec, dtype=jnp.float32):
    arrays = [jnp.asarray(x, dtype) for x in (case.q, case.k, case.v)]
    caches = tuple(jnp.asarray(c, dtype) for c in case.caches)
    call = jax.jit(lambda attend, q, k, v, c: attend(q, k, v, c, spec))
    out, written = call(case.attend, *arrays, caches)
    return np.asarray(out, np.float64), written


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("step", STEPS)
def test_every_kind_of_step(step, tuning):
    spec = SPECS["all"]
    case = make_case(STEPS[step], spec, TUNINGS[tuning])

    out, _ = attend_with(case, spec)

    want = case.expected[: case.num_tokens]
    np.testing.assert_allclose(out[: case.num_tokens], want, atol=1e-5)


@pytest.mark.parametrize("tuning", ["cpu", "two rows in parts"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_option(spec, tuning):
    case = make_case(STEPS["mixed"], SPECS[spec], TUNINGS[tuning])

    out, _ = attend_with(case, SPECS[spec])

    want = case.expected[: case.num_tokens]
    np.testing.assert_allclose(out[: case.num_tokens], want, atol=1e-5)


@pytest.mark.parametrize("tuning", TUNING)
@pytest.mark.parametrize("group", [1, 2, 5])
def test_every_number_of_heads_in_a_group(group, tuning):
    case = make_case(STEPS["mixed"], SPECS["plain"], TUNING[tuning], group)

    out, _ = attend_with(case, SPECS["plain"])

    want = case.expected[: case.num_tokens]
    np.testing.assert_allclose(out[: case.num_tokens], want, atol=1e-5)


def test_each_way_wants_the_orders_that_it_reads():
    with pytest.raises(ValueError, match="keys_at_once=64 is for orders KPDS, KPSD: PSKD, PSKD"):
        dataclasses.replace(TUNING["gpu"], keys_at_once=64)
    with pytest.raises(ValueError, match="keys_at_once=0 is for orders PSKD, PSKD: KPDS, KPSD"):
        dataclasses.replace(TUNING["cpu"], keys_at_once=0)
    with pytest.raises(ValueError, match="a kernel is for orders PKDS, PKSD: KPDS, KPSD"):
        dataclasses.replace(TUNING["cpu"], target="a kernel")


def test_bfloat16_is_close():
    case = make_case(STEPS["mixed"], SPECS["plain"], TUNING["cpu"])

    out, _ = attend_with(case, SPECS["plain"], jnp.bfloat16)

    np.testing.assert_allclose(out[: case.num_tokens], case.expected[: case.num_tokens], atol=0.05)


@pytest.mark.parametrize("tuning", TUNING)
def test_padding_writes_to_the_trash_page_only(tuning):
    case = make_case(STEPS["mixed"], SPECS["plain"], TUNING[tuning])

    _, written = attend_with(case, SPECS["plain"])

    for held, pages, order in zip(case.caches, written, TUNING[tuning].orders, strict=True):
        back = [order.index(axis) for axis in "PSKD"]
        num_slots = held.shape[order.index("P")] * PAGE_SIZE
        before = held.transpose(back).reshape(num_slots, -1)
        after = np.asarray(pages).transpose(back).reshape(num_slots, -1)
        changed = np.flatnonzero(
            (after != before.astype(np.float32)).any(1) & ~np.isnan(after).any(1)
        )
        slots = np.asarray(case.attend.slot_mapping)
        assert set(changed) == set(slots)


def test_dense_segments_equal_the_reference():
    rng = np.random.default_rng(0)
    sizes = [3, 1, 9]
    q = rng.normal(size=(sum(sizes), 6, HEAD_DIM))
    k, v = rng.normal(size=(2, sum(sizes), NUM_KV_HEADS, HEAD_DIM))
    spec = SPECS["all"]
    segments = np.repeat(np.arange(3, dtype=np.int32), sizes)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    attend = DenseAttend(jnp.asarray(positions), jnp.asarray(segments))

    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out, cache = jax.jit(lambda a, q, k, v: a(q, k, v, None, spec))(attend, *arrays)

    want = [
        attend_sequence(q[segments == i], k[segments == i], v[segments == i], spec)
        for i in range(3)
    ]
    np.testing.assert_allclose(np.asarray(out), np.concatenate(want), atol=1e-5)
    assert cache is None


def test_operands_that_do_not_fit_are_refused():
    case = make_case(STEPS["one"], SPECS["plain"], TUNING["gpu"])
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v))
    caches = tuple(jnp.asarray(c, jnp.float32) for c in case.caches)

    with pytest.raises(ValueError, match="needs a cache; use DenseAttend"):
        case.attend(q, k, v, None, SPECS["plain"])
    with pytest.raises(ValueError, match=r"do not fit: need \[T, H, D\], \[T, K, D\]"):
        case.attend(q, k[:, :, :4], v, caches, SPECS["plain"])
    with pytest.raises(ValueError, match="as PSKD does not fit k"):
        case.attend(q, k[:, :1], v[:, :1], caches, SPECS["plain"])
    with pytest.raises(ValueError, match=r"slot_mapping \(32,\) is not \[T=8\]"):
        case.attend(q[:8], k[:8], v[:8], caches, SPECS["plain"])
