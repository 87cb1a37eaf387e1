"""Products with weights as one call of a compiled kernel, on CPU (`jaxllm/native/linear.cc`).

It reads a weight as it lies, as XLA does, and takes less time: `benchmarks/README.md` has how much.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.native.build import linear_in_tiles, target, why_not_compiled


def why_not_compiled_linear(platform: str, devices: int, dtype: DTypeLike) -> str | None:
    """Returns why products with weights are XLA's; None if a compiled kernel serves them.

    Args:
        platform: Of JAX.
        devices: Over which the model is split.
        dtype: Of weights and tokens.

    Raises:
        ConfigError, NativeBuildError: As `native.build.why_not_compiled`.
    """
    name = jnp.dtype(dtype).name
    if problem := why_not_compiled(platform, devices, name):
        return problem
    if name == "bfloat16" and not linear_in_tiles(name):
        return "the processor has no matrix unit for bfloat16"
    return None


def compiled_linear_for(platform: str, devices: int, dtype: DTypeLike) -> str:
    """Returns XLA's name of the kernel; empty where there is none.

    Arguments and errors are those of `why_not_compiled_linear`.
    """
    if why_not_compiled_linear(platform, devices, dtype):
        return ""
    return target("linear", jnp.dtype(dtype).name)


def linear(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, dtype: DTypeLike, kernel: str
) -> jax.Array:
    """Returns `x @ weight.T + bias`, summed in float32 and rounded once.

    Args:
        x: [T, K].
        weight: [N, K], of the type of `x`.
        bias: [N], of that type too; or None.
        dtype: Of the result: that type, or float32.
        kernel: As `compiled_linear_for` names it.

    Returns:
        [T, N].
    """
    added = jnp.zeros(0, x.dtype) if bias is None else bias
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), dtype)
    return jax.ffi.ffi_call(kernel, result)(x, weight, added)
