"""The two programs of the engine, built from shapes alone.

`mixed_step` computes chunks of prompts together with decodes; `decode_steps`
computes one token after another for rows that only decode. Each is one dispatch,
embedding to sampling. Both have the form

    (params, state, buffer) -> (state, StepOutputs)

with the state donated. A program is a function of a `ProgramKey` and of what the
builder holds: model, engine config, layout and mesh, never arrays. So the same
builder serves real runs and compilation for a GPU where there is none.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxllm.buckets import Bucket
from jaxllm.cache.kv_cache import abstract_caches
from jaxllm.config import EngineConfig
from jaxllm.inputs import DeviceState, StepInputs, StepOutputs, buffer_size, unpack
from jaxllm.modeling.abstract import AbstractModel
from jaxllm.modeling.decoder import Decoder
from jaxllm.pallas_kernels.attention import PagedAttend, QueryBlocks, tuning_for
from jaxllm.sampler import logprobs_of, sample
from jaxllm.sharding.apply import Sharder


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """Which program: its shapes and its few static choices."""

    bucket: Bucket
    steps: int = 1
    """Tokens a row may generate in one launch (N)."""

    sampled: bool = False
    """Whether any row draws at random; a greedy program has no random numbers."""

    logprobs: int | None = None
    """Alternatives to return for each token; None: no log-probabilities."""

    def __str__(self) -> str:
        """A short name for progress lines and statistics."""
        b = self.bucket
        shape = f"decode[{b.rows}]" if b.is_decode else f"mixed[{b.tokens}x{b.rows}]"
        flags = ["sampled"] * self.sampled
        flags += [f"logprobs={self.logprobs}"] * (self.logprobs is not None)
        return " ".join([f"{shape} x{self.steps} width {b.width}", *flags])


@dataclass(frozen=True, slots=True)
class ProgramBuilder:
    """Everything that all programs of one engine have in common."""

    model: AbstractModel
    engine: EngineConfig
    sharder: Sharder
    num_pages: int

    def state_shapes(self) -> DeviceState:
        """Returns shapes and shardings of the device state."""
        caches = abstract_caches(
            self.model.cache_specs,
            self.num_pages,
            self.engine.page_size,
            self.engine.dtype,
            self.sharder,
        )
        last_token = jax.ShapeDtypeStruct(
            (self.engine.max_num_seqs + 1,), jnp.int32, sharding=self.sharder.sharding(None)
        )
        return DeviceState(caches, cast("jax.Array", last_token))

    def lower(self, key: ProgramKey) -> jax.stages.Lowered:
        """Traces and lowers a program for the builder's mesh."""
        state = self.state_shapes()
        everywhere = self.sharder.sharding()
        buffer = jax.ShapeDtypeStruct((buffer_size(key.bucket),), jnp.int32, sharding=everywhere)
        body = decode_steps if key.bucket.is_decode else mixed_step

        def program(
            params: Sequence[jax.Array], state: DeviceState, buffer: jax.Array
        ) -> tuple[DeviceState, StepOutputs]:
            model, inputs = self.model.merge(params), unpack(key.bucket, buffer)
            return body(self, key, model, state, inputs)

        shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), everywhere)
        jitted = jax.jit(program, donate_argnums=1, out_shardings=shardings)
        with jax.set_mesh(self.sharder.mesh):
            return jitted.trace(self.model.shapes, state, buffer).lower()

    def attend(self, key: ProgramKey, inputs: StepInputs, slots: jax.Array) -> PagedAttend:
        """Returns the attention of a step's tokens.

        Args:
            key: Of the program.
            inputs: Of the step.
            slots: int32 [T], where each token is written.
        """
        platform = self.sharder.mesh.devices.flat[0].platform
        chunks, blocks = inputs.chunks, None
        if chunks is not None:
            blocks = QueryBlocks(
                chunks.q_block_seq, chunks.q_block_start, inputs.positions[0], chunks.num_blocks
            )
        return PagedAttend(
            slot_mapping=slots,
            page_table=inputs.page_table[0],
            kv_lens=inputs.kv_lens,
            num_decodes=inputs.num_decodes,
            blocks=blocks,
            tuning=tuning_for(platform),
            decode_rows=key.bucket.decode_rows,
            block_q=self.engine.block_q,
        )


def mixed_step(
    builder: ProgramBuilder,
    key: ProgramKey,
    model: Decoder,
    state: DeviceState,
    inputs: StepInputs,
) -> tuple[DeviceState, StepOutputs]:
    """Runs one step of chunks and decodes; samples rows whose last token it computes."""
    chunks = inputs.chunks
    if chunks is None:
        raise ValueError("mixed_step was given the inputs of a decode program.")
    # Decodes come first, one token each, so that token i of them is of row i.
    held = jnp.zeros_like(inputs.tokens)
    held = held.at[: key.bucket.decode_rows].set(
        state.last_token[inputs.rows[: key.bucket.decode_rows]]
    )
    tokens = jnp.where(inputs.tokens < 0, held, inputs.tokens)
    attend = builder.attend(key, inputs, chunks.slot_mapping[0])
    hidden, caches = model(
        tokens, inputs.positions[0], state.caches, attend, builder.sharder
    )  # [T, E]
    logits = model.logits(hidden[chunks.logit_rows])  # [B, V]
    outputs = _choose(key, logits, inputs)
    spare = state.last_token.shape[0] - 1
    rows = jnp.where(inputs.limits > 0, inputs.rows, spare)
    last_token = state.last_token.at[rows].set(outputs.tokens[:, 0])
    return DeviceState(caches, last_token), outputs


