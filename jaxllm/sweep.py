"""`sweep`: one model under many layouts, a row each, so that they can be compared.

At three levels: "plan" is arithmetic, "compile" builds the real programs for the hardware,
which need not be here, "measure" runs them on the devices that are.
"""

import html
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from jaxllm.compiling import Compiler
from jaxllm.errors import ConfigError, JaxLLMError, nearest
from jaxllm.hardware import Hardware, parse
from jaxllm.loading import Wishes, reserve_device_memory
from jaxllm.logs import shows_progress
from jaxllm.measuring import Measured, measure
from jaxllm.modeling.registry import Overrides
from jaxllm.plan import (
    DEFAULT_BATCH,
    LayoutPlan,
    columns,
    compiled,
    gib,
    plan_layout,
    seconds,
)
from jaxllm.planner import (
    Model,
    Planner,
    every_mixture,
    label,
    layout_for,
    model_name,
    read_config,
)
from jaxllm.progress import Progress
from jaxllm.sharding.choice import LayoutLike
from jaxllm.sharding.gpu_topology import CARDS
from jaxllm.sharding.layouts import Layout

LEVELS = ("plan", "compile", "measure")

BETTER: dict[str, Callable[..., Any]] = {
    "tokens_per_second": max,
    "decode_seconds": min,
    "prefill_seconds": min,
    "kv_tokens": max,
    "concurrency": max,
    "weight_bytes": min,
    "compiled_decode_seconds": min,
    "compiled_prefill_seconds": min,
    "measured_tokens_per_second": max,
    "measured_decode_seconds": min,
    "measured_prefill_seconds": min,
}
"""By what rows can be compared, and whether more or less is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRow:
    """A layout, a batch, a context, and what was found; bytes are those of one device.

    `None` stands for what was not asked for, or what a layout that fails does not have.
    """

    layout: str
    engines: int
    devices: int
    """Of all engines."""

    batch: int
    context: int | None
    fits: bool = False
    weight_bytes: int | None = None
    temp_bytes: int | None = None
    cache_bytes: int | None = None
    kv_tokens: int | None = None
    """That the cache of one engine holds."""

    concurrency: int | None = None
    """Sequences of `context` tokens that fit at once, over all engines."""

    transfers_per_layer: str | None = None
    """That the layout's rules ask for."""

    prefill_seconds: float | None = None
    """At least, of all prompts."""

    prefill_bound: str | None = None
    decode_seconds: float | None = None
    """At least, of one step."""

    decode_bound: str | None = None
    decode_link_bytes: float | None = None
    tokens_per_second: float | None = None
    """At most, in decode, of all engines."""

    compile_seconds: float | None = None
    compiled_temp_bytes: int | None = None
    compiled_prefill_seconds: float | None = None
    """At least, of one prefill step as compiled."""

    compiled_decode_seconds: float | None = None
    compiled_link_bytes: float | None = None
    """Sent in a decode step."""

    excess_per_layer: float | None = None
    """Transfers of a decode step beyond the layout's rules, divided by the layers."""

    measured_prefill_seconds: float | None = None
    measured_decode_seconds: float | None = None
    measured_tokens_per_second: float | None = None
    measured_kv_tokens: int | None = None
    error: str | None = None
    """Why there is no more."""

    plan: LayoutPlan | None = field(default=None, compare=False, repr=False)
    """All of it; not in a file."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures; JSON can hold them."""
        names = (one.name for one in fields(self) if one.name != "plan")
        return {name: getattr(self, name) for name in names}


