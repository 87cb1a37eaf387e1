"""The decoder: embedding, layers, final norm, output head.

One definition for the engine and for the cacheless forward; they differ in the
`Attend` of the context and in whether there are caches.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.cache.spec import CacheSpec
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.context import Context
from jaxllm.modeling.layers.attention import Attention
from jaxllm.modeling.layers.embedding import Embedding, PositionEmbedding
from jaxllm.modeling.layers.mlp import mlp_layer
from jaxllm.modeling.layers.norm import Norm, norm_layer
from jaxllm.modeling.layers.rope import rope_tables
from jaxllm.pallas_kernels.attention import Attend, LayerCache
from jaxllm.sharding.apply import Sharder


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.attn_norm = norm_layer(config, dtype=dtype, rngs=rngs)
        self.attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm_layer(config, dtype=dtype, rngs=rngs)
        self.mlp = mlp_layer(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: LayerCache, ctx: Context
    ) -> tuple[jax.Array, LayerCache]:
        """[T, E] and this layer's cache -> [T, E] and the cache, written."""
        x, cache = self.attn(self.attn_norm(x), cache, ctx, onto=x)
        x = self.stream(x, ctx)
        return self.stream(self.mlp(ctx.sharder.whole(self.mlp_norm(x)), onto=x), ctx), cache

    def stream(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Returns the residual stream [T, E], where the layout has it."""
        return ctx.sharder.pin(x, "tokens", "embed")


@functools.partial(jax.jit, static_argnames="graph")
def _run_layer(
    graph: nnx.GraphDef[Any], state: nnx.State, x: jax.Array, cache: LayerCache, ctx: Context
) -> tuple[jax.Array, LayerCache]:
    """Runs one layer. An inner jit: layers of one graph are traced and lowered once."""
    return nnx.merge(graph, state)(x, cache, ctx)


class Decoder(nnx.Module):
    """A decoder-only language model."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layer: type[DecoderLayer] = DecoderLayer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Declares the model; `layer` is the class of its layers."""
        self.config = config
        table = functools.partial(
            Embedding,
            config.vocab_size,
            config.embed_dim,
            padding=config.vocab_padding,
            dtype=dtype,
            rngs=rngs,
        )
        self.embed = table(scale=config.embed_scale)
        self.positions = (
            None
            if config.position_offset is None
            else PositionEmbedding(
                config.max_position,
                config.embed_dim,
                offset=config.position_offset,
                dtype=dtype,
                rngs=rngs,
            )
        )
        self.layers = nnx.List(
            [layer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)]
        )
        self.norm: Norm | None = norm_layer(config, dtype=dtype, rngs=rngs)
        self.head = None if config.tie_embeddings else table()

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        caches: Sequence[LayerCache],
        attend: Attend,
        sharder: Sharder,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Runs all layers on a flat stream of tokens.

        Args:
            tokens: int32 [T].
            positions: int32 [T], of each token in its sequence.
            caches: What each layer keeps; None each in a cacheless forward.
            attend: Attention of these tokens.
            sharder: Pins intermediate arrays to the layout.

        Returns:
            The hidden states after the final norm [T, E], and the caches.
        """
        config = self.config
        rope = rope_tables(config.rope, config.head_dim, positions) if config.rope else None
        ctx = Context(rope=rope, attend=attend, sharder=sharder)
        x = sharder.pin(self.embedded(tokens, positions), "tokens", "embed")
        written = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = _run_layer(*nnx.split(layer), x, cache, ctx)
            written.append(cache)
        x = x if self.norm is None else self.norm(x)
        return sharder.whole(x), tuple(written)

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32 [T] twice -> what the first layer reads, [T, E]."""
        x = self.embed(tokens)
        return x if self.positions is None else x + self.positions(positions)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> float32 [R, V]; minus infinity where the vocabulary is padded."""
        head = self.head or self.embed
        logits = head.logits(hidden)
        cap, divisor = self.config.logit_softcap, self.config.logit_divisor
        logits = logits if divisor is None else logits / divisor
        return head.masked(logits if cap is None else cap * jnp.tanh(logits / cap))

    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Returns what each layer keeps, in layer order."""
        config = self.config
        return tuple(
            CacheSpec(kind="paged", num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
            for _ in range(config.num_layers)
        )