def decode_steps(
    builder: ProgramBuilder,
    key: ProgramKey,
    model: Decoder,
    state: DeviceState,
    inputs: StepInputs,
) -> tuple[DeviceState, StepOutputs]:
    """Runs N steps of rows that decode, feeding each token back on the device.

    The trip count is fixed: a loop that ended with its last row would make a GPU
    wait for the host in every iteration. A finished row goes on as padding: its
    length is 0 and it writes to the trash page.
    """
    page_size = builder.engine.page_size
    held = state.last_token[inputs.rows]
    tokens = jnp.where(inputs.tokens < 0, held, inputs.tokens)

    def step(carry: tuple) -> tuple[tuple, StepOutputs]:
        caches, tokens, kv_lens, num_left = carry
        live = num_left > 0
        positions = jnp.maximum(kv_lens - 1, 0)
        page = jnp.take_along_axis(
            inputs.page_table[0], (positions // page_size)[:, None], axis=1, mode="clip"
        )[:, 0]
        slots = jnp.where(live, page * page_size + positions % page_size, 0)
        now = replace(inputs, kv_lens=jnp.where(live, kv_lens, 0), limits=num_left)
        attend = builder.attend(key, now, slots)
        hidden, caches = model(tokens, positions, caches, attend, builder.sharder)  # [B, E]
        out = _choose(key, model.logits(hidden), now)
        token = out.tokens[:, 0]
        stopped = jnp.any(token[:, None] == inputs.stop_ids, axis=1)
        num_left = jnp.where(stopped, 0, num_left - live.astype(jnp.int32))
        tokens = jnp.where(live, token, tokens)
        return (caches, tokens, kv_lens + 1, num_left), out

    carry = (state.caches, tokens, inputs.kv_lens, inputs.limits)
    if key.steps == 1:
        carry, outputs = step(carry)
    else:
        carry, outputs = _repeat(step, carry, key.steps)
    caches, tokens = carry[0], carry[1]
    last_token = state.last_token.at[inputs.rows].set(tokens)
    return DeviceState(caches, last_token), outputs


def _repeat(
    step: Callable[[tuple], tuple[tuple, StepOutputs]], carry: tuple, steps: int
) -> tuple[tuple, StepOutputs]:
    """Runs `step` N times and joins its outputs along N."""
    carry, stacked = jax.lax.scan(lambda c, _: step(c), carry, None, length=steps)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x[:, :, 0], 0, 1)  # [N, B, 1, ...] -> [B, N, ...]

    outputs = StepOutputs(
        tokens=join(stacked.tokens),
        num_tokens=jnp.sum(stacked.num_tokens, axis=0, dtype=jnp.int32),
        finite=jnp.all(stacked.finite, axis=0),
        logprobs=jax.tree.map(join, stacked.logprobs),
    )
    return carry, outputs


def _choose(key: ProgramKey, logits: jax.Array, inputs: StepInputs) -> StepOutputs:
    """Returns a token a row, for rows that may generate one."""
    live = inputs.limits > 0
    if key.sampled:
        tokens = sample(logits, inputs.temperature, inputs.seeds, inputs.kv_lens)
    else:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # A NaN or +inf makes the maximum so; rows that do not sample may hold anything.
    finite = jnp.isfinite(jnp.max(logits, axis=-1)) | ~live
    logprobs = None if key.logprobs is None else logprobs_of(logits, tokens, key.logprobs)
    return StepOutputs(tokens[:, None], live.astype(jnp.int32), finite, logprobs)


class ProgramCache:
    """Compiled programs by key; compiles on first use, and counts."""

    def __init__(self, builder: ProgramBuilder) -> None:
        self.builder = builder
        self.seconds: dict[ProgramKey, float] = {}
        """How long each program took to trace and compile."""

        self._programs: dict[ProgramKey, Callable[..., Any]] = {}

    def get(self, key: ProgramKey) -> Callable[..., tuple[DeviceState, StepOutputs]]:
        """Returns the compiled program; it accepts exactly the shapes it was built for."""
        if key not in self._programs:
            start = time.perf_counter()
            program = self.builder.lower(key).compile()
            # In this order: an interrupt between the two must not leave a program without a time.
            self.seconds[key] = time.perf_counter() - start
            self._programs[key] = program
        return self._programs[key]

    def clear(self) -> None:
        """Drops every program."""
        self._programs.clear()
