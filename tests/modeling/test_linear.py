"""Products with a weight, whichever way the compiler is asked for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.modeling.layers.linear import FEW_TOKENS, contract


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 2, FEW_TOKENS, FEW_TOKENS + 1])
def test_any_number_of_tokens_gives_the_same_product(num_tokens, dtype):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(num_tokens, 3, 4)), rng.normal(size=(5, 2, 3, 4))
    x, weight = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)

    y = jax.jit(lambda x, w: contract(x, w, 2))(x, weight)

    want = np.einsum("tki,nmki->tnm", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y), want, rtol=1e-5, atol=1e-5)


def test_few_tokens_are_multiplied_with_the_weight_on_the_left():
    def operands(num_tokens):
        x, weight = jnp.zeros((num_tokens, 8)), jnp.zeros((24, 8))
        text = jax.jit(contract).lower(x, weight).compile().as_text()
        (dot,) = [line for line in text.splitlines() if " dot(" in line]
        return dot.split(" = ")[1].split("{")[0]

    assert operands(FEW_TOKENS) == f"f32[24,{FEW_TOKENS}]"
    assert operands(FEW_TOKENS + 1) == f"f32[{FEW_TOKENS + 1},24]"
