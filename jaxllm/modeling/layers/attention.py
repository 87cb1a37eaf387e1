"""Self-attention: projections, norms and rotation around one call of `ctx.attend`."""

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.context import Context
from jaxllm.modeling.layers.linear import Linear
from jaxllm.modeling.layers.norm import head_norm_layer
from jaxllm.modeling.layers.rope import rotate
from jaxllm.pallas_kernels.attention import AttentionSpec, LayerCache


class Attention(nnx.Module):
    """Grouped-query attention, with rotary positions where the step has them.

    Queries, keys and values are one weight `[K, G+2, D, E]`: a KV head with its
    query heads lies together, so a device that owns the KV head owns them all. Where
    there are more devices than KV heads, each has a copy and its share of the queries.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        group = config.group_size
        self.qkv = Linear(
            {"embed": config.embed_dim},
            {"kv_heads": config.num_kv_heads, "parts": group + 2, "head_dim": config.head_dim},
            parts=(group, 1, 1),
            copies=(1, config.kv_copies, config.kv_copies) if config.kv_copies > 1 else (),
            bias=config.qkv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.o = Linear(
            {"q_heads": config.num_heads, "head_dim": config.head_dim},
            {"embed": config.embed_dim},
            bias=config.o_bias,
            factor=config.residual_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.q_norm, self.k_norm = (
            head_norm_layer(config, dtype=dtype, rngs=rngs) if config.qk_norm else None
            for _ in range(2)
        )
        self.group_size = group
        self.spec = AttentionSpec(
            scale=config.attn_scale(layer),
            window=config.window(layer),
            softcap=config.attn_softcap,
        )

    def __call__(
        self, x: jax.Array, cache: LayerCache, ctx: Context, onto: jax.Array | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """[T, E] and this layer's cache -> [T, E], added to `onto`, and the cache, written."""
        qkv = self.qkv(ctx.sharder.whole(x))  # [T, K, G+2, D]
        if ctx.attend.takes_fused and self.q_norm is None:
            out, cache = ctx.attend.fused(qkv, ctx.rope, cache, self.spec)
            return self.o(out, onto), cache
        q = qkv[:, :, : self.group_size]  # [T, K, G, D]
        k, v = qkv[:, :, self.group_size], qkv[:, :, self.group_size + 1]  # [T, K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rope is not None:
            q, k = rotate(q, *ctx.rope), rotate(k, *ctx.rope)
        q = q.reshape(q.shape[0], -1, q.shape[-1])  # [T, H, D]
        out, cache = ctx.attend(q, k, v, cache, self.spec)
        return self.o(out, onto), cache
