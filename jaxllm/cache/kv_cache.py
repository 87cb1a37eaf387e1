"""The arrays of the KV cache: their shapes, their shardings, their allocation."""

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.cache.spec import CacheSpec
from jaxllm.pallas_kernels.attention import LayerCache, Tuning
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.layouts import Layout

AXIS_NAMES = {"P": "pages", "S": None, "K": "kv_heads", "D": None}

Caches = tuple[LayerCache, ...]


def abstract_caches(
    specs: Sequence[CacheSpec],
    num_pages: int,
    page_size: int,
    dtype: DTypeLike,
    sharder: Sharder,
    tuning: Tuning,
) -> Caches:
    """Returns the shapes and shardings of (K, V) for each layer.

    Args:
        specs: One a layer.
        num_pages: Pages in the pool, the trash page included (P).
        page_size: Slots in a page (S).
        dtype: Of the keys and values.
        sharder: The layout on its mesh.
        tuning: Says in which orders attention wants them, and of which type.
    """
    stored = tuning.stored(dtype)

    def pages(spec: CacheSpec, order: str) -> jax.ShapeDtypeStruct:
        sizes = {"P": num_pages, "S": page_size, "K": spec.num_kv_heads, "D": spec.head_dim}
        sharding = sharder.sharding(*(AXIS_NAMES[axis] for axis in order))
        return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in order), stored, sharding=sharding)

    return cast("Caches", tuple(tuple(pages(s, order) for order in tuning.orders) for s in specs))


def allocate(
    abstract: Caches, fill: Callable[..., jax.Array] = jnp.zeros, *, huge_pages: bool = False
) -> Caches:
    """Returns arrays of the given shapes on their devices, never on the host first.

    Args:
        abstract: Of `abstract_caches`.
        fill: Makes the content; tests poison it.
        huge_pages: Whether to ask Linux for those of 2 MiB (see `jaxllm.huge_pages`). They are
            taken whole, so it is for orders in which pages that are used lie side by side.
    """
    makers: dict[tuple, Callable[[], jax.Array]] = {}

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        kind = (leaf.shape, leaf.dtype, leaf.sharding)
        if kind not in makers:
            makers[kind] = jax.jit(
                lambda: fill(leaf.shape, dtype=leaf.dtype), out_shardings=leaf.sharding
            )
        array = makers[kind]()
        return unmapped(array, huge_pages) if fill is jnp.zeros else array

    return jax.tree.map(make, abstract)


def unmapped(zeros: jax.Array, huge_pages: bool) -> jax.Array:
    """Gives the memory of an array of zeros back to the system until it is written; returns it.

    Linux maps such pages as zeros again when they are used, with `huge_pages` in large ones. So a
    cache takes the memory of the pages that sequences have had, and not of all. Elsewhere, and on
    devices, it does nothing.
    """
    if sys.platform != "linux":
        return zeros
    advices = [mmap.MADV_DONTNEED]
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        advices.append(mmap.MADV_HUGEPAGE)
    for shard in zeros.addressable_shards:
        if shard.device.platform != "cpu":
            continue
        start = shard.data.block_until_ready().unsafe_buffer_pointer()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + shard.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        length = max(0, last - first)  # a small array may have no page of its own
        for advice in advices:
            # What it returns is of no use: where the system cannot, the zeros stay as they are.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)
    return zeros


def bytes_per_token(specs: Sequence[CacheSpec], dtype: DTypeLike) -> int:
    """Bytes that one token takes over all layers and devices."""
    return sum(spec.elements_per_token() for spec in specs) * jnp.dtype(dtype).itemsize


def bytes_per_token_of_a_device(
    specs: Sequence[CacheSpec], dtype: DTypeLike, layout: Layout
) -> int:
    """Bytes that one token takes over all layers, on a device with its share of the heads."""
    return bytes_per_token(specs, dtype) // layout.split("kv_heads")
