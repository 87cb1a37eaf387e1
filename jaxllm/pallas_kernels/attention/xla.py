"""Paged attention in plain XLA: every platform, and the only path where Pallas is not.

Keys of a row are gathered page by page and multiplied with its query heads in
groups, never repeated. Softmax is float32. V is masked before the second
product: a page may hold NaN from its last owner, and `0 * NaN` is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.pallas_kernels.attention.spec import MASKED, AttentionSpec, Tuning, capped, product

if TYPE_CHECKING:
    from jaxllm.pallas_kernels.attention.paged import PagedAttend


def write(pages: jax.Array, new: jax.Array, slots: jax.Array, order: str) -> jax.Array:
    """Puts each token's row into its slot, in place where `pages` is donated.

    Args:
        pages: One layer's K or V, axes in `order`.
        new: [T, K, D].
        slots: int32 [T], page * S + offset. The trash page may come many times.
        order: One of `Tuning.orders`.
    """
    shape = pages.shape
    if new.dtype != pages.dtype:  # `Tuning.as_bits`
        new = jax.lax.bitcast_convert_type(new, pages.dtype)
    if new.shape[0] == 1:
        # A scatter of one row becomes a slice update, and that a copy of the cache: add a
        # row for the trash page.
        new, slots = jnp.pad(new, ((0, 1), (0, 0), (0, 0))), jnp.pad(slots, (0, 1))
    if order == "PSKD":
        flat = pages.reshape(shape[0] * shape[1], *shape[2:])
        return flat.at[slots].set(new, mode="promise_in_bounds").reshape(shape)
    if order == "KPDS":
        page, offset = jnp.divmod(slots, shape[3])
        return pages.at[:, page, :, offset].set(new, mode="promise_in_bounds")
    flat = pages.reshape(shape[0], shape[1] * shape[2], shape[3])
    by_head = new.transpose(1, 0, 2)  # [K, T, D]
    return flat.at[:, slots].set(by_head, mode="promise_in_bounds").reshape(shape)


def gather(
    pages: jax.Array,
    table: jax.Array,
    order: str,
    dtype: DTypeLike,
    used: jax.Array | None = None,
) -> jax.Array:
    """Returns the slots of some pages.

    Args:
        pages: One layer's K or V, axes in `order`.
        table: int32 [b, M], which pages.
        order: One of `Tuning.orders`.
        dtype: Of what is returned; `pages` may hold its bits.
        used: int32 [b, M], from which slot of each page on zeros are returned; where S is before D.

    Returns:
        [b, C, K, D] of PSKD, [K, b, C, D] of KPSD, [K, b, D, C] of KPDS; C is M * S.
    """
    at = order.index("P")
    heads, page = pages.shape[:at], pages.shape[at + 1 :]
    num_slots, num_pages = pages.shape[order.index("S")], table.shape[-1]
    # Where a page of a head is one piece, XLA:CPU copies it three times as fast as one long row.
    if order.startswith("KP"):
        pages = pages.reshape(*pages.shape[: at + 1], -1)
    found = jnp.take(pages, table.reshape(-1), axis=at, mode="clip")
    if used is not None:
        length = found.shape[at + 1]  # S, or S * D
        index = jnp.arange(length, dtype=jnp.int32)[None, :]
        is_used = index < used.reshape(-1, 1) * (length // num_slots)
        is_used = is_used.reshape(*[1] * at, *is_used.shape, *[1] * (found.ndim - at - 2))
        found = jnp.where(is_used, found, 0)
    found = found.reshape(*heads, *table.shape, *page)
    if order == "KPDS":
        found = found.swapaxes(-3, -2)  # [K, b, D, M, S]
        found = found.reshape(*found.shape[:-2], num_pages * num_slots)
    else:
        found = found.reshape(*heads, *table.shape[:-1], num_pages * num_slots, *page[1:])
    return found if found.dtype == dtype else jax.lax.bitcast_convert_type(found, dtype)


def gather_both(
    pages: tuple[jax.Array, ...],
    table: jax.Array,
    kv_lens: jax.Array,
    tuning: Tuning,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values in the pages of some rows; values after a row's last as zeros.

    Args:
        pages: K and V of a layer.
        table: int32 [b, M].
        kv_lens: int32 [b], slots in use, from the first page of `table` on.
        tuning: Says how they are stored.
        dtype: As `gather`.
    """
    num_slots = pages[1].shape[tuning.orders[1].index("S")]
    used = kv_lens[:, None] - num_slots * jnp.arange(table.shape[-1], dtype=jnp.int32)[None, :]
    keys = gather(pages[0], table, tuning.orders[0], dtype)
    return keys, gather(pages[1], table, tuning.orders[1], dtype, used)


