"""The compiled kernel equals the reference, whatever the sizes; pages in use by nobody are NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.modeling.layers.rope import rotate
from jaxllm.native import build
from jaxllm.pallas_kernels.attention import (
    AttentionSpec,
    PagedAttend,
    compiled_tuning_for,
    tuning_for,
)
from tests import attention
from tests.attention import Sizes

BLOCK_Q = 64

# (tokens before the step, tokens in it) of each row: decodes first, then chunks. The sizes cross
# the kernel's parts of 32 and 64 keys, its units of 96 rows of queries, and its tiles of 6.
STEP = [(0, 1), (31, 1), (64, 1), (191, 1), (0, 130), (70, 64), (127, 3), (5, 66)]

SIZES = {
    "as a page lies": Sizes(3, 3, 64, 32),
    "a page of 64": Sizes(3, 3, 64, 64),
    "two parts in a page": Sizes(2, 1, 64, 128),
    "few rows and many as they lie": Sizes(2, 8, 64, 32),
    "a part in two pages": Sizes(1, 17, 64, 32),
    "pages shorter than a part": Sizes(2, 4, 64, 16),
    "pages of one": Sizes(1, 2, 32, 1),
    "head of 80": Sizes(2, 2, 80, 64),
    "head of 20": Sizes(1, 5, 20, 64),
    "head of 7, small pages": Sizes(2, 7, 7, 8),
    "head of 256, many queries": Sizes(1, 16, 256, 64),
    "more queries than a unit": Sizes(1, 100, 8, 64),
}
AS_IT_LIES = SIZES["as a page lies"]

SPECS = {
    "plain": {},
    "window": {"window": 70},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "all": {"window": 3, "softcap": 20.0},
}


def make_case(sizes, spec, dtype=np.float32, step=STEP):
    """Padding is NaN too: what the kernel reads of it would show."""
    num_tokens = sum(new for _, new in step)
    tuning = compiled_tuning_for("cpu", 1, dtype)
    width = max(-(-(before + new) // sizes.page_size) for before, new in step) + 1
    case = attention.make_case(
        step, spec, tuning, sizes, dtype, block_q=BLOCK_Q, padded=num_tokens + 9, width=width
    )
    for array in (case.q, case.k, case.v):
        array[num_tokens:] = np.nan
    return case


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
    spec = AttentionSpec(scale=SIZES[sizes].head_dim ** -0.5, **SPECS[name])
    case = make_case(SIZES[sizes], spec)

    out, _ = run(case, spec)

    np.testing.assert_allclose(out, case.expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_16_bit_operands_are_rounded_once(sizes, dtype):
    """Results are; and where bfloat16 has tiles, so are the probabilities."""
    spec = AttentionSpec(scale=SIZES[sizes].head_dim ** -0.5)
    case = make_case(SIZES[sizes], spec, dtype)

    out, _ = run(case, spec)

    assert_rounded_once(out, case, dtype)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "sizes", ["as a page lies", "a part in two pages", "two parts in a page", "head of 80"]
)
def test_every_option_in_bfloat16(sizes, name):
    """Where the processor has tiles, these are of them."""
    spec = AttentionSpec(scale=SIZES[sizes].head_dim ** -0.5, **SPECS[name])
    case = make_case(SIZES[sizes], spec, ml_dtypes.bfloat16)

    out, _ = run(case, spec)

    assert_rounded_once(out, case, ml_dtypes.bfloat16)


def assert_rounded_once(out, case, dtype):
    half_a_step = float(ml_dtypes.finfo(dtype).eps) / 2
    rounded = np.abs(case.expected) + (case.terms if dtype is ml_dtypes.bfloat16 else 0)
    error = np.abs(out.astype(np.float64) - case.expected)
    assert (error <= 1.01 * half_a_step * rounded + 1e-5).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_writes_the_tokens_of_the_step_and_nothing_else(sizes, dtype):
    spec = AttentionSpec(scale=SIZES[sizes].head_dim ** -0.5)
    case = make_case(SIZES[sizes], spec, dtype)

    _, written = run(case, spec)

    for held, wanted in zip(written, case.written, strict=True):
        np.testing.assert_array_equal(held, np.asarray(stored(wanted)))


def run_fused(case, spec, rope):
    """Queries, keys and values as one product gives them."""
    call = jax.jit(lambda attend, qkv, c: attend.fused(qkv, rope, c, spec), donate_argnums=2)
    num_tokens, num_kv_heads, head_dim = case.k.shape
    queries = case.q.reshape(num_tokens, num_kv_heads, -1, head_dim)
    qkv = np.concatenate([queries, case.k[:, :, None], case.v[:, :, None]], axis=2)
    out, written = call(case.attend, jnp.asarray(qkv), tuple(map(stored, case.caches)))
    return np.asarray(out), tuple(map(np.asarray, written))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_heads_are_read_where_they_lie(sizes, dtype):
    spec = AttentionSpec(scale=SIZES[sizes].head_dim ** -0.5)
    case = make_case(SIZES[sizes], spec, dtype)

    fused, written = run_fused(case, spec, None)

    out, written_apart = run(case, spec)
    np.testing.assert_array_equal(fused, out)
    for held, apart in zip(written, written_apart, strict=True):
        np.testing.assert_array_equal(held, apart)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("part", [1, 0.4])
@pytest.mark.parametrize(
    "sizes", ["as a page lies", "pages shorter than a part", "head of 80", "head of 20"]
)
def test_fused_heads_are_rotated_and_rounded(sizes, part, dtype):
    head_dim = SIZES[sizes].head_dim
    spec = AttentionSpec(scale=head_dim**-0.5)
    case = make_case(SIZES[sizes], spec, dtype)
    angles = np.outer(np.arange(len(case.q)), 0.9 ** np.arange(int(part * head_dim) // 2))
    rope = jnp.cos(jnp.asarray(angles, "float32")), jnp.sin(jnp.asarray(angles, "float32"))

    fused, written = run_fused(case, spec, rope)

    case.q, case.k = (np.asarray(jax.jit(rotate)(jnp.asarray(x), *rope)) for x in (case.q, case.k))
    out, written_apart = run(case, spec)
    step = float(ml_dtypes.finfo(dtype).eps)
    for mine, other in zip((fused, *written), (out, *written_apart), strict=True):
        mine, other = (numbers(x, dtype) for x in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=2 * step, atol=8 * step)


def numbers(array, dtype):
    """What an array holds, of which the bits may be in integers."""
    return (array.view(dtype) if array.dtype == np.uint16 else array).astype(np.float64)


def test_fused_heads_are_for_the_kernel_alone():
    spec = AttentionSpec(scale=0.3)
    case = make_case(AS_IT_LIES, spec)
    case.attend = dataclasses.replace(case.attend, tuning=tuning_for("cpu"))

    assert not case.attend.takes_fused
    with pytest.raises(ValueError, match="for a compiled kernel's cache"):
        run_fused(case, spec, None)


@pytest.mark.parametrize("reader", [0, 1])
def test_a_row_sees_keys_that_another_writes_in_the_same_step(reader):
    """Prefixes are shared as soon as they are planned: by a row of one token, and by a chunk."""
    spec = AttentionSpec(scale=0.3)
    step = [[(64, 1), (0, 64)], [(63, 1), (64, 3)]][reader]
    case = make_case(AS_IT_LIES, spec, step=step)
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
    case = make_case(AS_IT_LIES, spec, step=STEP[:4])
    lens = case.attend.kv_lens.at[1].set(0)
    case.attend = dataclasses.replace(case.attend, kv_lens=lens, blocks=None)
    case.expected[1] = 0

    out, written = run(case, spec)

    np.testing.assert_allclose(out, case.expected, atol=2e-6, rtol=2e-5)
    page = int(case.attend.page_table[1, 0])
    np.testing.assert_array_equal(written[0][page], case.caches[0][page])


def test_nan_of_the_model_stays_nan():
    spec = AttentionSpec(scale=0.3)
    case = make_case(AS_IT_LIES, spec)
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
    zeros, pages = jnp.zeros((rows, 1, 64), dtype), jnp.zeros((rows + 1, 1, 64, 64), jnp.uint16)
    spec = AttentionSpec(scale=1.0)

    out, _ = jax.jit(lambda attend, v: attend(zeros, zeros, v, (pages, pages), spec))(
        attend, jnp.asarray(numbers)
    )

    np.testing.assert_array_equal(np.asarray(out)[usual], numbers[usual])
    assert np.isnan(np.asarray(out)[np.isnan(wide)].astype(np.float32)).all()


def test_the_cache_is_written_in_place_where_it_is_donated():
    spec = AttentionSpec(scale=0.3)
    case = make_case(AS_IT_LIES, spec)
    arrays = [jnp.asarray(x) for x in (case.q, case.k, case.v)]
    caches = tuple(map(stored, case.caches))
    places = [cache.unsafe_buffer_pointer() for cache in caches]
    call = jax.jit(lambda attend, q, k, v, c: attend(q, k, v, c, spec), donate_argnums=4)

    _, written = call(case.attend, *arrays, caches)

    assert [held.unsafe_buffer_pointer() for held in written] == places


def test_operands_of_different_types_are_refused():
    spec = AttentionSpec(scale=0.3)
    case = make_case(AS_IT_LIES, spec)
    case.q = case.q.astype(ml_dtypes.bfloat16)

    with pytest.raises(ValueError, match="need one"):
        run(case, spec)


def test_there_is_a_compiler_here():
    """All of the above, and most other tests, are of the compiled kernel."""
    assert build.unavailable("float32") is None
