"""The compiled norms, beside NumPy's in float64 and the modules in plain XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.modeling.layers.norm import NORMS
from jaxllm.native.build import target, unavailable
from jaxllm.pallas_kernels.norm import NormSpec, compiled_norm

DTYPES = ("float32", "bfloat16", "float16")

pytestmark = pytest.mark.skipif(bool(unavailable("float32")), reason="no C++ compiler here")

# Both sides of vectors; rows for one thread, and for several.
SHAPES = ((1, 1), (3, 7), (5, 16), (2, 3, 17), (2, 31), (64, 64), (1, 4099), (700, 100))

STEP = {"float32": 2**-20, "bfloat16": 2**-8, "float16": 2**-11}
"""Half of the last digit of a 16-bit type; of float32, as much as a mean and a sum are off."""


def numbers(shape, dtype, seed, mean=0.0):
    """Random numbers of a type."""
    values = np.random.default_rng(seed).normal(mean, size=shape)
    return jnp.asarray(values, dtype)


@functools.cache
def compiled(dtype, has_scale, has_bias, **options):
    """The kernel, jitted; it is a function of shapes."""

    def run(x, scale, bias):
        scale, bias = scale if has_scale else None, bias if has_bias else None
        return compiled_norm(x, scale, bias, NormSpec(1e-5, **options), target("norm", dtype))

    return jax.jit(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_centered", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_all_sizes(shape, is_centered, dtype):
    x, scale = numbers(shape, dtype, 1, mean=2.0), numbers(shape[-1:], dtype, 2)
    bias = numbers(shape[-1:], dtype, 3)

    y = compiled(dtype, True, True, is_centered=is_centered, more=0.5)(x, scale, bias)

    wide = np.asarray(x, np.float64)
    wide = wide - is_centered * wide.mean(-1, keepdims=True)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    want = wide * (np.asarray(scale, np.float64) + 0.5) + np.asarray(bias, np.float64)
    size = np.abs(wide * (np.asarray(scale, np.float64) + 0.5)) + np.abs(want) + 1
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert np.all(np.abs(np.asarray(y, np.float64) - want) <= STEP[dtype] * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_scaled_is_rounded_before_where_that_is_asked_for(dtype):
    x, scale = numbers((9, 50), dtype, 4), numbers((50,), dtype, 5)

    y = compiled(dtype, True, False, rounded=True)(x, scale, x)
    first = compiled(dtype, False, False)(x, x, x)

    want = first * jnp.broadcast_to(scale, first.shape)
    assert np.array_equal(np.asarray(y), np.asarray(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 64])
def test_what_is_not_a_number_stays_in_its_row(size, dtype):
    x = np.array(numbers((4, size), dtype, 6))
    x[1, size - 1], x[2, 0] = np.nan, np.inf

    y = compiled(dtype, False, False, is_centered=True)(x, x, x)

    assert np.isfinite(np.asarray(y, np.float32)).all(-1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 6, 7])
@pytest.mark.parametrize("lead", [(7,), (7, 3)])
def test_padding_is_zeros_and_not_read(lead, num_tokens, dtype):
    x = numbers((*lead, 20), dtype, 8).at[num_tokens:].set(jnp.nan)

    def run(x, num_tokens):
        return compiled_norm(x, None, None, NormSpec(1e-5), target("norm", dtype), num_tokens)

    y = jax.jit(run)(x, np.int32(num_tokens))

    alone = compiled(dtype, False, False)(x, x, x)
    assert np.array_equal(np.asarray(y[:num_tokens]), np.asarray(alone[:num_tokens]))
    assert not np.asarray(y[num_tokens:]).any()


def test_numbers_of_another_type_than_the_kernel_s_are_an_error():
    x = numbers((4, 16), "float32", 7)

    with pytest.raises(jax.errors.JaxRuntimeError, match="of another type than its kernel's"):
        compiled("bfloat16", False, False)(x, x, x).block_until_ready()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_each_norm_of_a_model_is_that_of_plain_xla(kind, dtype):
    norm = NORMS[kind](48, eps=1e-6, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    for seed, (_, variable) in enumerate(nnx.iter_graph(norm)):
        if isinstance(variable, nnx.Param):
            variable[...] = numbers((48,), dtype, seed)
    x = numbers((2, 5, 48), dtype, 9, mean=1.0)
    plain = nnx.jit(type(norm).__call__)(norm, x)

    norm.kernel = target("norm", dtype)
    y = nnx.jit(type(norm).__call__)(norm, x)

    assert norm.kernel in str(jax.make_jaxpr(norm)(x))
    assert y.dtype == plain.dtype
    step = 4 * STEP[dtype]
    np.testing.assert_allclose(np.asarray(y, float), np.asarray(plain, float), rtol=step, atol=step)
