"""Embeddings: of tokens, which is the output head too where the two are tied, and of positions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.modeling.layers.linear import contract, normal_init, scaled


class Embedding(nnx.Module):
    """A table `[V, E]`, looked up by token and multiplied for logits."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
        scale: float | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Declares the table; `scale` multiplies what is looked up, and no logits."""
        self.weight = nnx.Param(
            normal_init(rngs.params(), (vocab_size, embed_dim), embed_dim, dtype),
            axes=("vocab", "embed"),
            num_in=1,
            parts=(),
        )
        self.scale = scale

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [T] -> [T, E]."""
        x = jnp.take(self.weight[...], tokens, axis=0, mode="clip")
        return x if self.scale is None else scaled(x, self.scale)

    def logits(self, x: jax.Array) -> jax.Array:
        """[R, E] -> float32 [R, V]."""
        return contract(x, self.weight[...])


class PositionEmbedding(nnx.Module):
    """A table of learned positions, of which the first is row `offset`."""

    def __init__(
        self,
        num_positions: int,
        embed_dim: int,
        *,
        offset: int = 0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (num_positions + offset, embed_dim)
        self.weight = nnx.Param(
            normal_init(rngs.params(), shape, embed_dim, dtype),
            axes=("positions", "embed"),
            num_in=1,
            parts=(),
        )
        self.offset = offset

    def __call__(self, positions: jax.Array) -> jax.Array:
        """int32 [T] -> [T, E]."""
        return jnp.take(self.weight[...], positions + self.offset, axis=0, mode="clip")