def _visible(keys: jax.Array, queries: jax.Array, length: jax.Array, window: int | None):  # noqa: ANN202
    """Whether a query sees a key, by position; all broadcast."""
    seen = (keys <= queries) & (keys < length)
    return seen if window is None else seen & (keys > queries - window)


def attend_rows(
    q: jax.Array,
    pages: tuple[jax.Array, ...],
    step: PagedAttend,
    spec: AttentionSpec,
    dtype: DTypeLike,
) -> jax.Array:
    """Attention of rows with one token each, the last of their sequence.

    Args:
        q: [B, H, D].
        pages: K and V of the layer.
        step: `page_table` [B, M] and `kv_lens` [B] are used.
        spec: The layer's constants.
        dtype: Of the keys and values; `pages` may hold their bits.

    Returns:
        [B, H, D]; zeros where `kv_lens` is 0.
    """
    num_rows, num_pages = step.page_table.shape
    attend = _attend_rows
    if step.tuning.keys_at_once:
        attend = _attend_rows_in_parts
        num_pages = min(num_pages, pages_at_once(pages, step.tuning))
    row_bytes = num_pages * pages[0].nbytes // _size(pages, step.tuning, "P")
    size = num_rows
    while size % 2 == 0 and size * row_bytes > step.tuning.gather_bytes:
        size //= 2

    def attend_group(
        i: int | jax.Array, out: jax.Array, table: jax.Array = step.page_table
    ) -> jax.Array:
        # Results take the place of their queries; what `map` stacks them in would be made
        # for all layers at once.
        queries, tables, lens = (
            jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in (out, table, step.kv_lens)
        )
        attended = attend(queries, tables, lens, pages, step.tuning, spec, dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, attended, i * size, axis=0)

    if size == num_rows:
        return attend(q, step.page_table, step.kv_lens, pages, step.tuning, spec, dtype)
    if num_rows // size > step.tuning.unrolled_groups:
        return jax.lax.fori_loop(0, num_rows // size, attend_group, q)
    out, table = q, step.page_table
    for i in range(num_rows // size):
        # One group after the other, or the keys of all would be in memory at once.
        out, table = jax.lax.optimization_barrier((out, table))
        out = attend_group(i, out, table)
    return out


def _attend_rows(
    q: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    pages: tuple[jax.Array, ...],
    tuning: Tuning,
    spec: AttentionSpec,
    dtype: DTypeLike,
) -> jax.Array:
    """Attention of a group of rows whose keys are gathered together (`AT_ONCE`)."""
    keys, values = gather_both(pages, page_table, kv_lens, tuning, dtype)
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = _size(pages, tuning, "K")
    grouped = q.reshape(num_rows, num_kv_heads, -1, head_dim)  # [B, K, G, D]
    scores = product("bckd,bkgd->bkcg", keys, grouped, upcast=tuning.upcast)
    scores = capped(scores * spec.scale, spec.softcap)

    at = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :]
    length = kv_lens[:, None]
    seen = _visible(at, length - 1, length, spec.window)  # [B, C]
    probs = jax.nn.softmax(jnp.where(_spread(seen, "bc", "bkcg"), scores, MASKED), axis=2)
    out = product("bkcg,bckd->bkgd", probs, values, upcast=tuning.upcast)
    return out.astype(q.dtype).reshape(num_rows, num_heads, head_dim)


def attend_blocks(
    q: jax.Array,
    pages: tuple[jax.Array, ...],
    step: PagedAttend,
    spec: AttentionSpec,
    dtype: DTypeLike,
) -> jax.Array:
    """Attention of query blocks, a few at a time.

    A block is read and written as `block_q` consecutive tokens. Where its row
    ends sooner, the tokens after it are computed wrongly and then overwritten by
    the blocks that own them, as blocks come in ascending order; past the last
    block there is padding only. Decodes lie before all blocks.

    Args:
        q: [T, H, D].
        pages: K and V of the layer.
        step: `blocks`, `page_table` and `kv_lens` are used.
        spec: The layer's constants.
        dtype: Of the keys and values; `pages` may hold their bits.

    Returns:
        [T, H, D]; what no block covers is left as it was in `q`.
    """
    blocks = step.blocks
    if blocks is None:
        raise ValueError("attend_blocks was called for a step without query blocks.")
    num_tokens, num_heads, _ = q.shape
    num_keys = step.page_table.shape[1] * _size(pages, step.tuning, "S")
    size = step.tuning.blocks_at_once(step.block_q, num_heads, num_keys)
    overhang = ((0, step.block_q), (0, 0), (0, 0))
    q_padded = jnp.pad(q, overhang)
    positions = jnp.pad(blocks.positions, overhang[0])
    extra = (0, -blocks.rows.shape[0] % size)
    rows = jnp.pad(blocks.rows, extra)
    starts = jnp.pad(blocks.starts, extra, constant_values=num_tokens)

    def attend_group(i: jax.Array, out: jax.Array) -> jax.Array:
        row, start = (jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in (rows, starts))

        def cut(x: jax.Array) -> jax.Array:
            cuts = [jax.lax.dynamic_slice_in_dim(x, at, step.block_q) for at in start]
            return jnp.stack(cuts)  # [blocks, Q, ...]

        table, lens = step.page_table[row], step.kv_lens[row]
        attend = _attend_in_parts if step.tuning.keys_at_once else _attend_blocks
        attended = attend(
            cut(q_padded), cut(positions), table, lens, pages, step.tuning, spec, dtype
        )
        for at, block in zip(start, attended, strict=True):
            out = jax.lax.dynamic_update_slice_in_dim(out, block, at, axis=0)
        return out

    trips = -(-blocks.count // size) if step.tuning.dynamic_trips else rows.shape[0] // size
    # Not zeros to begin with: XLA would make those of all layers at once, and keep them.
    out = jax.lax.fori_loop(0, trips, attend_group, q_padded)
    return out[:num_tokens]


def _attend_blocks(
    q: jax.Array,
    query_at: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    pages: tuple[jax.Array, ...],
    tuning: Tuning,
    spec: AttentionSpec,
    dtype: DTypeLike,
) -> jax.Array:
    """Attention of query blocks [blocks, Q, H, D] at `query_at` [blocks, Q] (`AT_ONCE`)."""
    keys, values = gather_both(pages, page_table, kv_lens, tuning, dtype)
    num_kv_heads = _size(pages, tuning, "K")
    grouped = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1])
    scores = product("bqkgd,bckd->bkgqc", grouped, keys, upcast=tuning.upcast)
    scores = capped(scores * spec.scale, spec.softcap)

    at = jnp.arange(keys.shape[1], dtype=jnp.int32)
    length = kv_lens[:, None, None]
    seen = _visible(at[None, None, :], query_at[:, :, None], length, spec.window)  # [blocks, Q, C]
    probs = jax.nn.softmax(jnp.where(_spread(seen, "bqc", "bkgqc"), scores, MASKED), axis=-1)
    out = product("bkgqc,bckd->bqkgd", probs, values, upcast=tuning.upcast)
    return out.astype(q.dtype).reshape(q.shape)


