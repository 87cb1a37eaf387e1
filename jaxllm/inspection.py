"""`inspect`: one of the engine's programs, compiled and told in figures.

A program is a function of shapes, so it can be looked at for a model that runs, for
one of which there is no more than config.json, and for a GPU that is not here.
"""

import html
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxllm import thunks
from jaxllm.buckets import Bucket, Buckets, at_least
from jaxllm.cache.memory import temp_bound
from jaxllm.config import EngineConfig
from jaxllm.devices import Room, room_on
from jaxllm.errors import ConfigError, nearest
from jaxllm.loading import (
    Wishes,
    fit_cache,
    memory_fraction,
    reserve_device_memory,
    resolve,
    stated_dtype,
)
from jaxllm.modeling import registry
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.fitting import fit
from jaxllm.planner import model_name, read_config
from jaxllm.program_report import ProgramReport, Write, report
from jaxllm.programs import ProgramBuilder, ProgramKey
from jaxllm.roofline import weights_read
from jaxllm.sampling_params import as_integer
from jaxllm.sharding.apply import Sharder
from jaxllm.sharding.gpu_topology import CARDS, compile_only, gpu_devices
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh
from jaxllm.thunks import Thunk

PROGRAMS = ("decode", "mixed", "prefill")

WEIGHTS, CACHE = "params", "state.caches"
"""How the paths of the programs' arguments begin."""

COPY_BYTES = 1 << 16
"""Smaller copies of weights, such as norms, are of no account."""

