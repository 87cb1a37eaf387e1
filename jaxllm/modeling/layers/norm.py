"""Normalisation, always computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis (arXiv:1910.07467)."""

    def __init__(
        self, size: int, *, axis: str = "embed", eps: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        del rngs  # ones need no randomness; taken so that layers are built alike
        self.scale = nnx.Param(jnp.ones((size,), dtype), axes=(axis,), num_in=0, parts=())
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E], of the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        # transformers rounds to the model's dtype before it scales, so we do too.
        return x32.astype(x.dtype) * jnp.broadcast_to(self.scale[...], x.shape)