class Sweep(Sequence[SweepRow]):
    """The rows of a sweep, in the order of its layouts."""

    def __init__(
        self, rows: Sequence[SweepRow], *, model: str, hardware: str, level: str, seconds: float
    ) -> None:
        self.rows = tuple(rows)
        self.model = model
        self.hardware = hardware
        self.level = level
        self.seconds = seconds
        """That the sweep took."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def best(self, by: str | None = None) -> SweepRow:
        """Returns the best row of those that fit.

        Args:
            by: A key of `BETTER`; by default tokens a second, as measured where that was done.

        Raises:
            ConfigError: There is no such figure here, or no row fits.
        """
        if by is None:
            by = "measured_tokens_per_second" if self.level == "measure" else "tokens_per_second"
        if by not in BETTER:
            raise ConfigError(
                f"by={by!r} is nothing to compare by{nearest(str(by), BETTER)}. Use one of "
                f"{list(BETTER)}."
            )
        fitting = [row for row in self.rows if row.fits and row.error is None]
        if not fitting:
            reasons = "; ".join(f"{row.layout}: {row.error}" for row in self.rows)
            raise ConfigError(f"No layout of this sweep works: {reasons}")
        having = [row for row in fitting if getattr(row, by) is not None]
        if not having:
            raise ConfigError(
                f"by={by!r} is not in a sweep of level={self.level!r}. Use another figure, or "
                f"sweep at level='{'measure' if 'measured' in by else 'compile'}'."
            )
        return BETTER[by](having, key=lambda row: getattr(row, by))

    def to_pandas(self) -> Any:
        """Returns the rows as a `pandas.DataFrame`.

        Raises:
            ConfigError: pandas is not installed.
        """
        pandas = _extra("pandas", "to_pandas()")
        return pandas.DataFrame([row.to_dict() for row in self.rows])

    def save(self, path: str | Path) -> None:
        """Writes the rows as JSON, for `Sweep.load`."""
        stated = {
            "model": self.model,
            "hardware": self.hardware,
            "level": self.level,
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
        }
        Path(path).write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Returns the sweep of a file that `save` wrote.

        Raises:
            ConfigError: There is no such file, or it holds no sweep.
        """
        try:
            stated = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [SweepRow(**row) for row in stated.pop("rows")]
            return cls(rows, **stated)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{str(path)!r} is no sweep ({type(error).__name__}: {error}). `Sweep.save(path)` "
                "writes one."
            ) from error

    def plot(self) -> Any:
        """Returns a figure of matplotlib: times, memory by part, and what is sent, by layout.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        from jaxllm.sweep_plot import draw

        return draw(_extra("matplotlib.pyplot", "plot()"), self)

    def table(self) -> list[tuple[str, ...]]:
        """Returns what is shown: a head, then the cells of each row."""
        wanted = [column for column in COLUMNS if column.level in LEVELS[: self._depth + 1]]
        head = tuple(column.title for column in wanted)
        return [head, *(tuple(_cell(column, row) for column in wanted) for row in self.rows)]

    @property
    def _depth(self) -> int:
        return LEVELS.index(self.level) if self.level in LEVELS else 0

    @property
    def title(self) -> str:
        """What the table is of."""
        return (
            f"{self.model} on {self.hardware}: {len(self.rows)} rows, level {self.level}, in "
            f"{self.seconds:.1f} s"
        )

    def _failures(self) -> list[str]:
        return [f"{_name(row)}: {row.error}" for row in self.rows if row.error]

    def __repr__(self) -> str:
        return "\n".join([self.title, *columns(self.table()), *self._failures()])

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the same as a table."""
        head, *rows = self.table()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        failures = "".join(f"<p>{html.escape(line)}</p>" for line in self._failures())
        title = html.escape(self.title)
        return f"<p><b>{title}</b></p><table><tr>{cells}</tr>{body}</table>{failures}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table that is shown."""

    title: str
    level: str
    """From which on it is shown."""

    show: Callable[[SweepRow], str]


def _cell(column: Column, row: SweepRow) -> str:
    try:
        return column.show(row)
    except TypeError:  # a None, of a row that ended early or a level that was left out
        return "-"


def _time(count: float | None, bound: str | None = "") -> str:
    return "-" if count is None else f"{seconds(count)} {bound}".rstrip()


def _gib(count: int | None) -> str:
    return "-" if count is None else gib(count)


def _tokens(row: SweepRow) -> str:
    if row.kv_tokens is None:
        return "-"
    return f"{row.kv_tokens:,}" if row.fits else "does not fit"


def _sent(transfers: str | None) -> str:
    return "-" if transfers is None else transfers or "nothing sent"


