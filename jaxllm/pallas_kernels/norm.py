"""Norms as one call of a compiled kernel, on CPU (`jaxllm/native/norm.cc`)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.pallas_kernels.padding import num_rows


@dataclass(frozen=True, slots=True)
class NormSpec:
    """Which norm: `x / sqrt(mean(x^2) + eps) * (scale + more) + bias`, in float32."""

    eps: float
    """Added to the mean square."""

    more: float = 0.0
    """Added to the scale."""

    is_centered: bool = False
    """Whether the mean is subtracted from `x` first."""

    rounded: bool = False
    """Whether what is scaled is rounded to the dtype before, and not only after."""


def compiled_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    spec: NormSpec,
    kernel: str,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    """Returns the norm of the last axis.

    Args:
        x: [T, ..., E], of the dtype of the kernel.
        scale: [E] of that dtype; or None.
        bias: [E] of that dtype; or None.
        spec: Which norm.
        kernel: As `native.build.target_for` names it.
        num_tokens: int32 [], how many are computed, the first ones; None: all.

    Returns:
        [T, ..., E], of the dtype of `x`; zeros where nothing is computed.
    """
    nothing = jnp.zeros(0, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = jax.ffi.ffi_call(kernel, jax.ShapeDtypeStruct(rows.shape, x.dtype))(
        rows,
        nothing if scale is None else scale,
        nothing if bias is None else bias,
        num_rows(num_tokens, x.shape[:-1]),
        eps=np.float32(spec.eps),
        more=np.float32(spec.more),
        is_centered=spec.is_centered,
        rounded=spec.rounded,
    )
    return y.reshape(x.shape)
