"""Normalisation, always computed in float32."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.layers.computed import Computed
from jaxllm.pallas_kernels.norm import NormSpec, compiled_norm


class Norm(Computed):
    """Normalises the last axis."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E], of the dtype of `x`."""
        raise NotImplementedError

    def compiled(
        self,
        x: jax.Array,
        spec: NormSpec,
        scale: nnx.Param | None,
        bias: nnx.Param | None = None,
    ) -> jax.Array:
        """Returns what the kernel makes of it, [..., E]."""
        return compiled_norm(x, _value(scale), _value(bias), spec, self.kernel, self.counted)


class RMSNorm(Norm):
    """`x / rms(x) * scale` over the last axis (arXiv:1910.07467)."""

    def __init__(
        self, size: int, *, axis: str = "embed", eps: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        del rngs  # ones need no randomness; taken so that layers are built alike
        self.scale = nnx.Param(jnp.ones((size,), dtype), axes=(axis,), num_in=0, parts=())
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E], of the dtype of `x`."""
        # transformers rounds to the model's dtype before it scales, so we do too.
        if self.kernel:
            return self.compiled(x, NormSpec(self.eps, rounded=True), self.scale)
        x = _over_rms(x, self.eps).astype(x.dtype)
        return x * jnp.broadcast_to(self.scale[...], x.shape)


class OffsetRMSNorm(Norm):
    """`x / rms(x) * (1 + offset)` over the last axis, rounded once."""

    def __init__(
        self, size: int, *, axis: str = "embed", eps: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        del rngs
        self.offset = nnx.Param(jnp.zeros((size,), dtype), axes=(axis,), num_in=0, parts=())
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E], of the dtype of `x`."""
        if self.kernel:
            return self.compiled(x, NormSpec(self.eps, more=1.0), self.offset)
        scale = 1 + self.offset[...].astype(jnp.float32)
        return (_over_rms(x, self.eps) * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


class LayerNorm(Norm):
    """`(x - mean(x)) / std(x) * scale + bias` over the last axis (arXiv:1607.06450)."""

    def __init__(
        self,
        size: int,
        *,
        axis: str = "embed",
        eps: float,
        affine: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Declares the norm; without `affine` it has neither scale nor bias."""
        del rngs
        about = {"axes": (axis,), "num_in": 0, "parts": ()}
        self.scale = nnx.Param(jnp.ones((size,), dtype), **about) if affine else None
        self.bias = nnx.Param(jnp.zeros((size,), dtype), **about) if affine else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E], of the dtype of `x`."""
        if self.kernel:
            return self.compiled(x, NormSpec(self.eps, is_centered=True), self.scale, self.bias)
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = _over_rms(x32, self.eps)
        if self.scale is not None:
            x32 = x32 * jnp.broadcast_to(self.scale[...].astype(jnp.float32), x.shape)
        if self.bias is not None:
            x32 = x32 + jnp.broadcast_to(self.bias[...].astype(jnp.float32), x.shape)
        return x32.astype(x.dtype)


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]


def _over_rms(x: jax.Array, eps: float) -> jax.Array:
    """[..., E] -> float32 [..., E], of mean square 1."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


NORMS: dict[str, Callable[..., Norm]] = {
    "rms": RMSNorm,
    "rms_offset": OffsetRMSNorm,
    "layer": LayerNorm,
    "layer_plain": functools.partial(LayerNorm, affine=False),
}
"""By `ModelConfig.norm`."""


def norm_layer(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Norm:
    """Returns a norm of the residual stream."""
    return NORMS[config.norm](config.embed_dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)


def head_norm_layer(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Norm:
    """Returns a norm of query or key heads."""
    norm = NORMS[config.norm]
    return norm(config.head_dim, axis="head_dim", eps=config.norm_eps, dtype=dtype, rngs=rngs)
