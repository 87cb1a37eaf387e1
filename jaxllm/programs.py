"""The two programs of the engine, built from shapes alone.

`mixed_step` computes chunks of prompts together with decodes; `decode_steps`
computes one token after another for rows that only decode. Each is one dispatch,
embedding to sampling. Both have the form

    (params, state, buffer) -> (state, StepOutputs)

with the state donated. A program is a function of a `ProgramKey` and of what the
builder holds: model, engine config, layout and mesh, never arrays. So the same
builder serves real runs and compilation for a GPU where there is none.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import jax
import jax.numpy as jnp

from jaxllm.buckets import Bucket, powers_of_two
from jaxllm.cache.kv_cache import abstract_caches
from jaxllm.config import EngineConfig
from jaxllm.flags import NO_FLAGS, SamplingFlags
from jaxllm.inputs import (
    IN_PROMPT,
    DeviceState,
    StepInputs,
    StepOutputs,
    buffer_size,
    unpack,
)
from jaxllm.modeling.abstract import AbstractModel
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.layers.computed import Computed
from jaxllm.modeling.layers.linear import Product
from jaxllm.modeling.layers.norm import Norm
from jaxllm.native.build import target_for
from jaxllm.pallas_kernels.attention import (
    PagedAttend,
    QueryBlocks,
    Tuning,
    compiled_tuning_for,
)
from jaxllm.sampler import Vocabulary, choose, score_tokens
from jaxllm.settings import compiler_options, platform_of
from jaxllm.sharding.apply import Sharder


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """Which program: its shapes and its few static choices."""

    bucket: Bucket
    steps: int = 1
    """Tokens a row may generate in one launch (N)."""

    flags: SamplingFlags = NO_FLAGS
    """What the batch asks of the sampler."""

    def __str__(self) -> str:
        """A short name for progress lines and statistics."""
        b = self.bucket
        kind = "mixed" if b.decode_rows else "prefill"
        shape = f"decode[{b.rows}]" if b.is_decode else f"{kind}[{b.tokens}x{b.rows}]"
        return f"{shape} x{self.steps} width {b.width} {self.flags}".rstrip()

    def serves(self, other: "ProgramKey") -> bool:
        """Whether this program computes all that the other would, with more padding."""
        mine, its = self.bucket, other.bucket
        pairs = (
            (mine.tokens, its.tokens),
            (mine.rows, its.rows),
            (mine.width, its.width),
            (mine.decode_rows, its.decode_rows),
            (mine.query_blocks, its.query_blocks),
        )
        return (
            mine.is_decode == its.is_decode
            and self.steps == other.steps
            and all(a >= b for a, b in pairs)
            and self.flags.serves(other.flags)
        )

    def changes(self, other: "ProgramKey") -> tuple[str, ...]:
        """Returns what is different in the other, such as "rows 8 -> 16" or "flags +top_k"."""
        if self.bucket.is_decode != other.bucket.is_decode:
            kinds = ["decode" if k.bucket.is_decode else "mixed" for k in (self, other)]
            return (f"{kinds[0]} -> {kinds[1]}",)
        names = [field.name for field in fields(Bucket)]
        if self.bucket.is_decode:  # which follow from its rows
            names = [name for name in names if name not in ("tokens", "decode_rows")]
        found = [(name, getattr(self.bucket, name), getattr(other.bucket, name)) for name in names]
        found.append(("steps", self.steps, other.steps))
        changed = [f"{name} {a} -> {b}" for name, a, b in found if a != b]
        words = [set(str(k.flags).split()) for k in (self, other)]
        flags = [f"+{word}" for word in sorted(words[1] - words[0])]
        flags += [f"-{word}" for word in sorted(words[0] - words[1])]
        return (*changed, *([f"flags {' '.join(flags)}"] if flags else []))


@dataclass(frozen=True, slots=True)
class CountKey:
    """The program that sets the token counts of one row (`count_tokens`)."""

    tokens: int
    """Most tokens of the row (N)."""

    def __str__(self) -> str:
        """A short name for progress lines and statistics."""
        return f"count_tokens[{self.tokens}]"

    def serves(self, other: "CountKey") -> bool:
        """Whether this program computes all that the other would, with more padding."""
        return self.tokens >= other.tokens

    def changes(self, other: "CountKey") -> tuple[str, ...]:
        """Returns what is different in the other."""
        return (f"tokens {self.tokens} -> {other.tokens}",) if self != other else ()


MIN_COUNTED = 256
"""Tokens of the smallest program that counts; larger ones are powers of two."""


def count_key(num_tokens: int) -> CountKey:
    """Returns the program that counts so many tokens of a row."""
    return CountKey(powers_of_two(MIN_COUNTED, num_tokens)[-1])


Key = ProgramKey | CountKey
"""Names any program of an engine."""


@dataclass(frozen=True, slots=True)
class ProgramBuilder:
    """Everything that all programs of one engine have in common."""

    model: AbstractModel
    engine: EngineConfig
    sharder: Sharder
    num_pages: int

    def state_shapes(self, *, counts: bool = False) -> DeviceState:
        """Returns shapes and shardings of the device state, with the token counts or without."""
        caches = abstract_caches(
            self.model.cache_specs,
            self.num_pages,
            self.engine.page_size,
            self.engine.dtype,
            self.sharder,
            self.tuning,
        )
        last_token = jax.ShapeDtypeStruct(
            (self.engine.max_num_seqs + 1,), jnp.int32, sharding=self.sharder.sharding(None)
        )
        token_counts = self.counts_shape() if counts else None
        return DeviceState(caches, cast("jax.Array", last_token), cast("jax.Array", token_counts))

    def counts_shape(self) -> jax.ShapeDtypeStruct:
        """Returns the shape and sharding of `DeviceState.token_counts`."""
        return jax.ShapeDtypeStruct(
            (self.engine.max_num_seqs + 1, self.model.num_logits),
            jnp.int32,
            sharding=self.sharder.sharding(None, "vocab"),
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """How the columns of the logits are to be read."""
        kernel = target_for("greatest", *self._where)
        return Vocabulary(self.model.vocab_size, self.sharder, kernel)

    @property
    def tuning(self) -> Tuning:
        """How attention works here. Asked for the first time, it may compile a kernel."""
        return compiled_tuning_for(*self._where)

    @property
    def kernels(self) -> dict[type[Computed], str]:
        """What computes products with weights and norms here, as `AbstractModel.merge`."""
        return {
            Product: target_for("linear", *self._where),
            Norm: target_for("norm", *self._where),
        }

    @property
    def _where(self) -> tuple[str, int, str]:
        """Platform, devices and element type, which decide what is a compiled kernel."""
        mesh = self.sharder.mesh
        return mesh.devices.flat[0].platform, mesh.size, self.engine.dtype

    def logits(self, model: Decoder, hidden: jax.Array) -> jax.Array:
        """[R, E] -> float32 [R, V], each device with its share of the vocabulary."""
        return self.sharder.pin(model.logits(hidden), None, "vocab")

    def lower(self, key: Key) -> jax.stages.Lowered:
        """Traces and lowers a program for the builder's mesh."""
        return self._lower_step(key) if isinstance(key, ProgramKey) else self._lower_count(key)

    def _lower_count(self, key: CountKey) -> jax.stages.Lowered:
        counts, everywhere = self.counts_shape(), self.sharder.sharding()
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        tokens = jax.ShapeDtypeStruct((key.tokens,), jnp.int32, sharding=everywhere)
        jitted = jax.jit(count_tokens, donate_argnums=0, out_shardings=counts.sharding)
        with jax.set_mesh(self.sharder.mesh):
            return jitted.lower(counts, number, tokens, number, number)

    def _lower_step(self, key: ProgramKey) -> jax.stages.Lowered:
        state = self.state_shapes(counts=key.flags.penalties)
        everywhere = self.sharder.sharding()
        size = buffer_size(key.bucket, key.flags)
        buffer = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=everywhere)
        body = decode_steps if key.bucket.is_decode else mixed_step

        def program(
            params: Sequence[jax.Array], state: DeviceState, buffer: jax.Array
        ) -> tuple[DeviceState, StepOutputs]:
            inputs = self.sharder.everywhere(unpack(key.bucket, key.flags, buffer))
            model = self.model.merge(params, self.kernels, inputs.num_tokens)
            return body(self, key, model, state, inputs)

        shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), everywhere)
        platform = platform_of(self.sharder.mesh.devices.flat[0])
        jitted = jax.jit(
            program,
            donate_argnums=1,
            out_shardings=shardings,
            compiler_options=compiler_options(platform) or None,
        )
        with jax.set_mesh(self.sharder.mesh):
            return jitted.trace(self.model.shapes, state, buffer).lower()

    def attend(self, key: ProgramKey, inputs: StepInputs, slots: jax.Array) -> PagedAttend:
        """Returns the attention of a step's tokens.

        Args:
            key: Of the program.
            inputs: Of the step.
            slots: int32 [T], where each token is written.
        """
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
            tuning=self.tuning.over(self.sharder.layout.split("kv_heads")),
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
    tokens = builder.sharder.everywhere(jnp.where(inputs.tokens < 0, held, inputs.tokens))
    attend = builder.attend(key, inputs, chunks.slot_mapping[0])
    hidden, caches = model(
        tokens, inputs.positions[0], state.caches, attend, builder.sharder
    )  # [T, E]
    logits = builder.logits(model, hidden[chunks.logit_rows])  # [B, V]
    outputs, counts = _choose(builder, key, logits, inputs, state.token_counts)
    if inputs.score is not None and key.flags.scored is not None:
        score = inputs.score
        scores = score_tokens(
            hidden,
            functools.partial(builder.logits, model),
            score.scored,
            score.targets,
            score.num_scored,
            min(key.flags.scored, logits.shape[1]),
            chunk=key.bucket.rows,
            vocabulary=builder.vocabulary,
        )
        outputs = replace(outputs, scores=scores)
    rows = _writable_rows(inputs, state.last_token.shape[0])
    last_token = state.last_token.at[rows].set(outputs.tokens[:, 0])
    return DeviceState(caches, last_token, counts), outputs


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
    page_size, everywhere = builder.engine.page_size, builder.sharder.everywhere
    held = state.last_token[inputs.rows]
    tokens = jnp.where(inputs.tokens < 0, held, inputs.tokens)

    def step(carry: tuple) -> tuple[tuple, StepOutputs]:
        caches, tokens, kv_lens, num_left, counts = carry
        live = num_left > 0
        positions = jnp.maximum(kv_lens - 1, 0)
        page = jnp.take_along_axis(
            inputs.page_table[0], (positions // page_size)[:, None], axis=1, mode="clip"
        )[:, 0]
        slots = jnp.where(live, page * page_size + positions % page_size, 0)
        now = replace(inputs, kv_lens=jnp.where(live, kv_lens, 0), limits=num_left)
        now, tokens, positions, slots = everywhere((now, tokens, positions, slots))
        attend = builder.attend(key, now, slots)
        hidden, caches = model(tokens, positions, caches, attend, builder.sharder)  # [B, E]
        out, counts = _choose(builder, key, builder.logits(model, hidden), now, counts)
        token = out.tokens[:, 0]
        stopped = jnp.any(token[:, None] == inputs.stop_ids, axis=1)
        num_left = jnp.where(stopped, 0, num_left - live.astype(jnp.int32))
        tokens = jnp.where(live, token, tokens)
        return (caches, tokens, kv_lens + 1, num_left, counts), out

    carry = (state.caches, tokens, inputs.kv_lens, inputs.limits, state.token_counts)
    if key.steps == 1:
        carry, outputs = step(carry)
    else:
        carry, outputs = _repeat(step, carry, key.steps)
    caches, tokens, counts = carry[0], carry[1], carry[4]
    last_token = state.last_token.at[inputs.rows].set(tokens)
    return DeviceState(caches, last_token, counts), outputs


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
        possible=jnp.all(stacked.possible, axis=0),
        logprobs=jax.tree.map(join, stacked.logprobs),
    )
    return carry, outputs


