"""Draws how an array of any rank is divided among devices: as text, and as HTML.

An axis that is not split needs no room in the picture. Of those that are, the last two
become columns and rows, and any others a panel for each of their pieces.
"""

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import NamedSharding

from jaxllm.sharding.transfer import Box, box_of

SHOWN_PANELS = 4
"""More of them are counted and not drawn."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The pieces of an array, and who has them."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Names of the axes."""

    pieces: dict[Box, list[int]]
    """Ids of the devices that have a piece, by its bounds."""

    @property
    def split_axes(self) -> list[int]:
        """Axes along which there is more than one piece."""
        return [axis for axis in range(len(self.shape)) if len(self._cuts(axis)) > 1]

    def _cuts(self, axis: int) -> list[tuple[int, int]]:
        return sorted({box[axis] for box in self.pieces})

    def describe(self) -> str:
        """Returns a line on what is along which side."""
        if not self.split_axes:
            return "not split"
        sides = {axis: "panels" for axis in self.split_axes}
        sides |= dict(zip(self.split_axes[-2:], ("down", "across")[-len(sides) :], strict=False))
        return ", ".join(
            f"axis {axis} ({self.axes[axis] or 'no name'}) {side}: {self.shape[axis]} in "
            f"{len(self._cuts(axis))}"
            for axis, side in sides.items()
        )

    def panels(self) -> list[tuple[str, list[list[str]]]]:
        """Returns a caption and a grid of device ids for each panel."""
        *outer, down, across = (None, None, *self.split_axes)
        outer = [axis for axis in outer if axis is not None]
        whole = tuple((0, size) for size in self.shape)
        found = []
        for place in itertools.product(*(self._cuts(axis) for axis in outer)):
            box = _replaced(whole, outer, place)
            grid = [
                [
                    self._cell(_replaced(box, (down, across), at))
                    for at in itertools.product([row], self._sides(across))
                ]
                for row in self._sides(down)
            ]
            ranges = zip(outer, place, strict=True)
            found.append((", ".join(f"axis {a} = {p[0]}:{p[1]}" for a, p in ranges), grid))
        return found

    def _sides(self, axis: int | None) -> Sequence[tuple[int, int] | None]:
        return [None] if axis is None else self._cuts(axis)

    def _cell(self, box: Box) -> str:
        return ranges(self.pieces[box])

    def text(self) -> str:
        """Returns the picture as lines."""
        lines = [self.describe()]
        panels = self.panels()
        for caption, grid in panels[:SHOWN_PANELS]:
            width = max(len(cell) for row in grid for cell in row)
            rule = "+" + "+".join("-" * (width + 2) for _ in grid[0]) + "+"
            lines += [caption] if caption else []
            lines.append(rule)
            for row in grid:
                lines += ["|" + "|".join(f" {cell:^{width}} " for cell in row) + "|", rule]
        if len(panels) > SHOWN_PANELS:
            lines.append(f"and {len(panels) - SHOWN_PANELS} panels more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Returns the picture for a notebook: a grid for each panel, a color for each piece."""
        owners = sorted({ranges(ids) for ids in self.pieces.values()})
        parts = [f"<div>{html.escape(self.describe())}</div>"]
        panels = self.panels()
        for caption, grid in panels[:SHOWN_PANELS]:
            rows = "".join(
                f"<tr>{''.join(_html_cell(cell, owners) for cell in row)}</tr>" for row in grid
            )
            parts.append(f"<div>{html.escape(caption)}</div><table>{rows}</table>")
        if len(panels) > SHOWN_PANELS:
            parts.append(f"<div>and {len(panels) - SHOWN_PANELS} panels more</div>")
        return "".join(parts)


def picture_of(
    shape: tuple[int, ...], axes: tuple[str | None, ...], sharding: NamedSharding
) -> Picture:
    """Returns the picture of an array.

    Args:
        shape: Of the whole array.
        axes: A name for each axis, or None.
        sharding: Where it is; its devices need not be here.
    """
    pieces: dict[Box, list[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        pieces.setdefault(box_of(index, shape), []).append(device.id)
    return Picture(shape, axes, pieces)


def ranges(ids: Sequence[int]) -> str:
    """Returns numbers as text, runs of them shortened: `0-3 6`."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _replaced(
    box: Box, axes: Sequence[int | None], bounds: Sequence[tuple[int, int] | None]
) -> Box:
    found = list(box)
    for axis, bound in zip(axes, bounds, strict=True):
        if axis is not None and bound is not None:
            found[axis] = bound
    return tuple(found)


def _html_cell(cell: str, owners: Sequence[str]) -> str:
    hue = 360 * owners.index(cell) // len(owners)
    style = f"background:hsl({hue},70%,85%);color:#000;border:1px solid #555;padding:4px 10px"
    return f'<td style="{style}">{cell}</td>'
