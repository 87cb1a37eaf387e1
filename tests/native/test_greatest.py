"""The compiled search for the greatest of each row, beside NumPy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sampler
from jaxllm.native.build import target, unavailable
from jaxllm.pallas_kernels.greatest import compiled_greatest

pytestmark = pytest.mark.skipif(bool(unavailable("float32")), reason="no C++ compiler here")

# One, and both sides of the vectors and of the blocks of 1,024 that the kernel takes together.
SIZES = (1, 3, 15, 16, 17, 640, 1023, 1024, 1025, 3000)

INF = np.float32(np.inf)


@functools.cache
def compiled():
    """The kernel, jitted; it is a function of shapes."""
    return jax.jit(lambda logits: compiled_greatest(logits, target("greatest", "float32")))


def rows_of(size):
    """Rows of all kinds: random, many equal, zeros of both signs, infinite, with NaN."""
    rng = np.random.default_rng(size)
    plain = rng.standard_normal((3, size), np.float32)
    few = rng.integers(0, 3, (3, size)).astype(np.float32)
    zeros = np.where(rng.random((1, size)) < 0.5, np.float32(0), np.float32(-0.0))
    nothing = np.full((1, size), -INF, np.float32)
    above, below, broken = plain.copy(), plain.copy(), np.concatenate([plain, nothing, plain])
    above[:, -1], below[:, 0] = INF, -INF
    for i, row in enumerate(broken):  # the first NaN is the greatest, whatever its sign
        row[[i * (size - 1) // 6, size - 1]] = np.copysign(np.nan, (-1) ** i)
    return np.concatenate([plain, few, -few, zeros, nothing, above, below, broken])


@pytest.mark.parametrize("size", SIZES)
def test_it_is_found_as_numpy_finds_it(size):
    logits = rows_of(size)

    tokens, finite = compiled()(logits)

    assert tokens.tolist() == np.argmax(logits, axis=-1).tolist()
    assert finite.tolist() == np.isfinite(np.max(logits, axis=-1)).tolist()
    assert (tokens.dtype, finite.dtype) == (jnp.int32, jnp.bool_)


@pytest.mark.parametrize("place", range(0, 2100, 35))
def test_it_is_found_wherever_it_stands(place):
    logits = np.zeros((2, 2100), np.float32)
    logits[0, place:] = 1
    logits[1, place] = np.nan

    tokens, finite = compiled()(logits)

    assert tokens.tolist() == [place, place]
    assert finite.tolist() == [True, False]


def test_without_rows_nothing_is_found():
    tokens, finite = compiled()(np.zeros((0, 5), np.float32))

    assert tokens.shape == finite.shape == (0,)


def test_the_sampler_finds_the_same_with_it_and_without():
    logits = rows_of(640)
    vocabulary = sampler.Vocabulary(greatest=target("greatest", "float32"))

    with_it = jax.jit(lambda x: sampler.greatest(x, vocabulary))(logits)
    without = jax.jit(sampler.greatest)(logits)

    for one, other in zip(with_it, without, strict=True):
        assert one.tolist() == other.tolist()