def _choose(
    builder: ProgramBuilder,
    key: ProgramKey,
    logits: jax.Array,
    inputs: StepInputs,
    counts: jax.Array | None,
) -> tuple[StepOutputs, jax.Array | None]:
    """Returns a token a row, and the token counts with it, where the program keeps them."""
    held = None if counts is None else counts[inputs.rows]  # [B, V]
    mode, vocabulary = builder.engine.logprobs_mode, builder.vocabulary
    outputs = choose(logits, inputs, held, key.flags, mode, vocabulary)
    outputs = builder.sharder.everywhere(outputs)
    if counts is not None:
        rows = _writable_rows(inputs, counts.shape[0])
        counts = counts.at[rows, outputs.tokens[:, 0]].add(1)
    return outputs, counts


def _writable_rows(inputs: StepInputs, num_rows: int) -> jax.Array:
    """int32 [B], the rows that generate a token here; the spare one in place of the others."""
    return jnp.where(inputs.limits > 0, inputs.rows, num_rows - 1)


def count_tokens(
    counts: jax.Array, row: jax.Array, tokens: jax.Array, num_prompt: jax.Array, num: jax.Array
) -> jax.Array:
    """Sets the counts of a row to those of a sequence.

    Args:
        counts: int32 [rows + 1, V], donated.
        row: int32 [].
        tokens: int32 [N], prompt and output, then padding.
        num_prompt: int32 [], tokens of the prompt.
        num: int32 [], tokens of both.
    """
    at = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    nowhere = counts.shape[1]
    in_prompt = jnp.where(at < num_prompt, tokens, nowhere)
    in_output = jnp.where((at >= num_prompt) & (at < num), tokens, nowhere)
    fresh = jnp.zeros(counts.shape[1], counts.dtype)
    fresh = fresh.at[in_output].add(1, mode="drop")
    fresh = fresh + jnp.zeros_like(fresh).at[in_prompt].set(IN_PROMPT, mode="drop")
    return jax.lax.dynamic_update_slice(counts, fresh[None], (row, jnp.int32(0)))
