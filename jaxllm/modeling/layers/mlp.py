"""Feed-forward layers. Activations are computed in float32 and rounded once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`: the feed-forward of the Llama family."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str,
        bias: bool = False,
        factor: float | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        about: dict[str, Any] = {"bias": bias, "dtype": dtype, "rngs": rngs}
        fused = {"mlp": mlp_dim, "parts": 2}
        self.gate_up = Linear({"embed": embed_dim}, fused, parts=(1, 1), **about)
        self.down = Linear({"mlp": mlp_dim}, {"embed": embed_dim}, factor=factor, **about)
        self.activation = activation

    def __call__(self, x: jax.Array, onto: jax.Array | None = None) -> jax.Array:
        """[T, E] -> [T, E], added to `onto`."""
        gate_up = self.gate_up(x).astype(jnp.float32)  # [T, F, 2]
        gate, up = gate_up[..., 0], gate_up[..., 1]  # [T, F]
        return self.down((ACTIVATIONS[self.activation](gate) * up).astype(x.dtype), onto)


class MLP(nnx.Module):
    """`down(activation(up(x)))`: the feed-forward of the first transformers."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str,
        bias: bool = False,
        factor: float | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        about: dict[str, Any] = {"bias": bias, "dtype": dtype, "rngs": rngs}
        self.up = Linear({"embed": embed_dim}, {"mlp": mlp_dim}, **about)
        self.down = Linear({"mlp": mlp_dim}, {"embed": embed_dim}, factor=factor, **about)
        self.activation = activation

    def __call__(self, x: jax.Array, onto: jax.Array | None = None) -> jax.Array:
        """[T, E] -> [T, E], added to `onto`."""
        up = self.up(x).astype(jnp.float32)
        return self.down(ACTIVATIONS[self.activation](up).astype(x.dtype), onto)


MLPS: dict[str, Callable[..., GatedMLP | MLP]] = {"gated": GatedMLP, "plain": MLP}
"""By `ModelConfig.mlp`."""


def mlp_layer(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> GatedMLP | MLP:
    """Returns the feed-forward of one layer."""
    return MLPS[config.mlp](
        config.embed_dim,
        config.mlp_dim,
        activation=config.activation,
        bias=config.mlp_bias,
        factor=config.residual_scale,
        dtype=dtype,
        rngs=rngs,
    )
