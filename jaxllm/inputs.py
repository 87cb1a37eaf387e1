"""What a step takes and gives on the device, and the one buffer it travels in.

All numbers of a step are packed into one int32 buffer on the host (floats and
unsigned words bit for bit), sent with one `device_put`, and unpacked by static
slices inside the program.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.buckets import Bucket
from jaxllm.flags import SamplingFlags
from jaxllm.pallas_kernels.attention import LayerCache
from jaxllm.sequence import MAX_STOP_IDS

IN_PROMPT = 1 << 30
"""In `token_counts`: the token occurs in the prompt."""

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
class SamplingInputs:
    """How each row's token is chosen; None where the program's flags leave it out."""

    temperature: jax.Array
    """float32 [B]; 0 is greedy."""

    seeds: jax.Array
    """uint32 [B, 2], low word and high word."""

    min_p: jax.Array | None = None
    """float32 [B]; 0 is off."""

    top_k: jax.Array | None = None
    """int32 [B]; V or more is off."""

    top_p: jax.Array | None = None
    """float32 [B]; 1 is off."""

    repetition_penalty: jax.Array | None = None
    """float32 [B]."""

    frequency_penalty: jax.Array | None = None
    """float32 [B]."""

    presence_penalty: jax.Array | None = None
    """float32 [B]."""

    edit_ids: jax.Array | None = None
    """int32 [B, K], tokens whose logits are edited."""

    edit_values: jax.Array | None = None
    """float32 [B, K], what is added."""

    edit_until: jax.Array | None = None
    """int32 [B, K], length of the row from which an edit has ended; 0 for padding."""

    mask: jax.Array | None = None
    """uint32 [B, V/32], bit i of word w allows token 32 w + i."""

    logprob_ids: jax.Array | None = None
    """int32 [B, J], tokens whose log-probabilities are wanted beside the sampled one's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreInputs:
    """Given tokens whose log-probabilities are wanted."""

    scored: jax.Array
    """int32 [T], tokens of the step whose successors are scored; the first ones count."""

    targets: jax.Array
    """int32 [T], the successors."""

    num_scored: jax.Array
    """int32 []."""


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

    num_tokens: jax.Array
    """int32 [], tokens that are no padding, which come first."""

    num_decodes: jax.Array
    """int32 [], rows with one token, which come first."""

    stop_ids: jax.Array
    """int32 [B, 8], padded with -1; tokens that end a row inside a decode loop."""

    limits: jax.Array
    """int32 [B], tokens that a row may generate in this launch; 0: it does not sample."""

    sampling: SamplingInputs

    chunks: ChunkInputs | None
    """What only a mixed program needs."""

    score: ScoreInputs | None
    """What only a program that scores given tokens needs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What stays on the device between steps; donated whole, returned whole."""

    caches: tuple[LayerCache, ...]
    last_token: jax.Array
    """int32 [rows + 1], the last token sampled for each row; one spare for padding."""

    token_counts: jax.Array | None = None
    """int32 [rows + 1, V], how often each row has generated a token, plus `IN_PROMPT` where
    its prompt holds it; only in programs with penalties."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledLogprobs:
    """Log-probabilities of the sampled tokens; logits, where `logprobs_mode` says so."""

    chosen: jax.Array
    """float32 [B, N], of the sampled token."""

    rank: jax.Array
    """int32 [B, N], tokens at least as likely as it."""

    top_ids: jax.Array
    """int32 [B, N, k], the likeliest tokens."""

    top: jax.Array
    """float32 [B, N, k], theirs."""

    named: jax.Array | None = None
    """float32 [B, N, J], of the tokens the caller named."""

    named_rank: jax.Array | None = None
    """int32 [B, N, J]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Log-probabilities of given tokens, from the raw logits."""

    logprobs: jax.Array
    """float32 [T]; the first `num_scored` count."""

    ranks: jax.Array
    """int32 [T]."""

    top_ids: jax.Array
    """int32 [T, k]."""

    top: jax.Array
    """float32 [T, k]."""


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

    possible: jax.Array
    """bool [B], whether the row's rules left any token to choose."""

    logprobs: SampledLogprobs | None = None
    scores: Scores | None = None


