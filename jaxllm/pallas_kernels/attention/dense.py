"""Cacheless causal attention within segments of a flat token stream."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.pallas_kernels.attention.spec import (
    MASKED,
    AttentionSpec,
    LayerCache,
    Rope,
    capped,
    product,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseAttend:
    """Every token sees the earlier tokens of its own segment."""

    positions: jax.Array
    """int32 [T], of each token in its segment."""

    segments: jax.Array
    """int32 [T], which sequence a token belongs to."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        """Takes q [T, H, D], k and v [T, K, D] -> [T, H, D]; the cache passes unread."""
        num_tokens, num_heads, head_dim = q.shape
        grouped = q.reshape(num_tokens, k.shape[1], -1, head_dim)  # [T, K, G, D]
        scores = product("qkgd,ckd->kgqc", grouped, k, upcast=True)
        scores = capped(scores * spec.scale, spec.softcap)

        query, key = self.positions[:, None], self.positions[None, :]
        seen = (self.segments[:, None] == self.segments[None, :]) & (key <= query)  # [T, T]
        if spec.window is not None:
            seen &= key > query - spec.window
        probs = jax.nn.softmax(jnp.where(seen[None, None], scores, MASKED), axis=-1)
        out = product("kgqc,ckd->qkgd", probs, v, upcast=True)
        return out.astype(q.dtype).reshape(num_tokens, num_heads, head_dim), cache

    @property
    def takes_fused(self) -> bool:
        """It does not."""
        return False

    def fused(
        self, qkv: jax.Array, rope: Rope | None, cache: LayerCache, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        """Raises NotImplementedError."""
        raise NotImplementedError("DenseAttend takes queries, keys and values one by one.")
