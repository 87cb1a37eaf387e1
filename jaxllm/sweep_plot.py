"""The figure of a sweep, in matplotlib, which is handed in: nothing here imports it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.cache.memory import GIB

if TYPE_CHECKING:
    from jaxllm.sweep import Sweep, SweepRow

TIMES = (
    # Figure of a row, how it is called, color.
    ("decode_seconds", "predicted, at least", "#9db4c0"),
    ("compiled_decode_seconds", "as compiled, at least", "#5c8a9c"),
    ("measured_decode_seconds", "measured", "#c8553d"),
)

PARTS = (
    ("weight_bytes", "weights", "#5c6b73"),
    ("temp_bytes", "temporaries", "#c2dfe3"),
    ("cache_bytes", "KV cache", "#9db4c0"),
)

SENT = (
    ("decode_link_bytes", "the layout's rules", "#9db4c0"),
    ("compiled_link_bytes", "as compiled", "#5c8a9c"),
)


def draw(pyplot: Any, sweep: "Sweep") -> Any:
    """Returns a figure of three panels: a decode step's time, memory, and what is sent.

    Args:
        pyplot: Of matplotlib.
        sweep: Whose rows have figures; those that failed are left out.
    """
    rows = [row for row in sweep.rows if row.decode_seconds is not None]
    height = 1.2 + 0.45 * max(2, len(rows))
    figure = pyplot.figure(figsize=(13, height), layout="constrained")
    pyplot.close(figure)  # a notebook shows what a cell returns, and open figures once more
    times, memory, sent = figure.subplots(1, 3, sharey=True)
    names = [_name(row, sweep) for row in rows]
    _beside(times, rows, TIMES, 1e3)
    times.set(title="a decode step", xlabel="ms", yticks=range(len(rows)), yticklabels=names)
    times.invert_yaxis()
    left = [0.0] * len(rows)
    for name, title, color in PARTS:
        sizes = [(getattr(row, name) or 0) / GIB for row in rows]
        memory.barh(range(len(rows)), sizes, left=left, color=color, label=title)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    memory.set(title="memory of a device", xlabel="GiB")
    _beside(sent, rows, SENT, 1e-6)
    sent.set(title="sent by a device in a decode step", xlabel="MB")
    for panel in (times, memory, sent):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{sweep.model} on {sweep.hardware}")
    return figure


def _beside(
    panel: Any, rows: Sequence["SweepRow"], kinds: Sequence[tuple[str, str, str]], unit: float
) -> None:
    """Draws bars of several figures beside each other, those that the rows have."""
    present = [kind for kind in kinds if any(getattr(row, kind[0]) is not None for row in rows)]
    width = 0.8 / max(1, len(present))
    for i, (name, title, color) in enumerate(present):
        at = [y + (i - (len(present) - 1) / 2) * width for y in range(len(rows))]
        values = [(getattr(row, name) or 0) * unit for row in rows]
        panel.barh(at, values, height=width, color=color, label=title)


def _name(row: "SweepRow", sweep: "Sweep") -> str:
    """Returns the layout, and what else differs between rows."""
    others = ("batch", "context")
    varying = [name for name in others if len({getattr(one, name) for one in sweep.rows}) > 1]
    fits = "" if row.fits else ", does not fit"
    return ", ".join([row.layout, *(f"{name} {getattr(row, name)}" for name in varying)]) + fits