COLUMNS = (
    Column("layout", "plan", lambda row: row.layout),
    Column("batch", "plan", lambda row: f"{row.batch:,}"),
    Column("context", "plan", lambda row: f"{row.context:,}" if row.context else "-"),
    Column("weights", "plan", lambda row: _gib(row.weight_bytes)),
    Column("temp", "plan", lambda row: _gib(row.temp_bytes)),
    Column("KV tokens", "plan", _tokens),
    Column("a layer", "plan", lambda row: _sent(row.transfers_per_layer)),
    Column("prefill >=", "plan", lambda row: _time(row.prefill_seconds, row.prefill_bound)),
    Column("decode >=", "plan", lambda row: _time(row.decode_seconds, row.decode_bound)),
    Column("tokens/s <=", "plan", lambda row: f"{row.tokens_per_second:,.0f}"),
    Column("compiled decode >=", "compile", lambda row: _time(row.compiled_decode_seconds)),
    Column("compiled temp", "compile", lambda row: _gib(row.compiled_temp_bytes)),
    Column("excess a layer", "compile", lambda row: f"{row.excess_per_layer:.3g}"),
    Column("compiled in", "compile", lambda row: f"{row.compile_seconds:.1f} s"),
    Column("prefill", "measure", lambda row: _time(row.measured_prefill_seconds)),
    Column("decode", "measure", lambda row: _time(row.measured_decode_seconds)),
    Column("tokens/s", "measure", lambda row: f"{row.measured_tokens_per_second:,.1f}"),
)


def _name(row: SweepRow) -> str:
    context = f", context {row.context}" if row.context else ""
    return f"{row.layout}, batch {row.batch}{context}"


def sweep(  # noqa: PLR0913
    model: Model,
    layouts: Sequence[LayoutLike] | None = None,
    *,
    hardware: str | Mapping[str, Any] | Hardware | None = None,
    batch: int | Sequence[int] = DEFAULT_BATCH,
    context: int | Sequence[int] | None = None,
    level: str = "plan",
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
    use_tqdm: Progress = True,
) -> Sweep:
    """Returns what a model needs and how fast it is under each layout.

    Args:
        model: As for `plan`.
        layouts: As for `plan`, a list; by default tensor parallelism, data parallelism and
            the mixtures of the two that use all devices.
        hardware: As for `plan`; by default what this machine has.
        batch: Sequences over all engines; or several numbers.
        context: Tokens of each, as for `plan`; or several numbers.
        level: "plan" for arithmetic; "compile" for the programs, too; "measure" runs each
            layout on the devices that are here, with random weights.
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
        use_tqdm: Whether to show progress, or what to call in place of `tqdm`.

    Returns:
        A row for each layout, batch and context. A layout that fails is a row with `error`.

    Raises:
        ConfigError: An argument is wrong for every layout.
        CheckpointError: `model` has no config.json.
        UnsupportedModelError: Its architecture is not implemented.

    Example:
        >>> sweep("Qwen/Qwen3-8B", ["tensor", "data"], hardware="h200:8", batch=[8, 64]).best()
    """
    if level not in LEVELS:
        raise ConfigError(
            f"level={level!r} is not known{nearest(str(level), LEVELS)}. Use one of {list(LEVELS)}."
        )
    start = time.perf_counter()
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
    if hardware is None or level == "measure":
        reserve_device_memory(wishes)
    planner = Planner(model_name(model, hf), hf, wishes, parse(hardware))
    if level == "measure":
        _require_here(planner.hardware)
    asked = _layouts(layouts, planner.hardware)
    cases = [
        (one, size, length)
        for one in asked
        for size in _numbers("batch", batch)
        for length in ([None] if context is None else _numbers("context", context))
    ]
    rows = []
    with Compiler(planner) as compiler:
        for one, size, length in _shown(cases, use_tqdm):
            rows.append(_row(planner, compiler, one, size, length, level))
    return Sweep(
        rows,
        model=planner.name,
        hardware=f"{planner.hardware.name}:{planner.hardware.count or 1}",
        level=level,
        seconds=time.perf_counter() - start,
    )


def _require_here(hardware: Hardware) -> None:
    """Raises where predictions would be of another machine than the measurements."""
    device = jax.devices()[0]
    kind = CARDS[hardware.target].name if hardware.target else device.device_kind
    on_cpu = device.platform == "cpu"  # JAX calls a GPU "gpu" or "cuda"
    if on_cpu != (hardware.platform == "cpu") or kind != device.device_kind:
        raise ConfigError(
            f"level='measure' runs on the devices that are here, {device.device_kind!r}, and "
            f"hardware={hardware.name!r} is another. Leave hardware out, or use level='plan' or "
            "'compile'."
        )


