"""The paged attention op: writes the step's keys and values, then attends.

The tokens of a step come with their rows already laid out by the host
(`batch.pack`): rows with one token first, one token each; then the chunks of
longer rows, cut into query blocks of `block_q` tokens that belong to one row.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.pallas_kernels.attention import native, xla
from jaxllm.pallas_kernels.attention.spec import AttentionSpec, LayerCache, Rope, Tuning

Shaped = jax.Array | jax.ShapeDtypeStruct
"""An array, or what is known of one."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QueryBlocks:
    """The chunks of a step, cut into blocks of tokens of one row each."""

    rows: jax.Array
    """int32 [NQ], the row of each block; ascending starts, unused ones last."""

    starts: jax.Array
    """int32 [NQ], index of the block's first token in the step."""

    positions: jax.Array
    """int32 [T], position of each token in its sequence."""

    count: jax.Array
    """int32 [], how many blocks are in use."""


@dataclass(frozen=True)
class PagedAttend:
    """Attention over a paged cache, for tokens laid out as above."""

    slot_mapping: jax.Array
    """int32 [T], where each token's key and value are written; trash page for padding."""

    page_table: jax.Array
    """int32 [B, M], pages of each row in order; 0 beyond its last."""

    kv_lens: jax.Array
    """int32 [B], tokens of each row in the cache after this step; 0 for padding."""

    num_decodes: jax.Array
    """int32 [], rows with one token; their tokens are the first of the step."""

    blocks: QueryBlocks | None
    """The chunks; None in a program that has none."""

    tuning: Tuning
    """Of `spec.tuning_for` (static)."""

    decode_rows: int
    """Rows that may be decodes in this program: 0 or B (static)."""

    block_q: int
    """Tokens in a query block (static)."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        """Takes q [T, H, D], k and v [T, K, D], (K, V) pages -> [T, H, D], the pages written."""
        if cache is None:
            raise ValueError("PagedAttend needs a cache; use DenseAttend for a forward without.")
        self.check_shapes(q, k, v, cache)
        if self.tuning.target:
            return native.attend(q, k, v, cache, self, spec)
        pages = tuple(
            xla.write(held, new, self.slot_mapping, order)
            for held, new, order in zip(cache, (k, v), self.tuning.orders, strict=True)
        )
        # Results are written over queries a few at a time. Where they are 16-bit, XLA:CPU would
        # make float32 of all of them, and back, each time.
        queries = q.astype(jnp.float32) if self.tuning.upcast else q
        return self._attended(queries, pages, spec, k.dtype).astype(q.dtype), pages

    @property
    def takes_fused(self) -> bool:
        """Whether a compiled kernel serves, which rotates, too."""
        return bool(self.tuning.target)

    def fused(
        self, qkv: jax.Array, rope: Rope | None, cache: LayerCache, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        """Takes [T, K, G + 2, D], tables [T, N/2] or None -> [T, H, D], the pages written."""
        if not self.takes_fused or cache is None:
            raise ValueError("Fused queries, keys and values are for a compiled kernel's cache.")
        num_tokens, num_kv_heads, _, head_dim = qkv.shape
        key = jax.ShapeDtypeStruct((num_tokens, num_kv_heads, head_dim), qkv.dtype)
        self.check_shapes(key, key, key, cache)
        return native.attend_fused(qkv, rope, cache, self, spec)

    def _attended(
        self, q: jax.Array, pages: tuple[jax.Array, ...], spec: AttentionSpec, dtype: DTypeLike
    ) -> jax.Array:
        """Takes q [T, H, D], pages that hold keys and values of `dtype` -> [T, H, D]."""
        if self.blocks is None:
            return xla.attend_rows(q, pages, self, spec, dtype)
        out = xla.attend_blocks(q, pages, self, spec, dtype)
        if self.decode_rows:
            is_decode = jnp.arange(self.decode_rows) < self.num_decodes
            # Chunks have no keys here, so that no time goes into what is not used.
            decodes = replace(self, kv_lens=jnp.where(is_decode, self.kv_lens, 0))
            decoded = xla.attend_rows(q[: self.decode_rows], pages, decodes, spec, dtype)
            rest = out[: self.decode_rows]
            out = out.at[: self.decode_rows].set(jnp.where(is_decode[:, None, None], decoded, rest))
        return out

    def check_shapes(self, q: Shaped, k: Shaped, v: Shaped, cache: tuple[jax.Array, ...]) -> None:
        """Raises ValueError where the operands do not belong together (trace time)."""
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        order = self.tuning.orders[0]
        held = dict(zip(order, cache[0].shape, strict=True))
        if k.shape != (num_tokens, num_kv_heads, head_dim) or num_heads % num_kv_heads:
            raise ValueError(f"q {q.shape} and k {k.shape} do not fit: need [T, H, D], [T, K, D].")
        if (held["K"], held["D"]) != (num_kv_heads, head_dim):
            raise ValueError(f"cache {cache[0].shape} as {order} does not fit k {k.shape}.")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q, k and v are of {q.dtype}, {k.dtype} and {v.dtype}: need one.")
        if self.slot_mapping.shape != (num_tokens,):
            raise ValueError(f"slot_mapping {self.slot_mapping.shape} is not [T={num_tokens}].")


jax.tree_util.register_dataclass(
    PagedAttend,
    data_fields=("slot_mapping", "page_table", "kv_lens", "num_decodes", "blocks"),
    meta_fields=("tuning", "decode_rows", "block_q"),
)
