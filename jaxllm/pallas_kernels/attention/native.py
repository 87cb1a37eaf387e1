"""Paged attention on CPU as one call of a compiled kernel (`jaxllm/native/paged_attention.cc`).

It reads pages where they lie, on all cores; `xla` gathers them first, and is its oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.pallas_kernels.attention.spec import AttentionSpec, Rope

if TYPE_CHECKING:
    from jaxllm.pallas_kernels.attention.paged import PagedAttend


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: tuple[jax.Array, ...],
    step: PagedAttend,
    spec: AttentionSpec,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Writes the step's keys and values in place, then attends.

    Args:
        q: [T, H, D].
        k: [T, K, D], of the type of `q`.
        v: [T, K, D], as `k`.
        pages: K and V of the layer in orders `IN_PLACE`; they may hold bits of 16-bit floats.
        step: What it says of tokens and rows; its tuning names the kernel.
        spec: The layer's constants.

    Returns:
        [T, H, D], zeros for padding; and the pages, with nothing written for padding.
    """
    return _call((q, k, v), q.shape, None, pages, step, spec)


def attend_fused(
    qkv: jax.Array,
    rope: Rope | None,
    pages: tuple[jax.Array, ...],
    step: PagedAttend,
    spec: AttentionSpec,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Rotates queries and keys, writes and attends.

    Args:
        qkv: [T, K, G + 2, D], of each KV head its queries, its key and its value.
        rope: As `Attend.fused`.
        pages: As `attend`.
        step: As `attend`.
        spec: The layer's constants.

    Returns:
        As `attend`.
    """
    num_tokens, num_kv_heads, parts, head_dim = qkv.shape
    shape = (num_tokens, num_kv_heads * (parts - 2), head_dim)
    nothing = jnp.zeros(0, qkv.dtype)
    return _call((qkv, nothing, nothing), shape, rope, pages, step, spec)


def _call(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    shape: tuple[int, ...],
    rope: Rope | None,
    pages: tuple[jax.Array, ...],
    step: PagedAttend,
    spec: AttentionSpec,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Calls the kernel, whose result has this shape."""
    blocks = step.blocks
    none = jnp.zeros(0, jnp.int32)
    chunks = (none, none, none, jnp.int32(0))
    if blocks is not None:
        chunks = (blocks.rows, blocks.starts, blocks.positions, blocks.count)
    still = jnp.zeros((0, 0), jnp.float32)
    result = jax.ShapeDtypeStruct(shape, qkv[0].dtype)
    results = [result, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages)]
    call = jax.ffi.ffi_call(step.tuning.target, results, input_output_aliases={3: 1, 4: 2})
    out, *written = call(
        *qkv,
        *pages,
        step.slot_mapping,
        step.page_table,
        step.kv_lens,
        step.num_decodes,
        *chunks,
        *(rope or (still, still)),
        block_q=np.int64(step.block_q),
        window=np.int64(spec.window or 0),
        scale=np.float32(spec.scale),
        softcap=np.float32(spec.softcap or 0),
    )
    return out, tuple(written)
