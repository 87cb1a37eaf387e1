"""How results look: a calm table, a JSON file, a plot."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxllm.errors import ConfigError

FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True, slots=True)
class Chart:
    """What a plot shows."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """By the words of the legend, points (x, y)."""


class Result(Protocol):
    """What a benchmark returns."""

    def rows(self) -> list[tuple[str, str]]:
        """Returns the lines of the table: what, and how much."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Returns every figure."""
        ...

    def chart(self) -> Chart:
        """Returns the plot."""
        ...


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Returns two columns under a title."""
    wide = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{wide}}   {value}" for name, value in rows)])


def check_files(output_json: str | None, plot: str | None) -> None:
    """Refuses, before anything has run, what could not be written afterwards.

    Raises:
        ConfigError: There is no such folder, no matplotlib, or no such format.
    """
    for option, path in (("--output-json", output_json), ("--plot", plot)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(
                f"{option} {path!r} is in a folder that does not exist. Make it first, or give "
                "another."
            )
    if plot is None:
        return
    if Path(plot).suffix not in FORMATS:
        raise ConfigError(f"--plot {plot!r} must end in one of {', '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: `pip install 'jaxllm[plot]'`, or "
            "leave --plot out."
        )


def write_json(result: Result, path: str) -> None:
    """Writes every figure."""
    Path(path).write_text(json.dumps(result.to_json(), indent=2) + "\n")


def write_plot(chart: Chart, path: str) -> None:
    """Draws a chart into a file; needs no screen."""
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in chart.lines.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_ylim(bottom=0)
    if all(float(x).is_integer() for points in chart.lines.values() for x, _ in points):
        axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
