"""What a step takes and gives on the device, and the one buffer it travels in.

All numbers of a step are packed into one int32 buffer on the host (floats and
unsigned words bit for bit), sent with one `device_put`, and unpacked by static
slices inside the program.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.buckets import Bucket
from jaxllm.pallas_kernels.attention import LayerCache

MAX_STOP_IDS = 8
"""Stop tokens a row can carry into a decode loop; with more, it runs one step a launch."""

FROM_DEVICE = -1
"""In `tokens`: take the row's `last_token` instead."""

NUM_GROUPS = 1
"""Groups of layers that share a page table (`CacheSpec.group`)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkInputs:
    """Inputs of a step in which a row may have several tokens."""

    slot_mapping: jax.Array
    """int32 [groups, T], where each token is written; the trash page for padding."""

    q_block_seq: jax.Array
    """int32 [NQ], the row of each query block."""

    q_block_start: jax.Array
    """int32 [NQ], index of its first token in the step; T for an unused block."""

    num_blocks: jax.Array
    """int32 [], blocks in use."""

    logit_rows: jax.Array
    """int32 [R], tokens whose logits are needed; R = B."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """One step's inputs."""

    tokens: jax.Array
    """int32 [T]; `FROM_DEVICE` where the token is on the device."""

    positions: jax.Array
    """int32 [1, T], of each token in its sequence."""

    rows: jax.Array
    """int32 [B], row of the device state; the last one, a spare, for padding."""

    page_table: jax.Array
    """int32 [groups, B, M]."""

    kv_lens: jax.Array
    """int32 [B], tokens of each row in the cache after this step; 0 for padding."""

    num_decodes: jax.Array
    """int32 [], rows with one token, which come first."""

    temperature: jax.Array
    """float32 [B]; 0 is greedy."""

    seeds: jax.Array
    """uint32 [B, 2], low word and high word."""

    stop_ids: jax.Array
    """int32 [B, 8], padded with -1; tokens that end a row inside a decode loop."""

    limits: jax.Array
    """int32 [B], tokens that a row may generate in this launch; 0: it does not sample."""

    chunks: ChunkInputs | None
    """What only a mixed program needs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What stays on the device between steps; donated whole, returned whole."""

    caches: tuple[LayerCache, ...]
    last_token: jax.Array
    """int32 [rows + 1], the last token sampled for each row; one spare for padding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledLogprobs:
    """Log-probabilities of the sampled tokens, from the raw logits."""

    chosen: jax.Array
    """float32 [B, N], of the sampled token."""

    rank: jax.Array
    """int32 [B, N], tokens at least as likely as it."""

    top_ids: jax.Array
    """int32 [B, N, k], the likeliest tokens."""

    top: jax.Array
    """float32 [B, N, k], theirs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutputs:
    """What a step gives."""

    tokens: jax.Array
    """int32 [B, N]."""

    num_tokens: jax.Array
    """int32 [B], how many of a row's tokens count."""

    finite: jax.Array
    """bool [B], whether the row's logits were finite."""

    logprobs: SampledLogprobs | None = None


Field = tuple[tuple[int, ...], np.dtype]


def fields(bucket: Bucket) -> dict[str, Field]:
    """Returns shape and dtype of every input of a program, in the buffer's order."""
    t, b, m, nq = bucket.tokens, bucket.rows, bucket.width, bucket.query_blocks
    i32, f32, u32 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)
    table: dict[str, Field] = {
        "tokens": ((t,), i32),
        "positions": ((1, t), i32),
        "rows": ((b,), i32),
        "page_table": ((NUM_GROUPS, b, m), i32),
        "kv_lens": ((b,), i32),
        "num_decodes": ((), i32),
        "temperature": ((b,), f32),
        "seeds": ((b, 2), u32),
        "stop_ids": ((b, MAX_STOP_IDS), i32),
        "limits": ((b,), i32),
    }
    if not bucket.is_decode:
        table |= {
            "slot_mapping": ((NUM_GROUPS, t), i32),
            "q_block_seq": ((nq,), i32),
            "q_block_start": ((nq,), i32),
            "num_blocks": ((), i32),
            "logit_rows": ((b,), i32),
        }
    return table


def buffer_size(bucket: Bucket) -> int:
    """Returns the length of the packed buffer, in int32."""
    return sum(math.prod(shape) for shape, _ in fields(bucket).values())


def pack(bucket: Bucket, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns int32 [buffer_size]: the values, in order, bit for bit."""
    parts = []
    for name, (shape, dtype) in fields(bucket).items():
        value = values[name]
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(f"{name} is {value.dtype}{value.shape}, not {dtype}{shape}.")
        parts.append(value.reshape(-1).view(np.int32))
    return np.concatenate(parts)


def unpack(bucket: Bucket, buffer: jax.Array) -> StepInputs:
    """Returns the fields of a packed buffer; slices and bit casts only."""
    values, at = {}, 0
    for name, (shape, dtype) in fields(bucket).items():
        size = math.prod(shape)
        value = buffer[at : at + size].reshape(shape)
        if dtype != np.int32:
            value = jax.lax.bitcast_convert_type(value, jnp.dtype(dtype))
        values[name] = value
        at += size
    if bucket.is_decode:
        return StepInputs(**values, chunks=None)
    names = [field.name for field in dataclasses.fields(ChunkInputs)]
    chunks = ChunkInputs(**{name: values.pop(name) for name in names})
    return StepInputs(**values, chunks=chunks)
