"""Pictures of arrays of any rank, as text and as HTML."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.sharding.picture import picture_of, ranges


def picture(shape, sizes, *spec, axes=None):
    grid = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    names = ("x", "y", "z")[: len(sizes)]
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    axes = axes or tuple("abcdef"[: len(shape)])
    return picture_of(shape, axes, NamedSharding(mesh, PartitionSpec(*spec)))


def test_one_split_axis_is_a_row_of_boxes():
    assert picture((8, 3), (4,), "x").text() == (
        "axis 0 (a) across: 8 in 4\n+---+---+---+---+\n| 0 | 1 | 2 | 3 |\n+---+---+---+---+"
    )


def test_two_split_axes_are_a_grid_whatever_is_between_them():
    assert picture((4, 5, 6), (2, 2), "y", None, "x").text() == (
        "axis 0 (a) down: 4 in 2, axis 2 (c) across: 6 in 2\n"
        "+---+---+\n"
        "| 0 | 2 |\n"
        "+---+---+\n"
        "| 1 | 3 |\n"
        "+---+---+"
    )


def test_copies_are_devices_in_one_box():
    assert picture((4,), (2, 4), "x", axes=(None,)).text() == (
        "axis 0 (no name) across: 4 in 2\n+-----+-----+\n| 0-3 | 4-7 |\n+-----+-----+"
    )


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)])
def test_what_is_not_split_is_one_box_of_any_rank(shape):
    assert picture(shape, (8,)).text() == "not split\n+-----+\n| 0-7 |\n+-----+"


def test_third_split_axis_makes_panels():
    text = picture((2, 2, 2), (2, 2, 2), "x", "y", "z").text()

    assert text == (
        "axis 0 (a) panels: 2 in 2, axis 1 (b) down: 2 in 2, axis 2 (c) across: 2 in 2\n"
        "axis 0 = 0:1\n+---+---+\n| 0 | 1 |\n+---+---+\n| 2 | 3 |\n+---+---+\n"
        "axis 0 = 1:2\n+---+---+\n| 4 | 5 |\n+---+---+\n| 6 | 7 |\n+---+---+"
    )


def test_more_panels_than_help_are_counted():
    drawn = picture((8, 1, 1), (8,), "x")
    drawn = type(drawn)(
        (8, 2, 2),
        ("a", "b", "c"),
        {
            ((i, i + 1), (j, j + 1), (k, k + 1)): [4 * i + 2 * j + k]
            for i in range(8)
            for j in range(2)
            for k in range(2)
        },
    )

    assert drawn.text().endswith("and 4 panels more")
    assert "and 4 panels more" in drawn._repr_html_()


def test_html_has_a_cell_a_piece_and_a_color_for_each_owner():
    shown = picture((4, 4), (2, 2), "x", "y", axes=("<a>", "b"))._repr_html_()

    assert re.findall(r">([\d -]+)</td>", shown) == ["0", "1", "2", "3"]
    assert len(set(re.findall(r"hsl\(\d+", shown))) == 4
    assert "&lt;a&gt;" in shown
    assert "<a>" not in shown


def test_runs_of_numbers_are_shortened():
    assert ranges([7, 0, 1, 2, 5]) == "0-2 5 7"
