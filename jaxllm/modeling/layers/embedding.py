"""Token embedding, which is the output head too where the two are tied."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.modeling.layers.linear import contract, normal_init


class Embedding(nnx.Module):
    """A table `[V, E]`, looked up by token and multiplied for logits."""

    def __init__(
        self, vocab_size: int, embed_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.weight = nnx.Param(
            normal_init(rngs.params(), (vocab_size, embed_dim), embed_dim, dtype),
            axes=("vocab", "embed"),
            num_in=1,
            parts=(),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [T] -> [T, E]."""
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def logits(self, x: jax.Array) -> jax.Array:
        """[R, E] -> float32 [R, V]."""
        return contract(x, self.weight[...])
