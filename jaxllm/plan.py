"""`plan`: what a model under a layout needs and how fast it can be, before anything is loaded.

From config.json alone: no weights, no GPU. Memory is worked out by the functions that a load
uses, work by `roofline`; with `compile=True` the real programs are compiled for the hardware,
which need not be here.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxllm.buckets import Buckets
from jaxllm.cache.memory import GIB, MemoryPlan, temp_bound
from jaxllm.compiling import Compiler, Program
from jaxllm.errors import ConfigError
from jaxllm.hardware import Hardware, parse
from jaxllm.loading import Wishes, reserve_device_memory, reserved_temp
from jaxllm.modeling.forms import bare_shape
from jaxllm.modeling.registry import Overrides
from jaxllm.planner import Model, Planner, label, layout_for, model_name, read_config
from jaxllm.roofline import EngineShape, Roofline, Transfer, Work, roofline
from jaxllm.sampling_params import as_integer
from jaxllm.sharding.choice import LayoutLike
from jaxllm.sharding.layouts import Layout

DEFAULT_BATCH = 8
DEFAULT_CONTEXT = 1024

MOST_DEVICES = 64
"""Largest number of devices that is proposed for one copy of a model."""

SHORTEST = 1024
"""Shortest `max_model_len` that is proposed."""

SMALL_STEPS = {"max_num_batched_tokens": 2048, "max_num_seqs": 64}
"""What is proposed where temporaries take the room."""

NO_QUANTIZATION = (
    "jaxllm reads no quantized weights yet, so fewer bytes a weight cannot be had that way"
)


@dataclass(frozen=True, slots=True)
class Phase:
    """Prefill of all prompts, or one step of decode: the work of one device, and its least time."""

    name: str
    """"prefill" or "decode"."""

    work: Work
    roofline: Roofline
    tokens_per_second: float
    """Of all engines together."""

    @property
    def seconds(self) -> float:
        """The least time."""
        return self.roofline.seconds

    @property
    def binds(self) -> str:
        """What it is bound by: "compute", "memory", "link" or "latency"."""
        return self.roofline.binds

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures, flat."""
        return {
            "flops": self.work.flops,
            "memory_bytes": self.work.memory_bytes,
            "link_bytes": self.work.link_bytes,
            "num_transfers": self.work.num_transfers,
            "compute_seconds": self.roofline.compute,
            "memory_seconds": self.roofline.memory,
            "link_seconds": self.roofline.link,
            "latency_seconds": self.roofline.latency,
            "seconds": self.seconds,
            "binds": self.binds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class LayoutPlan:
    """A model under a layout on some hardware. Bytes and times are those of one device.

    Times are bounds from below: a roofline knows no launches, and of a transfer only the latency
    that the hardware states (`link_seconds`).
    """

    model: str
    architecture: str
    num_parameters: int
    """Of the checkpoint."""

    layout: Layout
    hardware: Hardware
    dtype: str
    num_layers: int
    max_model_len: int
    """As asked for; what fits, where "auto" was."""

    batch: int
    """Sequences over all engines."""

    context: int
    """Tokens of each."""

    weight_bytes: int
    temp_bytes: int
    """Set aside for temporaries of the largest programs, on a GPU for autotuning too."""

    temp_bounds: tuple[tuple[str, int], ...]
    """By program, the bound of its temporaries: the largest decode, the largest mixed."""

    token_bytes: int
    """Of one token in the cache."""

    memory: MemoryPlan | None
    """None where it does not fit."""

    transfers: tuple[Transfer, ...]
    """What the layout's rules ask to be sent in a step; the compiler may add more."""

    prefill: Phase
    decode: Phase
    notes: tuple[str, ...] = ()
    problem: str | None = None
    """Why it does not fit."""

    remedies: tuple[str, ...] = ()
    """What would."""

    programs: tuple[Program, ...] = field(default=(), repr=False)
    """As compiled, if that was asked for: of one engine's prefill and decode."""

    @property
    def fits(self) -> bool:
        """Whether the model fits, and one sequence of `max_model_len` beside it."""
        return self.memory is not None

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache of one engine holds."""
        return 0 if self.memory is None else self.memory.num_tokens

    @property
    def concurrency(self) -> int:
        """Sequences of `context` tokens that fit at once, over all engines."""
        return self.kv_tokens // self.context * self.layout.num_replicas

    @property
    def compile_seconds(self) -> float | None:
        """Of all programs that were compiled."""
        return sum(program.seconds for program in self.programs) if self.programs else None

    def transfers_per_layer(self) -> dict[str, int]:
        """Returns the textbook's transfers of a layer, by opcode."""
        found: dict[str, int] = {}
        for one in self.transfers:
            if one.where == "layers":
                found[one.opcode] = found.get(one.opcode, 0) + one.count
        return {name: round(count / self.num_layers) for name, count in found.items()}

    def program_roofline(self, kind: str) -> Roofline | None:
        """Returns the least time of one step of a compiled program; None if there is none."""
        for program in self.programs:
            if program.kind == kind:
                return self._least(program)
        return None

    def _least(self, program: Program) -> Roofline:
        return program.roofline(self.hardware.among(self.layout.num_devices), self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures; JSON can hold them."""
        memory = self.memory
        return {
            "model": self.model,
            "architecture": self.architecture,
            "num_parameters": self.num_parameters,
            "layout": self.layout.to_dict(),
            "hardware": self.hardware.to_dict(),
            "dtype": self.dtype,
            "num_layers": self.num_layers,
            "max_model_len": self.max_model_len,
            "batch": self.batch,
            "context": self.context,
            "fits": self.fits,
            "weight_bytes": self.weight_bytes,
            "temp_bytes": self.temp_bytes,
            "temp_bounds": dict(self.temp_bounds),
            "token_bytes": self.token_bytes,
            "kv_tokens": self.kv_tokens,
            "cache_bytes": memory.cache_bytes if memory else 0,
            "concurrency": self.concurrency,
            "transfers_per_layer": self.transfers_per_layer(),
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "programs": [self._program_dict(program) for program in self.programs],
            "compile_seconds": self.compile_seconds,
            "notes": list(self.notes),
            "problem": self.problem,
            "remedies": list(self.remedies),
        }

    def _program_dict(self, program: Program) -> dict[str, Any]:
        least = self._least(program)
        return {
            "kind": program.kind,
            "name": program.name,
            "seconds_to_compile": program.seconds,
            "temp_bytes": program.temp_bytes,
            "temp_bound": program.temp_bound,
            "flops": program.flops,
            "memory_bytes": program.memory_bytes,
            "link_bytes": program.work.link_bytes,
            "transfers": program.counts(),
            "excess": program.excess,
            "seconds": least.seconds,
            "binds": least.binds,
        }

    def sections(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Returns the tables that are shown: a title, then rows of cells."""
        engines = self.layout.num_replicas
        yield self._title(), []
        yield "memory of a device", list(self._memory_rows())
        counts = self.transfers_per_layer()
        each = ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"
        yield "between devices, a layer", [(each,)]
        terms = ("compute", "memory", "link", "latency")
        head = ("", "FLOP", "bytes", "sent", *terms, "at least", "bound by")
        rows = [self._phase_row(phase) for phase in (self.prefill, self.decode)]
        where = f", {-(-self.batch // engines)} in each of {engines} engines" if engines > 1 else ""
        yield f"{self.batch} sequences of {self.context:,} tokens{where}", [head, *rows]
        if self.programs:
            yield "compiled, a step", list(self._program_rows())
        if self.problem:
            yield "DOES NOT FIT", [(self.problem,)]
        if self.remedies:
            yield "what would fit", [(remedy,) for remedy in self.remedies]
        if self.notes:
            yield "notes", [(note,) for note in self.notes]

    def _title(self) -> str:
        size = f"{self.num_parameters / 1e9:,.2f} B parameters"
        return (
            f"{self.model} ({self.architecture}, {size}, {self.dtype}), layout "
            f"{label(self.layout)} on {self.hardware.name}:{self.layout.num_devices}"
        )

    def _memory_rows(self) -> Iterator[tuple[str, ...]]:
        yield "weights", gib(self.weight_bytes), ""
        bounds = ", ".join(f"{name} {gib(size)}" for name, size in self.temp_bounds)
        yield "temporaries", gib(self.temp_bytes), f"set aside; bounds: {bounds}"
        if self.memory is None:
            yield "cache", "none", f"{self.token_bytes:,} bytes a token"
            return
        yield (
            "cache",
            gib(self.memory.cache_bytes),
            f"{self.kv_tokens:,} tokens of {self.token_bytes:,} bytes",
        )
        full = self.kv_tokens / self.max_model_len
        yield "limit", gib(self.memory.limit), f"of {gib(self.hardware.memory_bytes)}"
        yield "max_model_len", f"{self.max_model_len:,}", f"{full:.1f} sequences of it an engine"

    def _phase_row(self, phase: Phase) -> tuple[str, ...]:
        work, least = phase.work, phase.roofline
        return (
            phase.name,
            si(work.flops),
            f"{si(work.memory_bytes)}B",
            f"{si(work.link_bytes)}B",
            *map(seconds, (least.compute, least.memory, least.link, least.latency)),
            seconds(least.seconds),
            f"{least.binds}, {phase.tokens_per_second:,.0f} tokens/s",
        )

    def _program_rows(self) -> Iterator[tuple[str, ...]]:
        yield "", "FLOP", "bytes", "temporaries", "sent", "beyond the layout's rules", "at least"
        for one in self.programs:
            least = self._least(one)
            sent = ", ".join(f"{n} {name}" for name, n in one.counts().items()) or "nothing"
            excess = ", ".join(
                f"{n} {name} ({n / self.num_layers:.3g} a layer)" for name, n in one.excess.items()
            )
            yield (
                one.name,
                si(one.flops),
                f"{si(one.memory_bytes)}B",
                f"{gib(one.temp_bytes)} (bound {gib(one.temp_bound)})",
                sent,
                excess or "nothing",
                f"{seconds(least.seconds)}, {least.binds}; compiled in {one.seconds:.1f} s",
            )

    def __repr__(self) -> str:
        lines = []
        for title, rows in self.sections():
            lines.append(title)
            lines += [f"  {line}" for line in columns(rows)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the same tables."""
        parts = []
        for title, rows in self.sections():
            parts.append(f"<p><b>{html.escape(title)}</b></p>")
            cells = (
                "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row)
                for row in rows
            )
            parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
        return "".join(parts)


def plan(  # noqa: PLR0913
    model: Model,
    *,
    layout: LayoutLike | None = None,
    hardware: str | Mapping[str, Any] | Hardware | None = None,
    tensor_parallel_size: int | None = None,
    data_parallel_size: int | None = None,
    batch: int = DEFAULT_BATCH,
    context: int | None = None,
    compile: bool = False,
    dtype: str = "auto",
    max_model_len: int | str | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    gpu_memory_utilization: float | None = None,
    kv_cache_memory_bytes: int | None = None,
    block_size: int | None = None,
    hf_overrides: Overrides | None = None,
    revision: str | None = None,
    hf_token: str | bool | None = None,
) -> LayoutPlan:
    """Returns what a model would need, and the least time that it would take; loads nothing.

    Args:
        model: A hub id, a folder or "demo", of which config.json is read; or what such a file
            holds: a dict, or a config object of transformers.
        layout: As for `LLM`; with its sizes "tensor:4", or "data_tensor:2x4" for 2 engines on
            4 devices each. A preset without sizes takes all devices; by default "tensor".
        hardware: "h200:8", say: a key of `hardware.HARDWARE` and how many; "cpu:8"; a
            `Hardware` or a dict, for numbers of your own; by default what this machine has.
        tensor_parallel_size: As for `LLM`.
        data_parallel_size: As for `LLM`.
        batch: Sequences, over all engines.
        context: Tokens of each; 1024 by default, or `max_model_len` if that is less.
        compile: Compile the programs that serve such a batch, for that hardware, and count
            what is in them. A GPU that is not here needs the extra `aot`.
        dtype: As for `LLM`, and so the rest.
        max_model_len: As for `LLM`.
        max_num_seqs: As for `LLM`.
        max_num_batched_tokens: As for `LLM`.
        gpu_memory_utilization: As for `LLM`.
        kv_cache_memory_bytes: As for `LLM`.
        block_size: As for `LLM`.
        hf_overrides: As for `LLM`.
        revision: As for `LLM`.
        hf_token: As for `LLM`.

    Returns:
        The plan, also where the model does not fit: then it says why, and what would.

    Raises:
        ConfigError: An argument is wrong, or the model cannot be split so.
        CheckpointError: `model` has no config.json.
        UnsupportedModelError: Its architecture is not implemented.

    Example:
        >>> plan("meta-llama/Llama-3.1-70B", layout="tensor", hardware="h200:8")
    """
    wishes = Wishes(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=block_size,
        memory_fraction=gpu_memory_utilization,
        cache_bytes=kv_cache_memory_bytes,
    )
    hf = read_config(model, hf_overrides, revision, hf_token)
    if hardware is None:
        reserve_device_memory(wishes)
    planner = Planner(model_name(model, hf), hf, wishes, parse(hardware))
    chosen = layout_for(layout, planner.hardware, tensor_parallel_size, data_parallel_size)
    found = plan_layout(planner, chosen, batch, context)
    if not compile:
        return found
    with Compiler(planner) as compiler:
        return compiled(found, compiler)


def compiled(found: LayoutPlan, compiler: Compiler) -> LayoutPlan:
    """Returns a plan with its programs compiled."""
    rows = -(-found.batch // found.layout.num_replicas)
    programs = compiler.programs(found.layout, rows, found.context)
    return replace(found, programs=tuple(programs))


def plan_layout(
    planner: Planner, layout: Layout, batch: int, context: int | None = None
) -> LayoutPlan:
    """Returns the plan of one layout, batch and context; arithmetic only.

    Raises:
        ConfigError: The model cannot be split so, or the batch is not one that it serves.
    """
    shaped = planner.shaped(layout)
    shape, problem, memory = shaped.shape, None, None
    remedies: tuple[str, ...] = ()
    try:
        memory = planner.memory(shape, layout.num_replicas)
    except ConfigError as error:
        problem, remedies = str(error), tuple(_remedies(planner, layout, shape))
    length = memory.max_model_len if memory else shape.engine.max_model_len
    rows, context = _checked(shape, layout, batch, context, length)
    work = {"prefill": shape.prefill(rows, context), "decode": shape.decode(rows, context)}
    tokens = {"prefill": batch * context, "decode": batch}
    dtype, hardware = shape.engine.dtype, planner.hardware
    phases = {}
    for name, one in work.items():
        least = roofline(one, hardware.among(layout.num_devices), dtype)
        phases[name] = Phase(name, one, least, tokens[name] / least.seconds)
    decode, mixed = Buckets(shape.engine).largest()
    bounds = {"decode": decode, "mixed": mixed}
    notes = list(shaped.notes)
    if memory and (batch_fits := memory.num_tokens // context) < rows:
        notes.append(
            f"The cache holds {batch_fits} of the {rows} sequences of an engine at once: the "
            "others wait, so no step decodes all of them"
        )
    parts = (shape.config, shape.engine, shape.model, shape.layout, hardware.platform)
    return LayoutPlan(
        model=planner.name,
        architecture=(planner.hf.architectures or [""])[0],
        num_parameters=sum(math.prod(bare_shape(leaf)) for leaf in shape.model.leaves),
        layout=layout,
        hardware=hardware,
        dtype=dtype,
        num_layers=shape.config.num_layers,
        max_model_len=length,
        batch=batch,
        context=context,
        weight_bytes=shape.model.bytes_per_device(),
        temp_bytes=reserved_temp(*parts),
        temp_bounds=tuple(
            (name, temp_bound(shape.config, shape.engine, [bucket], shape.layout))
            for name, bucket in bounds.items()
        ),
        token_bytes=shape.token_bytes,
        memory=memory,
        transfers=shape.transfers(),
        notes=tuple(notes),
        problem=problem,
        remedies=remedies,
        **phases,
    )


def _checked(
    shape: EngineShape, layout: Layout, batch: int, context: int | None, length: int
) -> tuple[int, int]:
    """Returns the sequences of one engine, and their tokens."""
    asked = min(DEFAULT_CONTEXT, length) if context is None else context
    for name, value in {"batch": batch, "context": asked}.items():
        if as_integer(value) is None or value < 1:
            raise ConfigError(f"{name}={value!r} must be an integer of at least 1.")
    rows = -(-batch // layout.num_replicas)
    most = shape.engine.max_num_seqs
    if rows > most:
        each = f", {rows} in each of {layout.num_replicas} engines," if rows < batch else ""
        raise ConfigError(
            f"batch={batch}{each} is more than max_num_seqs={most}. Use "
            f"{most * layout.num_replicas} or less, or raise max_num_seqs."
        )
    if asked > length:
        raise ConfigError(
            f"context={asked} is more than max_model_len={length}. Use {length} or less, or raise "
            "max_model_len."
        )
    return rows, asked


def _remedies(planner: Planner, layout: Layout, shape: EngineShape) -> Iterator[str]:
    """Returns what would fit, a sentence each; each was tried."""
    wishes, tried = planner.wishes, []

    def fits(**changes: Any) -> MemoryPlan | None:
        other = replace(planner, wishes=replace(wishes, **changes))
        try:
            return other.memory(other.shaped(layout).shape, layout.num_replicas)
        except ConfigError:
            return None

    if wishes.max_model_len not in ("auto", -1) and (found := fits(max_model_len="auto")):
        tried.append(f"max_model_len={found.max_model_len} (or 'auto') with this layout")
    elif length := next(filter(lambda n: fits(max_model_len=n), _shorter(shape)), None):
        tried.append(f"max_model_len={length} with this layout: less for temporaries, too")
    if fits(**SMALL_STEPS):
        small = ", ".join(f"{name}={value}" for name, value in SMALL_STEPS.items())
        tried.append(f"{small} with this layout: less for temporaries")
    if shape.engine.dtype == "float32" and fits(dtype="bfloat16"):
        tried.append("dtype='bfloat16' with this layout")
    if devices := _enough_devices(planner, layout, shape):
        have = planner.hardware.count
        more = f", more than the {have} there are" if have and devices > have else ""
        tried.append(f"tensor_parallel_size={devices}{more}")
    yield from tried
    if not tried:
        yield "nothing that was tried: a smaller model, or hardware with more memory"
    yield NO_QUANTIZATION


def _shorter(shape: EngineShape) -> Iterator[int]:
    """Returns lengths to try, each half of the one before."""
    length = shape.engine.max_model_len // 2
    while length >= SHORTEST:
        yield length
        length //= 2


def _enough_devices(planner: Planner, layout: Layout, shape: EngineShape) -> int | None:
    """Returns the fewest devices that share one copy of the model and hold it, by doubling."""
    devices, name = 2, "tensor"
    while devices <= MOST_DEVICES:
        # Not even an even share of the weights fits: no need to look closer.
        if shape.model.num_bytes / devices < planner.room(devices).limit:
            try:
                other = layout_for(f"{name}:{devices}", replace(planner.hardware, count=None))
                planner.memory(planner.shaped(other).shape)
            except ConfigError:
                pass
            else:
                return None if devices == shape.layout.num_devices else devices
        devices *= 2
    return None


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows of cells as lines, aligned; the last cell of a row is as long as it is."""
    widths: dict[int, int] = {}
    for row in rows:
        for i, cell in enumerate(row[:-1]):
            widths[i] = max(widths.get(i, 0), len(cell))
    return [
        "  ".join([*(f"{cell:<{widths[i]}}" for i, cell in enumerate(row[:-1])), row[-1]]).rstrip()
        for row in rows
    ]


def gib(count: float) -> str:
    """Returns bytes as GiB, small ones as MiB."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.2f} MiB"


def si(count: float) -> str:
    """Returns a number with the letter of its thousands."""
    for unit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:,.2f} {letter}"
    return f"{count:,.0f} "


def seconds(count: float) -> str:
    """Returns a time in the unit that suits it."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return "0" if count == 0 else f"{count / 1e-9:,.1f} ns"
