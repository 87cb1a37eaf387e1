"""Products with weights as one call of a compiled kernel, on CPU (`jaxllm/native/linear.cc`).

It reads a weight as it lies, as XLA does, and takes less time: `benchmarks/README.md` has how much.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def linear(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, dtype: DTypeLike, kernel: str
) -> jax.Array:
    """Returns `x @ weight.T + bias`, summed in float32 and rounded once.

    Args:
        x: [T, K].
        weight: [N, K], of the type of `x`.
        bias: [N], of that type too; or None.
        dtype: Of the result: that type, or float32.
        kernel: As `native.build.target_for` names it.

    Returns:
        [T, N].
    """
    added = jnp.zeros(0, x.dtype) if bias is None else bias
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), dtype)
    return jax.ffi.ffi_call(kernel, result)(x, weight, added)