def _layouts(
    given: Sequence[LayoutLike] | None, hardware: Hardware
) -> Sequence[LayoutLike | Layout]:
    if given is None:
        return every_mixture(hardware)
    if isinstance(given, str | Path | Mapping | Layout) or not isinstance(given, Sequence):
        raise ConfigError(
            f"layouts={given!r} must be a list, such as ['tensor:8', 'data_tensor:2x4']."
        )
    if not given:
        raise ConfigError(
            "layouts=[] is empty. Name some, or leave it out for all mixtures of tensor and data."
        )
    return given


def _numbers(name: str, given: int | Sequence[int]) -> list[int]:
    found = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not found or not all(isinstance(one, int) and one > 0 for one in found):
        raise ConfigError(f"{name}={given!r} must be a number of at least 1, or a list of such.")
    return [int(one) for one in found]


def _shown(cases: Sequence[Any], use_tqdm: Progress) -> Iterator[Any]:
    """Returns the cases one by one, with a bar."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    if not (callable(use_tqdm) or (use_tqdm and shows_progress())):
        yield from cases
        return
    bar = make(total=len(cases), desc="Sweep", unit="row", dynamic_ncols=True)
    try:
        for case in cases:
            yield case
            bar.update(1)
    finally:
        bar.close()


def _row(
    planner: Planner,
    compiler: Compiler,
    given: LayoutLike,
    batch: int,
    context: int | None,
    level: str,
) -> SweepRow:
    """Returns a row, also where something fails: then with the sentence that says so."""
    about = {"layout": _given_name(given), "engines": 0, "devices": 0}
    figures: dict[str, Any] = {"context": context}
    try:
        layout = layout_for(given, planner.hardware)
        engines, devices = layout.num_replicas, layout.num_devices
        about = {"layout": label(layout), "engines": engines, "devices": devices}
        found = plan_layout(planner, layout, batch, context)
        figures |= _planned(found)
        if level == "compile":
            found = compiled(found, compiler)
            figures |= _as_compiled(found)
        if level == "measure" and found.fits:
            figures |= _as_measured(measure(planner, layout, batch, found.context), batch)
        figures |= {"plan": found, "error": found.problem}
    except JaxLLMError as error:
        figures["error"] = str(error)
    return SweepRow(**about, batch=batch, **figures)


def _given_name(given: LayoutLike) -> str:
    if isinstance(given, Mapping):
        return str(given.get("name", "custom"))
    return given.name if isinstance(given, Layout) else str(given)


def _planned(found: LayoutPlan) -> dict[str, Any]:
    each = ", ".join(f"{n} {name}" for name, n in found.transfers_per_layer().items())
    return {
        "context": found.context,
        "fits": found.fits,
        "weight_bytes": found.weight_bytes,
        "temp_bytes": found.temp_bytes,
        "cache_bytes": found.memory.cache_bytes if found.memory else 0,
        "kv_tokens": found.kv_tokens,
        "concurrency": found.concurrency,
        "transfers_per_layer": each,
        "prefill_seconds": found.prefill.seconds,
        "prefill_bound": found.prefill.binds,
        "decode_seconds": found.decode.seconds,
        "decode_bound": found.decode.binds,
        "decode_link_bytes": found.decode.work.link_bytes,
        "tokens_per_second": found.decode.tokens_per_second,
    }


def _as_compiled(found: LayoutPlan) -> dict[str, Any]:
    programs = {program.kind: program for program in found.programs}
    least = {kind: found.program_roofline(kind) for kind in programs}
    times = {
        f"compiled_{kind}_seconds": line.seconds for kind, line in least.items() if line is not None
    }
    decode = programs["decode"]
    return {
        **times,
        "compile_seconds": found.compile_seconds,
        "compiled_temp_bytes": max(program.temp_bytes for program in found.programs),
        "compiled_link_bytes": decode.work.link_bytes,
        "excess_per_layer": sum(decode.excess.values()) / found.num_layers,
    }


def _as_measured(found: Measured, batch: int) -> dict[str, Any]:
    figures = {f"measured_{name}": value for name, value in asdict(found).items()}
    return {**figures, "measured_tokens_per_second": batch / found.decode_seconds}


def _extra(module: str, what: str) -> Any:
    """Imports a library of the extra `plot`, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {module.partition('.')[0]}, which is not installed ({error}). Type "
            "`pip install 'jaxllm[plot]'`; `save`, `table` and the rows themselves need nothing."
        ) from error