def _attend_rows_in_parts(
    q: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    pages: tuple[jax.Array, ...],
    tuning: Tuning,
    spec: AttentionSpec,
    dtype: DTypeLike,
) -> jax.Array:
    """As `_attend_rows`, some keys at a time up to the end of the longest row."""
    # Padding stands where the longest does, and so makes no row begin sooner.
    last = jnp.where(kv_lens > 0, kv_lens, jnp.max(kv_lens)) - 1
    attended = _attend_in_parts(
        q[:, None], last[:, None], page_table, kv_lens, pages, tuning, spec, dtype
    )
    return attended[:, 0]


def _attend_in_parts(
    q: jax.Array,
    query_at: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    pages: tuple[jax.Array, ...],
    tuning: Tuning,
    spec: AttentionSpec,
    dtype: DTypeLike,
) -> jax.Array:
    """As `_attend_blocks`, some keys at a time and none that no query sees (`IN_PARTS`).

    The softmax is Milakov and Gimelshein's (arXiv:1805.02867): a running maximum, and
    sums that are scaled whenever it grows.
    """
    num_blocks, block_q, _, head_dim = q.shape
    num_kv_heads = _size(pages, tuning, "K")
    per_part = pages_at_once(pages, tuning)
    size = per_part * _size(pages, tuning, "S")
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % per_part)))
    # [K, blocks, G * Q, D], m below: products of matrices as they lie, with no transposed result.
    scaled = q.astype(jnp.float32) * spec.scale
    queries = scaled.reshape(num_blocks, block_q, num_kv_heads, -1, head_dim)
    queries = queries.transpose(2, 0, 3, 1, 4).reshape(num_kv_heads, num_blocks, -1, head_dim)

    def attend_part(i: jax.Array, carry: tuple) -> tuple:
        highest, total, out = carry
        held = jax.lax.dynamic_slice_in_dim(table, i * per_part, per_part, axis=1)
        keys, values = gather_both(pages, held, kv_lens - i * size, tuning, dtype)
        scores = product("kbmd,kbdc->kbmc", queries, keys, upcast=tuning.upcast)
        scores = capped(scores, spec.softcap)
        at = i * size + jnp.arange(size, dtype=jnp.int32)
        seen = _visible(
            at[None, None, :], query_at[:, :, None], kv_lens[:, None, None], spec.window
        )  # [blocks, Q, C]
        by_query = scores.reshape(num_kv_heads, num_blocks, -1, block_q, size)
        scores = jnp.where(_spread(seen, "bqc", "kbgqc"), by_query, MASKED).reshape(scores.shape)
        # XLA:CPU takes as long to reduce the scores of a block as to compute them, so their maximum
        # is one of halves, and their sum a product.
        higher = jnp.maximum(highest, largest(scores))
        probs, rest = jnp.exp(scores - higher), jnp.exp(highest - higher)
        added = product("kbmc,kbcd->kbmd", probs, values, upcast=tuning.upcast)
        ones = jnp.ones((size, 1), jnp.float32)
        summed = product("kbmc,cd->kbmd", probs, ones, upcast=tuning.upcast)
        return higher, total * rest + summed, out * rest + added

    last = jnp.minimum(jnp.max(kv_lens), jnp.max(query_at) + 1)
    first = 0 if spec.window is None else jnp.maximum(0, jnp.min(query_at) + 1 - spec.window)
    highest = jnp.full((*queries.shape[:3], 1), MASKED, jnp.float32)
    carry = (highest, jnp.zeros_like(highest), jnp.zeros(queries.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(first // size, -(-last // size), attend_part, carry)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # of padding, nothing was summed
    out = out.reshape(num_kv_heads, num_blocks, -1, block_q, head_dim).transpose(1, 3, 0, 2, 4)
    return out.astype(q.dtype).reshape(q.shape)


def largest(x: jax.Array) -> jax.Array:
    """Returns the largest number of the last axis, whose size is a power of two: [..., 1]."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = jnp.maximum(x[..., :half], x[..., half:])
    return x


def pages_at_once(pages: tuple[jax.Array, ...], tuning: Tuning) -> int:
    """Returns how many pages of a row are one part (`Tuning.keys_at_once`)."""
    return max(1, tuning.keys_at_once // _size(pages, tuning, "S"))


def _size(pages: tuple[jax.Array, ...], tuning: Tuning, axis: str) -> int:
    """Returns the size of an axis of the cache, by its letter."""
    return pages[0].shape[tuning.orders[0].index(axis)]


def _spread(x: jax.Array, letters: str, target: str) -> jax.Array:
    """Reshapes `x` so that it broadcasts against an array with letters `target`."""
    sizes = dict(zip(letters, x.shape, strict=True))
    return x.reshape([sizes.get(letter, 1) for letter in target])
