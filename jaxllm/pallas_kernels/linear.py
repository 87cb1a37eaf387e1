"""Products with weights as one call of a compiled kernel, on CPU (`jaxllm/native/linear.cc`).

It reads a weight as it lies, as XLA does, and takes less time: `benchmarks/README.md` has how much.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.pallas_kernels.padding import num_rows


def linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    dtype: DTypeLike,
    kernel: str,
    onto: jax.Array | None = None,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    """Returns `x @ weight.T + bias`, summed in float32 and rounded once; or `onto` plus that.

    Args:
        x: [T, ..., K].
        weight: [N, K], of the type of `x`.
        bias: [N], of that type too; or None.
        dtype: Of the result: that type, or float32.
        kernel: As `native.build.target_for` names it.
        onto: [T, ..., N], of the dtype of the result; the sum is rounded, too. Or None.
        num_tokens: int32 [], how many are computed, the first ones; None: all.

    Returns:
        [T, ..., N], zeros where nothing is computed.
    """
    added = jnp.zeros(0, x.dtype) if bias is None else bias
    stream = jnp.zeros(0, dtype) if onto is None else onto
    lead, depth = x.shape[:-1], x.shape[-1]
    rows, count = x.reshape(math.prod(lead), depth), num_rows(num_tokens, lead)
    result = jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), dtype)
    y = jax.ffi.ffi_call(kernel, result)(rows, weight, added, stream, count)
    return y.reshape(*lead, weight.shape[0])