DEFAULT_ROWS = 8
DEFAULT_TOKENS = 512
DEFAULT_CONTEXT = 1024

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, slots=True)
class Ideal:
    """Bytes that a step cannot do without, on each device."""

    weights: int
    """Each weight once; of tables that are only looked up, nothing."""

    cache_read: int
    """Keys and values of every row, as many as its page table has."""

    cache_written: int
    """Keys and values of every token of the step."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache_read + self.cache_written


@dataclass(frozen=True, slots=True)
class Inspection:
    """A compiled program: its memory, its traffic, its launches. Sizes are those of one device."""

    model: str
    key: ProgramKey
    device: str
    """How many of which."""

    dtype: str
    num_layers: int
    report: ProgramReport = field(repr=False)
    ideal: Ideal
    """Of one step."""

    state_bytes: int
    """Cache and last tokens: what a program updates in its own memory."""

    temp_bound: int
    """What `cache.memory.temp_bound` allows for this program."""

    compile_seconds: float
    """Tracing and compiling."""

    hlo: str = field(repr=False)
    """The optimised program."""

    thunks: tuple[Thunk, ...] | None = field(repr=False)
    """What a GPU is told to do; None on CPU."""

    @property
    def alias_bytes(self) -> int:
        """Bytes of the state whose memory the results take over."""
        return self.report.alias_bytes

    @property
    def temp_bytes(self) -> int:
        """Bytes of intermediate arrays at once."""
        return self.report.temp_bytes

    @property
    def weights_read(self) -> int:
        """Bytes of weights that a step reads; one that two instructions read counts twice."""
        return self.report.bytes_read(WEIGHTS) // self.key.steps

    @property
    def cache_read(self) -> int:
        """Bytes of keys and values that a step reads from the cache."""
        return self.report.bytes_read(CACHE) // self.key.steps

    @property
    def cache_written(self) -> int:
        """Bytes of keys and values that a step writes into the cache."""
        return self.report.bytes_written(CACHE) // self.key.steps

    @property
    def other_bytes(self) -> int:
        """All else that a step reads and writes: activations, gathered keys, logits."""
        known = self.weights_read + self.cache_read + self.cache_written
        return self.bytes_accessed - known

    @property
    def bytes_accessed(self) -> int:
        """All bytes that a step reads and writes."""
        return self.report.bytes_accessed // self.key.steps

    @property
    def kernels_per_step(self) -> float:
        """Launches of a step; on a GPU a graph has many, and is one launch of the host."""
        return self.report.num_launches() / self.key.steps

    @property
    def kernels_per_layer(self) -> float:
        """Those of them that belong to a layer."""
        return self.report.num_launches(within="_run_layer") / self.key.steps / self.num_layers

    @property
    def copies(self) -> tuple[Write, ...]:
        """Copies of weights or cache, or of slices of them, in any form."""
        return tuple(self.report.copied((WEIGHTS, CACHE), COPY_BYTES))

    @property
    def step_thunks(self) -> tuple[Thunk, ...] | None:
        """What a GPU does in one step: the body of the loop over steps, or the whole program."""
        if self.thunks is None or self.key.steps == 1:
            return self.thunks
        outer = next((t for t in self.thunks if t.kind == thunks.LOOP), None)
        return self.thunks if outer is None else tuple(outer.part("body"))

    @property
    def is_one_graph(self) -> bool | None:
        """Whether a step is a single CUDA graph; None on CPU."""
        step = self.step_thunks
        return None if step is None else thunks.is_one_graph(step)

    @property
    def rows(self) -> dict[str, str]:
        """The figures in words, by what they are of."""
        found, ideal = self.report, self.ideal
        whole = "all" if self.alias_bytes == self.state_bytes else "NOT all"
        return {
            "program": f"{self.key}, {self.model} in {self.dtype} on {self.device}",
            "arguments": _bytes(found.argument_bytes),
            "aliased": f"{_bytes(self.alias_bytes)}, {whole} of the cache and state",
            "temporary": f"{_bytes(self.temp_bytes)} (bound {_bytes(self.temp_bound)})",
            "weights read": _share(self.weights_read, ideal.weights),
            "cache read": _share(self.cache_read, ideal.cache_read),
            "cache written": _share(self.cache_written, ideal.cache_written),
            "other bytes": _bytes(self.other_bytes),
            "bytes a step": _share(self.bytes_accessed, ideal.total),
            "kernels": f"{self.kernels_per_step:,.1f} a step, {self.kernels_per_layer:,.1f} a layer"
            + self._graphs(),
            "loops": ", ".join(_trips(loop.trip_count) for loop in found.loops) or "none",
            "collectives": self._collectives(),
            "copies": "; ".join(
                f"{w.array} of {w.rewrites or w.takes} by {w.opcode}" for w in self.copies
            )
            or "none of weights or cache",
            "compiled in": f"{self.compile_seconds:.1f} s",
        }

    def _graphs(self) -> str:
        step = self.step_thunks
        if step is None:
            return ""
        if thunks.is_one_graph(step):
            return "; one CUDA graph"
        graphs = sum(thunk.kind == thunks.GRAPH for thunk in step)
        between = sorted({thunk.kind for thunk in thunks.outside_graphs(step)})
        return f"; {graphs} CUDA graphs, between them {', '.join(between)}"

    def _collectives(self) -> str:
        totals: dict[str, list[int]] = {}
        for one in self.report.collectives:
            total = totals.setdefault(one.opcode, [0, 0])
            total[0] += one.runs
            total[1] += one.runs * one.num_bytes
        steps = self.key.steps
        told = (
            f"{n / steps:g} {name} ({_bytes(size // steps)})" for name, (n, size) in totals.items()
        )
        return ", ".join(told) or "none"

    def __repr__(self) -> str:
        width = max(map(len, self.rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.rows.items())

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the same as a table."""
        cells = (
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in self.rows.items()
        )
        return f"<table>{''.join(cells)}</table>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which program to inspect, in the words of a caller; None where any will do."""

    program: str
    batch: int | None = None
    tokens: int | None = None
    steps: int = 1
    context: int | None = None

    def key(self, engine: EngineConfig) -> ProgramKey:
        """Returns the program that would serve such a step.

        Raises:
            ConfigError: There is none, with the nearest that there is.
        """
        if self.program not in PROGRAMS:
            raise ConfigError(
                f"program={self.program!r} is not known{nearest(str(self.program), PROGRAMS)}. "
                f"Use one of {list(PROGRAMS)}."
            )
        is_decode = self.program == "decode"
        steps = _number("steps", self.steps, None)
        if is_decode and self.tokens is not None:
            raise ConfigError(
                f"tokens={self.tokens!r} is for 'prefill' and 'mixed': in 'decode' each row has "
                "one token. Pass batch= instead."
            )
        if not is_decode and steps > 1:
            raise ConfigError(
                f"steps={steps} is for 'decode': {self.program!r} computes one step a launch. "
                "Leave it out."
            )
        buckets = Buckets(engine)
        most = engine.max_model_len
        context = min(DEFAULT_CONTEXT, most)
        if self.context is not None:
            context = _number("context", self.context, ("max_model_len", most))
        width = at_least(buckets.widths, -(-context // engine.page_size))
        most = engine.max_num_seqs
        rows = min(DEFAULT_ROWS if is_decode else 1, most)
        if self.batch is not None:
            rows = _number("batch", self.batch, ("max_num_seqs", most))
        if is_decode:
            return ProgramKey(buckets.decode(at_least(buckets.rows, rows), width), steps)
        most = engine.max_num_batched_tokens
        tokens = min(DEFAULT_TOKENS, most)
        if self.tokens is not None:
            tokens = _number("tokens", self.tokens, ("max_num_batched_tokens", most))
        rows = at_least(buckets.mixed_rows, rows)
        with_decodes = self.program == "mixed"
        sizes = (at_least(buckets.tokens, tokens), rows, width)
        return ProgramKey(buckets.mixed(*sizes, with_decodes=with_decodes))


def inspect(  # noqa: PLR0913
    model: str | Path | Mapping[str, Any],
    program: str,
    *,
    batch: int | None = None,
    tokens: int | None = None,
    steps: int = 1,
    context: int | None = None,
    target: str | None = None,
    devices: int = 1,
    dtype: str = "auto",
    max_model_len: int | str | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    hf_overrides: registry.Overrides | None = None,
    revision: str | None = None,
    hf_token: str | bool | None = None,
) -> Inspection:
    """Compiles a program of a model and tells what became of it; reads no weights.

    Args:
        model: A hub id, a folder or "demo", of which config.json is read; or what such a
            file holds, as a dict.
        program: "decode", "prefill", or "mixed" for chunks of prompts beside decodes.
        batch: Sequences in the step: by default 8 that decode, 1 in a prefill.
        tokens: Of a "prefill" or "mixed" step; 512 by default.
        steps: Tokens that each row of a "decode" generates in one launch.
        context: Tokens of the longest sequence; 1024 by default.
        target: A GPU that need not be here, such as "h200", "a100", "l4" or "t4"; by default
            this machine. It needs the extra `aot` and JAX_PLATFORMS=cpu.
        devices: How many of them; the layout is then "tensor".
        dtype: As for `LLM`, and so the rest.
        max_model_len: As for `LLM`.
        max_num_seqs: As for `LLM`.
        max_num_batched_tokens: As for `LLM`.
        hf_overrides: As for `LLM`.
        revision: As for `LLM`.
        hf_token: As for `LLM`.

    Raises:
        ConfigError: There is no such program, or no such target; or the model does not fit.
        CheckpointError: `model` has no config.json.
        UnsupportedModelError: Its architecture is not implemented.

    Example:
        >>> inspect("Qwen/Qwen3-0.6B", "decode", batch=8, steps=8, target="h200")
    """
    wishes = Wishes(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    wanted = Wanted(program=program, batch=batch, tokens=tokens, steps=steps, context=context)
    count = _number("devices", devices, None)
    hf = read_config(model, hf_overrides, revision, hf_token)
    if target is not None and target not in CARDS:
        raise ConfigError(
            f"target={target!r} is not known{nearest(str(target), CARDS)}. Use one of "
            f"{sorted(CARDS)}, or leave it out for this machine."
        )
    layout = preset("replicated") if count == 1 else preset("tensor", tensor=count)
    if target is None:
        reserve_device_memory(wishes)
    found = None if target is None else gpu_devices(target, count)
    sharder = Sharder(layout, make_mesh(layout, found))
    builder, config = builder_of(hf, wishes, sharder, target)
    return inspect_program(builder, config, model_name(model, hf), wanted)


def inspect_program(
    builder: ProgramBuilder, config: ModelConfig, name: str, wanted: Wanted
) -> Inspection:
    """Compiles one program of a builder and reads it.

    The program is compiled anew, past every cache, and never runs.

    Args:
        builder: Of the programs.
        config: Of its model.
        name: Of the model, for the reader.
        wanted: Which program.
    """
    key = wanted.key(builder.engine)
    mesh = builder.sharder.mesh
    device = mesh.devices.flat[0]
    start = time.perf_counter()
    lowered = builder.lower(key)
    with tempfile.TemporaryDirectory(prefix="jaxllm-inspect-") as folder:
        # What XLA:CPU does is in the HLO.
        options = None if device.platform == "cpu" else {"xla_dump_to": folder}
        compiled = compile_only(lowered, options)
        seconds = time.perf_counter() - start
        launched = thunks.read(Path(folder))
    state = builder.state_shapes()
    return Inspection(
        model=name,
        key=key,
        device=f"{mesh.size} x {device.device_kind}",
        dtype=builder.engine.dtype,
        num_layers=config.num_layers,
        report=report(compiled),
        ideal=ideal_bytes(builder, key.bucket),
        state_bytes=sum(bytes_of_a_device(leaf) for leaf in jax.tree.leaves(state)),
        temp_bound=temp_bound(config, builder.engine, [key.bucket], builder.sharder.layout),
        compile_seconds=seconds,
        hlo=compiled.as_text() or "",
        thunks=None if launched is None else tuple(launched),
    )


def ideal_bytes(builder: ProgramBuilder, bucket: Bucket) -> Ideal:
    """Returns what one step of a bucket must read and write on each device."""
    model, page_size = builder.model, builder.engine.page_size
    pools = jax.tree.leaves(builder.state_shapes().caches)
    token = sum(map(bytes_of_a_device, pools)) // (builder.num_pages * page_size)
    return Ideal(
        weights=weights_read(model),
        cache_read=bucket.rows * bucket.width * page_size * token,
        cache_written=bucket.tokens * token,
    )


def bytes_of_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of a shape's shard."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize


def builder_of(
    hf: Any, wishes: Wishes, sharder: Sharder, target: str | None
) -> tuple[ProgramBuilder, ModelConfig]:
    """Returns the builder of a model's programs on a mesh, from its config alone.

    Args:
        hf: The model's config, as Hugging Face has it.
        wishes: Of the caller.
        sharder: The layout on its mesh.
        target: Key of `CARDS` where the mesh is of GPUs that are not here.

    Raises:
        ConfigError: The model does not fit.
    """
    _, family = registry.family_of(hf)
    device, layout = sharder.mesh.devices.flat[0], sharder.layout
    config = fit(registry.model_config(hf, family), family.build, layout).config
    config, engine = resolve(wishes, config, hf, stated_dtype(hf), device, sharder.mesh.size)
    model = abstract_model(config, family.build, engine.dtype, sharder)
    fraction = memory_fraction(wishes, device.platform)
    if target is None:
        room = room_on(list(sharder.mesh.devices.flat), fraction)
    else:
        card = CARDS[target]
        most = card.memory_bytes
        room = Room(name=card.name, platform="gpu", most=most, limit=int(most * fraction))
    memory = fit_cache(wishes, config, engine, model, layout, room)
    return ProgramBuilder(model, engine, sharder, memory.num_pages), config


def _number(name: str, value: Any, most: tuple[str, int] | None) -> int:
    number = as_integer(value)
    if number is None or number < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1.")
    if most is not None and number > most[1]:
        raise ConfigError(
            f"{name}={number} is more than {most[0]}={most[1]}. Use {most[1]} or less, or raise "
            f"{most[0]}."
        )
    return number


def _bytes(count: float) -> str:
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,.0f} B"


def _share(count: int, ideal: int) -> str:
    ratio = f", {count / ideal:.3f}x the ideal {_bytes(ideal)}" if ideal else ""
    return f"{_bytes(count)}{ratio}"


def _trips(count: int | None) -> str:
    return "of unknown length (counted once)" if count is None else f"{count} trips"
