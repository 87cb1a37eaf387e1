"""Norms as one call of a compiled kernel, on CPU (`jaxllm/native/norm.cc`)."""

import jax
import jax.numpy as jnp
import numpy as np


def compiled_norm(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    eps: float,
    more: float = 0.0,
    is_centered: bool = False,
    rounded: bool = False,
    kernel: str,
) -> jax.Array:
    """Returns `x / sqrt(mean(x^2) + eps) * (scale + more) + bias` over the last axis, in float32.

    Args:
        x: [..., E], of the dtype of the kernel.
        scale: [E] of that dtype; or None.
        bias: [E] of that dtype; or None.
        eps: Added to the mean square.
        more: Added to the scale.
        is_centered: Whether the mean is subtracted from `x` first.
        rounded: Whether what is scaled is rounded to the dtype before, and not only after.
        kernel: As `native.build.target_for` names it.

    Returns:
        [..., E], of the dtype of `x`.
    """
    nothing = jnp.zeros(0, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = jax.ffi.ffi_call(kernel, jax.ShapeDtypeStruct(rows.shape, x.dtype))(
        rows,
        nothing if scale is None else scale,
        nothing if bias is None else bias,
        eps=np.float32(eps),
        more=np.float32(more),
        is_centered=is_centered,
        rounded=rounded,
    )
    return y.reshape(x.shape)