Field = tuple[tuple[int, ...], np.dtype]
Part = TypeVar("Part")

I32, F32, U32 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)


def fields(bucket: Bucket, flags: SamplingFlags) -> dict[str, Field]:
    """Returns shape and dtype of every input of a program, in the buffer's order."""
    t, b, m, nq = bucket.tokens, bucket.rows, bucket.width, bucket.query_blocks
    table: dict[str, Field] = {
        "tokens": ((t,), I32),
        "positions": ((1, t), I32),
        "rows": ((b,), I32),
        "page_table": ((NUM_GROUPS, b, m), I32),
        "kv_lens": ((b,), I32),
        "num_tokens": ((), I32),
        "num_decodes": ((), I32),
        "stop_ids": ((b, MAX_STOP_IDS), I32),
        "limits": ((b,), I32),
    }
    if not bucket.is_decode:
        table |= {
            "slot_mapping": ((NUM_GROUPS, t), I32),
            "q_block_seq": ((nq,), I32),
            "q_block_start": ((nq,), I32),
            "num_blocks": ((), I32),
            "logit_rows": ((b,), I32),
        }
    return table | sampling_fields(b, flags) | score_fields(t, flags)


def sampling_fields(b: int, flags: SamplingFlags) -> dict[str, Field]:
    """Returns what the sampler of a program takes for each of its B rows."""
    table: dict[str, Field] = {"temperature": ((b,), F32), "seeds": ((b, 2), U32)}
    if flags.min_p:
        table |= {"min_p": ((b,), F32)}
    if flags.top_k:
        table |= {"top_k": ((b,), I32)}
    if flags.top_p:
        table |= {"top_p": ((b,), F32)}
    if flags.penalties:
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        table |= {name: ((b,), F32) for name in names}
    if k := flags.edits:
        table |= {"edit_ids": ((b, k), I32), "edit_values": ((b, k), F32)}
        table |= {"edit_until": ((b, k), I32)}
    if flags.mask_words:
        table |= {"mask": ((b, flags.mask_words), U32)}
    if flags.logprob_ids:
        table |= {"logprob_ids": ((b, flags.logprob_ids), I32)}
    return table


def score_fields(t: int, flags: SamplingFlags) -> dict[str, Field]:
    """Returns what a program that scores given tokens takes."""
    if flags.scored is None:
        return {}
    return {"scored": ((t,), I32), "targets": ((t,), I32), "num_scored": ((), I32)}


def buffer_size(bucket: Bucket, flags: SamplingFlags) -> int:
    """Returns the length of the packed buffer, in int32."""
    return sum(math.prod(shape) for shape, _ in fields(bucket, flags).values())


def pack(bucket: Bucket, flags: SamplingFlags, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns int32 [buffer_size]: the values, in order, bit for bit."""
    parts = []
    for name, (shape, dtype) in fields(bucket, flags).items():
        value = values[name]
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(f"{name} is {value.dtype}{value.shape}, not {dtype}{shape}.")
        parts.append(value.reshape(-1).view(np.int32))
    return np.concatenate(parts)


def unpack(bucket: Bucket, flags: SamplingFlags, buffer: jax.Array) -> StepInputs:
    """Returns the fields of a packed buffer; slices and bit casts only."""
    values, at = {}, 0
    for name, (shape, dtype) in fields(bucket, flags).items():
        size = math.prod(shape)
        value = buffer[at : at + size].reshape(shape)
        if dtype != np.int32:
            value = jax.lax.bitcast_convert_type(value, jnp.dtype(dtype))
        values[name] = value
        at += size

    def part(cls: type[Part]) -> Part:
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: values.pop(name) for name in names if name in values})

    return StepInputs(
        sampling=part(SamplingInputs),
        chunks=None if bucket.is_decode else part(ChunkInputs),
        score=None if flags.scored is None else part(ScoreInputs),
        **values,
    )
