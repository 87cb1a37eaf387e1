"""Embeddings: of tokens, which is the output head too where the two are tied, and of positions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.modeling.layers.linear import Product, normal_init, scaled


class Embedding(Product):
    """A table `[V, E]`, looked up by token and multiplied for logits."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
        scale: float | None = None,
        axis: str = "embed",
        padding: int = 0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Declares the table; `scale` multiplies what is looked up, and no logits.

        Args:
            vocab_size: Tokens of the checkpoint.
            embed_dim: Numbers of a token.
            scale: None for 1.
            axis: Name of their axis.
            padding: Further rows, which no token has: their logits are minus infinity.
            dtype: Of the table.
            rngs: Source of the initial values.
        """
        self.weight = nnx.Param(
            normal_init(rngs.params(), (vocab_size + padding, embed_dim), embed_dim, dtype),
            axes=("vocab", axis),
            num_in=1,
            parts=(),
            padding=padding,
        )
        self.scale, self.vocab_size, self.padding = scale, vocab_size, padding

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [T] -> [T, E]."""
        x = jnp.take(self.weight[...], tokens, axis=0, mode="clip")
        return x if self.scale is None else scaled(x, self.scale)

    def logits(self, x: jax.Array) -> jax.Array:
        """[R, E] -> float32 [R, V], padding included."""
        return self.contract(x, jnp.float32)

    def masked(self, logits: jax.Array) -> jax.Array:
        """Returns logits [R, V] in which no padding can be chosen or counted."""
        if not self.padding:
            return logits
        is_token = jnp.arange(logits.shape[1], dtype=jnp.int32) < self.vocab_size
        return jnp.where(is_token[None], logits, -jnp.inf)


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
