"""Products with a weight, whichever way the compiler is asked for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.modeling.layers.linear import FEW_TOKENS, Linear, multiplied
from jaxllm.native.build import target, unavailable


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 2, FEW_TOKENS, FEW_TOKENS + 1])
def test_any_number_of_tokens_gives_the_same_product(num_tokens, dtype):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(num_tokens, 12)), rng.normal(size=(10, 12))
    x, weight = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)

    y = jax.jit(lambda x, w: multiplied(x, w, jnp.float32))(x, weight)

    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "is_compiled",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(bool(unavailable("float32")), reason="no C++ compiler here"),
        ),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_named_axes_are_joined_for_the_product_and_split_again(bias, is_compiled):
    linear = Linear(
        {"heads": 3, "head_dim": 4},
        {"mlp": 5, "parts": 2},
        parts=(1, 1),
        bias=bias,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    if bias:
        linear.bias[...] = jnp.arange(10.0).reshape(5, 2)
    if is_compiled:
        linear.kernel = target("linear", "float32")
    x = np.random.default_rng(1).normal(size=(7, 3, 4)).astype(np.float32)

    y = nnx.jit(linear)(jnp.asarray(x))

    assert ("dot_general" in jax.jit(linear).lower(x).as_text()) != is_compiled
    want = np.einsum("tki,nmki->tnm", x, np.asarray(linear.weight[...]))
    want = want + (np.arange(10).reshape(5, 2) if bias else 0)
    np.testing.assert_allclose(np.asarray(y), want, rtol=1e-5, atol=1e-5)


def test_few_tokens_are_multiplied_with_the_weight_on_the_left():
    def operands(num_tokens):
        x, weight = jnp.zeros((num_tokens, 8)), jnp.zeros((24, 8))
        jitted = jax.jit(lambda x, w: multiplied(x, w, jnp.float32))
        text = jitted.lower(x, weight).compile().as_text()
        (dot,) = [line for line in text.splitlines() if " dot(" in line]
        return dot.split(" = ")[1].split("{")[0]

    assert operands(FEW_TOKENS) == f"f32[24,{FEW_TOKENS}]"
    assert operands(FEW_TOKENS + 1) == f"f32[{FEW_TOKENS + 1},24]"
