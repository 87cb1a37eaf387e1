"""The compiled product with weights, beside NumPy's in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.modeling.layers.embedding import Embedding
from jaxllm.native.build import target, unavailable
from jaxllm.pallas_kernels.linear import linear

DTYPES = ("float32", "bfloat16", "float16")

pytestmark = pytest.mark.skipif(bool(unavailable("float32")), reason="no C++ compiler here")

# Tokens, inputs and outputs: one, and both sides of what the kernel takes together: 8, 16, 32,
# 48 and 64 tokens, 16, 32, 192 and 256 inputs, 32, 48 and 64 outputs.
TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 48, 50, 64, 65, 95, 130)
SIZES = (
    (1, 1),
    (7, 3),
    (16, 16),
    (32, 48),
    (33, 50),
    (40, 64),
    (96, 130),
    (64, 1000),
    (200, 40),
    (448, 70),
)

TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}


def numbers(shape, dtype, seed):
    """Random numbers of a type."""
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, dtype)


@functools.cache
def compiled(dtype, result, has_bias):
    """The kernel, jitted; it is a function of shapes."""

    def run(x, weight, bias):
        return linear(x, weight, bias if has_bias else None, result, target("linear", dtype))

    return jax.jit(run)


@functools.cache
def compiled_of_some(dtype):
    """The kernel, told how many tokens to compute; jitted."""

    def run(x, weight, bias, num_tokens):
        return linear(x, weight, bias, dtype, target("linear", dtype), num_tokens=num_tokens)

    return jax.jit(run)


def exact(x, weight, bias=0.0):
    """The product in float64, and the sum of sizes that bounds its rounding."""
    x, weight, bias = (np.asarray(a, np.float64) for a in (x, weight, bias))
    return x @ weight.T + bias, np.abs(x) @ np.abs(weight).T + np.abs(bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "num_outputs"), SIZES)
def test_products_of_all_sizes(depth, num_outputs, dtype):
    weight, bias = numbers((num_outputs, depth), dtype, 1), numbers((num_outputs,), dtype, 2)
    for num_tokens in TOKENS:
        x = numbers((num_tokens, depth), dtype, num_tokens)

        y = compiled(dtype, "float32", True)(x, weight, bias)

        want, size = exact(x, weight, bias)
        assert y.shape == want.shape
        assert y.dtype == jnp.float32
        assert np.all(np.abs(np.asarray(y) - want) <= 2e-6 * size), num_tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_results_are_rounded_once_to_the_type_of_the_tokens(num_tokens, dtype):
    x, weight = numbers((num_tokens, 96), dtype, 3), numbers((70, 96), dtype, 4)

    y = compiled(dtype, dtype, False)(x, weight, None)
    unrounded = compiled(dtype, "float32", False)(x, weight, None)

    assert y.dtype == dtype
    assert np.array_equal(np.asarray(y), np.asarray(unrounded.astype(dtype)))
    want, size = exact(x, weight)
    assert np.all(np.abs(np.asarray(y, np.float64) - want) <= TOLERANCE[dtype] * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_are_divided_into_blocks(dtype):
    x, weight = numbers((3000, 512), dtype, 5), numbers((65, 512), dtype, 6)

    y = compiled(dtype, "float32", False)(x, weight, None)

    want, size = exact(x, weight)
    assert np.all(np.abs(np.asarray(y) - want) <= 2e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [37, 64])
@pytest.mark.parametrize("num_tokens", [4, 50])
def test_what_is_not_a_number_stays_in_its_row_and_column(num_tokens, depth, dtype):
    x = np.array(numbers((num_tokens, depth), dtype, 7))
    weight = np.array(numbers((70, depth), dtype, 8))
    x[2, depth - 1], weight[69, 0], weight[5, depth - 1] = np.nan, np.inf, np.nan

    y = np.asarray(compiled(dtype, "float32", False)(jnp.asarray(x), jnp.asarray(weight), None))

    bad = np.zeros(y.shape, bool)
    bad[2], bad[:, 69], bad[:, 5] = True, True, True
    assert np.array_equal(~np.isfinite(y), bad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_thread_packed_for_one_call_serves_no_other(dtype):
    weight = numbers((64, 32), dtype, 9)
    run = compiled(dtype, "float32", False)
    for seed in range(20):  # the same buffers, as likely as not
        x = numbers((20, 32), dtype, seed)
        want, size = exact(x, weight)
        assert np.all(np.abs(np.asarray(run(x, weight, None)) - want) <= 2e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outputs", [48, 70])
@pytest.mark.parametrize("num_tokens", [2, 8, 9, 64, 65, 130])
def test_what_products_are_added_to_is_a_sum_of_rounded_ones(num_tokens, num_outputs, dtype):
    weight, bias = numbers((num_outputs, 64), dtype, 1), numbers((num_outputs,), dtype, 2)
    x, onto = numbers((num_tokens, 64), dtype, 3), numbers((num_tokens, num_outputs), dtype, 4)

    def run(x, weight, bias, onto):
        return linear(
            x, weight, bias, dtype, target("linear", dtype), onto, np.int32(num_tokens - 1)
        )

    y = jax.jit(run)(x, weight, bias, onto)

    product = compiled(dtype, dtype, True)(x[:-1], weight, bias)
    assert np.array_equal(np.asarray(y[:-1]), np.asarray(onto[:-1] + product))
    assert not np.asarray(y[-1]).any()


def test_products_are_added_to_their_own_type_alone():
    x, onto = numbers((4, 16), "bfloat16", 1), numbers((4, 4), "float32", 2)

    def run(x, onto):
        return linear(x, x, None, "bfloat16", target("linear", "bfloat16"), onto)

    with pytest.raises(jax.errors.JaxRuntimeError, match="added to another type than theirs"):
        jax.jit(run)(x, onto).block_until_ready()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [33, 64])
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9, 64, 65, 129, 130])
def test_padding_is_zeros_and_not_read(num_tokens, depth, dtype):
    weight, bias = numbers((70, depth), dtype, 1), numbers((70,), dtype, 2)
    x = numbers((130, depth), dtype, 3).at[num_tokens:].set(jnp.nan)

    y = compiled_of_some(dtype)(x, weight, bias, np.int32(num_tokens))

    alone = compiled(dtype, dtype, True)(x[:num_tokens], weight, bias)
    assert np.array_equal(np.asarray(y[:num_tokens]), np.asarray(alone))
    assert not np.asarray(y[num_tokens:]).any()


def test_of_more_tokens_than_there_are_all_are_computed():
    x, weight, bias = (numbers(shape, "float32", 1) for shape in ((9, 32), (16, 32), (16,)))

    y = compiled_of_some("float32")(x, weight, bias, np.int32(1000))

    assert np.array_equal(y, compiled("float32", "float32", True)(x, weight, bias))


def test_large_padding_is_shared_among_threads():
    x, weight = numbers((5000, 32), "float32", 1), numbers((64, 32), "float32", 2)

    y = compiled_of_some("float32")(x, weight, weight[:, 0], np.int32(10))

    assert np.asarray(y[:10]).all()
    assert not np.asarray(y[10:]).any()


def test_logits_are_float32_of_the_kernel_too():
    table = Embedding(50, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    rows = numbers((7, 24), "bfloat16", 3)
    plain = nnx.jit(Embedding.logits)(table, rows)

    table.kernel = target("linear", "bfloat16")

    logits = nnx.jit(Embedding.logits)(table, rows)
    assert logits.dtype == plain.dtype == jnp.float32
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)
