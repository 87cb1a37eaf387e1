"""What a loaded model runs on and with, as one value to read: machine, memory, settings."""

import html
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from typing import Any

import jax

from jaxllm import compile_cache
from jaxllm.cache.memory import GIB
from jaxllm.loading import Plan
from jaxllm.native.build import why_not_compiled
from jaxllm.program_cache import ProgramCache
from jaxllm.settings import Setting, platform_of, settings


@dataclass(frozen=True, slots=True)
class Report:
    """How a model runs. Each part is a mapping from names to values, but for `settings`."""

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    model: Mapping[str, Any]
    cache: Mapping[str, Any]
    """The KV cache, on each device."""

    programs: Mapping[str, Any]
    seconds: Mapping[str, float]
    """Of each program: tracing and compiling, or loading it from the compile cache."""

    settings: tuple[Setting, ...]
    """What is set of JAX and XLA, why, and by whom."""

    def rows(self) -> dict[str, dict[str, str]]:
        """Returns names and values as text, by part."""
        parts = {f.name: dict(getattr(self, f.name)) for f in fields(self) if f.name != "settings"}
        parts["settings"] = {
            s.name: f"{s.value} (set by {s.set_by}: {s.why})"
            if s.set_by != "too late"
            else f"{s.value} (too late, JAX had started: {s.why})"
            for s in self.settings
        }
        return {
            part: {name: _text(value) for name, value in rows.items()}
            for part, rows in parts.items()
            if rows
        }

    def __repr__(self) -> str:
        """Parts with their lines."""
        lines = []
        for part, rows in self.rows().items():
            width = max(map(len, rows))
            lines.append(part)
            lines += [f"  {name:<{width}}  {value}" for name, value in rows.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows: a table with a heading a part."""
        lines = []
        for part, rows in self.rows().items():
            lines.append(f'<tr><th colspan="2">{html.escape(part)}</th></tr>')
            lines += [
                f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
                for name, value in rows.items()
            ]
        return f"<table>{''.join(lines)}</table>"


def report_of(name: str, plan: Plan, tables: Sequence[ProgramCache], warmup: str) -> Report:
    """Returns the report of a loaded model.

    Args:
        name: As the caller gave it.
        plan: Of its load.
        tables: The programs of each engine.
        warmup: How they are compiled.
    """
    device, memory, model = plan.devices[0], plan.memory, plan.model
    seconds = {str(key): took for table in tables for key, took in list(table.seconds.items())}
    return Report(
        machine={
            "devices": f"{len(tables) * len(plan.devices)} x {device.device_kind}",
            "memory that may be used": f"{memory.limit / GIB:.2f} GiB",
        },
        versions={
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "python": platform.python_version(),
        },
        model={
            "name": name,
            "architecture": plan.architecture,
            "parameters": sum(leaf.shape.size for leaf in model.leaves),
            "weights": f"{model.num_bytes / GIB:.2f} GiB of {plan.engine.dtype}",
            "max_model_len": plan.engine.max_model_len,
        },
        cache={
            "pages": memory.num_pages - 1,
            "tokens": memory.num_tokens,
            "memory": f"{memory.cache_bytes / GIB:.2f} GiB",
        },
        programs={
            "attention, products, norms": _computed_by(plan),
            "compiled": sum(len(table) for table in tables),
            "seconds": sum(took for table in tables for took in list(table.seconds.values())),
            "warm-up": warmup,
            "from the compile cache": sum(table.counts.num_disk_hits for table in tables),
            "compile cache": compile_cache.folder() or "none",
        },
        seconds=seconds,
        settings=settings(platform_of(device)),
    )


def _computed_by(plan: Plan) -> str:
    """Returns who computes what compiled kernels may, and why not they."""
    platform = plan.devices[0].platform
    problem = why_not_compiled(platform, len(plan.devices), plan.engine.dtype)
    if problem is None:
        return "kernels compiled for this processor"
    return f"plain XLA: {problem}" if platform == "cpu" else "plain XLA"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f} s"
    return f"{value:,}" if isinstance(value, int) else str(value)
