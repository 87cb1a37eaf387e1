"""The compiled kernel equals the reference, whatever the sizes; pages in use by nobody are NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.native import build
from jaxllm.pallas_kernels.attention import (
    AttentionSpec,
    PagedAttend,
    QueryBlocks,
    compiled_tuning_for,
)
from jaxllm.pallas_kernels.attention.reference import attend_sequence

BLOCK_Q = 64

# (tokens before the step, tokens in it) of each row: decodes first, then chunks. The sizes cross
# the kernel's parts of 64 keys, its units of 96 rows of queries, and its tiles of 6.
STEP = [(0, 1), (63, 1), (64, 1), (200, 1), (0, 130), (70, 64), (127, 3), (5, 66)]

SIZES = {
    "as a page lies": (3, 3, 64, 64),
    "two parts in a page": (2, 1, 64, 128),
    "pages shorter than a part": (2, 4, 64, 16),
    "pages of one": (1, 2, 32, 1),
    "head of 80": (2, 2, 80, 64),
    "head of 20": (1, 5, 20, 64),
    "head of 7, small pages": (2, 7, 7, 8),
    "head of 256, many queries": (1, 16, 256, 64),
    "more queries than a unit": (1, 100, 8, 64),
}
"""KV heads, query heads of each, head size, slots of a page."""

SPECS = {
    "plain": {},
    "window": {"window": 70},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "all": {"window": 3, "softcap": 20.0},
}


@dataclasses.dataclass
class Case:
    attend: PagedAttend
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    caches: tuple
    written: tuple
    expected: np.ndarray
    terms: np.ndarray
    """What the expected numbers are sums of, each term without its sign."""


def make_case(sizes, spec, dtype, step=STEP, decode_only=False, seed=0):
    num_kv_heads, group, head_dim, page_size = sizes
    rng = np.random.default_rng(seed)
    num_rows, num_tokens = 8, sum(new for _, new in step)
    padded = num_tokens + 9
    width = max(-(-(before + new) // page_size) for before, new in step) + 1
    num_pages = sum(-(-(before + new) // page_size) for before, new in step) + 3

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    q = draw(padded, num_kv_heads * group, head_dim)
    k, v = draw(padded, num_kv_heads, head_dim), draw(padded, num_kv_heads, head_dim)
    q[num_tokens:], k[num_tokens:], v[num_tokens:] = np.nan, np.nan, np.nan
    pages = [
        np.full((num_pages, page_size, num_kv_heads, head_dim), np.nan, dtype) for _ in range(2)
    ]
    after = [page.copy() for page in pages]
    table = np.zeros((num_rows, width), np.int32)
    lens, slots = np.zeros(num_rows, np.int32), np.zeros(padded, np.int32)
    positions = np.zeros(padded, np.int32)
    expected, terms = np.zeros(q.shape), np.zeros(q.shape)
    free, blocks, at = list(rng.permutation(np.arange(1, num_pages))), [], 0
    for row, (before, new) in enumerate(step):
        total = before + new
        mine, own = slice(at, at + new), [free.pop() for _ in range(-(-total // page_size))]
        table[row, : len(own)], lens[row] = own, total
        where = np.array([own[p // page_size] * page_size + p % page_size for p in range(total)])
        old = [draw(before, num_kv_heads, head_dim) for _ in range(2)]
        for held, later, kept, added in zip(pages, after, old, (k, v), strict=True):
            held.reshape(-1, num_kv_heads, head_dim)[where[:before]] = kept
            later.reshape(-1, num_kv_heads, head_dim)[where] = np.concatenate([kept, added[mine]])
        slots[mine], positions[mine] = where[before:], np.arange(before, total)
        keys, values = (
            np.concatenate([kept, added[mine]]).astype(np.float64)
            for kept, added in zip(old, (k, v), strict=True)
        )
        queries = q[mine].astype(np.float64)
        expected[mine] = attend_sequence(queries, keys, values, spec)
        terms[mine] = attend_sequence(queries, keys, np.abs(values), spec)
        if new > 1:
            blocks += [(row, start) for start in range(at, at + new, BLOCK_Q)]
        at += new
    unused = [(0, padded)] * 2
    block_rows, starts = np.array(blocks + unused, np.int32).T
    attend = PagedAttend(
        slot_mapping=jnp.asarray(slots),
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray(lens),
        num_decodes=jnp.int32(sum(new == 1 for _, new in step)),
        blocks=None
        if decode_only
        else QueryBlocks(
            jnp.asarray(block_rows),
            jnp.asarray(starts),
            jnp.asarray(positions),
            jnp.int32(len(blocks)),
        ),
        tuning=compiled_tuning_for("cpu", 1, dtype),
        decode_rows=num_rows,
        block_q=BLOCK_Q,
    )
    orders = ((2, 0, 3, 1), (2, 0, 1, 3))  # KPDS, KPSD
    caches, written = (
        tuple(x.transpose(order) for x, order in zip(xs, orders, strict=True))
        for xs in (pages, after)
    )
    return Case(attend, q, k, v, caches, written, expected, terms)


def stored(array):
    """As the cache of a CPU holds it."""
    return jnp.asarray(array if array.dtype.itemsize == 4 else array.view(np.uint16))


def run(case, spec):
    call = jax.jit(lambda attend, q, k, v, c: attend(q, k, v, c, spec), donate_argnums=4)
    arrays = [jnp.asarray(x) for x in (case.q, case.k, case.v)]
    out, written = call(case.attend, *arrays, tuple(map(stored, case.caches)))
    return np.asarray(out), tuple(map(np.asarray, written))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_reference(sizes, name):
    spec = AttentionSpec(scale=SIZES[sizes][2] ** -0.5, **SPECS[name])
    case = make_case(SIZES[sizes], spec, np.dtype(np.float32))

    out, _ = run(case, spec)

    np.testing.assert_allclose(out, case.expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_16_bit_operands_are_rounded_once(sizes, dtype):
    """Results are; and where bfloat16 has tiles, so are the probabilities."""
    spec = AttentionSpec(scale=SIZES[sizes][2] ** -0.5)
    case = make_case(SIZES[sizes], spec, np.dtype(dtype))

    out, _ = run(case, spec)

    half_a_step = float(ml_dtypes.finfo(dtype).eps) / 2
    rounded = np.abs(case.expected) + (case.terms if dtype is ml_dtypes.bfloat16 else 0)
    error = np.abs(out.astype(np.float64) - case.expected)
    assert (error <= 1.01 * half_a_step * rounded + 1e-5).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_writes_the_tokens_of_the_step_and_nothing_else(sizes, dtype):
    spec = AttentionSpec(scale=SIZES[sizes][2] ** -0.5)
    case = make_case(SIZES[sizes], spec, np.dtype(dtype))

    _, written = run(case, spec)

    for held, wanted in zip(written, case.written, strict=True):
        np.testing.assert_array_equal(held, np.asarray(stored(wanted)))


@pytest.mark.parametrize("reader", [0, 1])
def test_a_row_sees_keys_that_another_writes_in_the_same_step(reader):
    """Prefixes are shared as soon as they are planned: by a row of one token, and by a chunk."""
    spec = AttentionSpec(scale=0.3)
    step = [[(64, 1), (0, 64)], [(63, 1), (64, 3)]][reader]
    case = make_case(SIZES["as a page lies"], spec, np.dtype(np.float32), step)
    table = np.array(case.attend.page_table)
    writer = 1 - reader
    table[reader, 0] = table[writer, 0]  # whose last key is of this step
    case.attend = dataclasses.replace(case.attend, page_table=jnp.asarray(table))

    shared, _ = run(case, spec)
    case.caches = case.written
    written_before, _ = run(case, spec)

    np.testing.assert_array_equal(shared, written_before)


def test_rows_that_have_ended_give_zeros():
    spec = AttentionSpec(scale=0.3)
    case = make_case(SIZES["as a page lies"], spec, np.dtype(np.float32), STEP[:4], True)
    lens = case.attend.kv_lens.at[1].set(0)
    case.attend = dataclasses.replace(case.attend, kv_lens=lens)
    case.expected[1] = 0

    out, written = run(case, spec)

    np.testing.assert_allclose(out, case.expected, atol=2e-6, rtol=2e-5)
    page = int(case.attend.page_table[1, 0])
    np.testing.assert_array_equal(written[0][:, page], case.caches[0][:, page])


def test_nan_of_the_model_stays_nan():
    spec = AttentionSpec(scale=0.3)
    case = make_case(SIZES["as a page lies"], spec, np.dtype(np.float32))
    case.q[5, 1, 3] = np.nan
    case.v[1, 0, 7] = np.nan

    out, _ = run(case, spec)

    assert np.isnan(out[5, 1]).all()
    assert np.isnan(out[1, :3, 7]).all()  # of the group of KV head 0
    rest = np.isfinite(out)
    assert rest.sum() == out.size - out.shape[2] - 3


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_16_bit_number_is_read_and_written_as_it_is(dtype):
    """Of one key alone, the result is its value."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(1024, 1, 64)
    wide = numbers.view(np.uint16).astype(np.uint32)
    wide = (wide << 16).view(np.float32) if dtype is ml_dtypes.bfloat16 else numbers.astype("f4")
    usual = np.abs(wide) >= np.finfo(np.float32).tiny  # others may be taken for zero
    rows = len(numbers)
    attend = PagedAttend(
        slot_mapping=jnp.arange(rows, dtype=jnp.int32) * 64 + 64,
        page_table=jnp.arange(rows, dtype=jnp.int32)[:, None] + 1,
        kv_lens=jnp.ones(rows, jnp.int32),
        num_decodes=jnp.int32(rows),
        blocks=None,
        tuning=compiled_tuning_for("cpu", 1, dtype),
        decode_rows=rows,
        block_q=BLOCK_Q,
    )
    zeros, pages = jnp.zeros((rows, 1, 64), dtype), jnp.zeros((1, rows + 1, 64, 64), jnp.uint16)
    spec = AttentionSpec(scale=1.0)

    out, _ = jax.jit(lambda attend, v: attend(zeros, zeros, v, (pages, pages), spec))(
        attend, jnp.asarray(numbers)
    )

    np.testing.assert_array_equal(np.asarray(out)[usual], numbers[usual])
    assert np.isnan(np.asarray(out)[np.isnan(wide)].astype(np.float32)).all()


def test_the_cache_is_written_in_place_where_it_is_donated():
    spec = AttentionSpec(scale=0.3)
    case = make_case(SIZES["as a page lies"], spec, np.dtype(np.float32))
    arrays = [jnp.asarray(x) for x in (case.q, case.k, case.v)]
    caches = tuple(map(stored, case.caches))
    places = [cache.unsafe_buffer_pointer() for cache in caches]
    call = jax.jit(lambda attend, q, k, v, c: attend(q, k, v, c, spec), donate_argnums=4)

    _, written = call(case.attend, *arrays, caches)

    assert [held.unsafe_buffer_pointer() for held in written] == places


def test_operands_of_different_types_are_refused():
    spec = AttentionSpec(scale=0.3)
    case = make_case(SIZES["as a page lies"], spec, np.dtype(np.float32))
    case.q = case.q.astype(ml_dtypes.bfloat16)

    with pytest.raises(ValueError, match="need one"):
        run(case, spec)


def test_there_is_a_compiler_here():
    """All of the above, and most other tests, are of the compiled kernel."""
    assert build.unavailable("float32") is None
