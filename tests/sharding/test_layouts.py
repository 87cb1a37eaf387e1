"""Layouts as values."""

import json

import pytest
from jax.sharding import PartitionSpec

from jaxllm import ConfigError, Layout
from jaxllm.sharding.layouts import ARRAY_AXES, LAYOUTS, preset

MINE = Layout("mine", {"tensor": 2, "more": 3}, {"mlp": ["tensor", "more"], "q_heads": "tensor"})


@pytest.mark.parametrize("name", LAYOUTS)
def test_presets_are_the_same_from_a_dict_and_from_json(name, tmp_path):
    layout = preset(name, tensor=4, data=2)
    layout.to_json(tmp_path / "layout.json")

    assert Layout.from_dict(layout.to_dict()) == layout
    assert Layout.from_json(tmp_path / "layout.json") == layout
    assert json.loads(layout.to_json()) == layout.to_dict()


def test_layouts_are_keys():
    again = Layout("mine", (("tensor", 2), ("more", 3)), MINE.rules)

    assert {MINE: 1}[again] == 1


def test_a_layout_cannot_be_changed():
    with pytest.raises(AttributeError):
        MINE.name = "other"


def test_a_layout_prints_its_mesh_and_its_rules():
    assert str(MINE) == "mine: tensor 2 x more 3\n  mlp over tensor x more\n  q_heads over tensor"
    assert str(preset("replicated")).endswith("\n  nothing is split")


def test_an_axis_may_be_split_over_two():
    assert MINE.split("mlp") == 6
    assert MINE.split("embed") == MINE.split(None) == 1
    assert MINE.spec(("mlp", None, "embed")) == PartitionSpec(("tensor", "more"), None, None)
    assert MINE.spec(("q_heads",)) == PartitionSpec("tensor")


def test_a_layout_of_no_mesh_has_one_device():
    assert Layout("none", {}, {}).num_devices == 1


def test_the_replicas_of_a_layout_are_layouts_of_one_engine():
    both = preset("data_tensor", tensor=4, data=2)

    assert (both.num_devices, both.num_replicas) == (8, 2)
    assert both.replica() == preset("data_tensor", tensor=4)
    assert both.replica().replica() == both.replica()


@pytest.mark.parametrize(("tensor", "sizes"), [(8, (4, 2)), (4, (2, 2)), (3, (3, 1)), (1, (1, 1))])
def test_two_dimensions_are_as_even_as_they_can_be(tensor, sizes):
    mesh = preset("tensor_2d", tensor=tensor).mesh

    assert (mesh["tensor"], mesh["tensor_2"]) == sizes


def test_every_rule_of_a_preset_is_of_an_axis_that_there_is():
    assert {axis for rules in LAYOUTS.values() for axis in rules} <= set(ARRAY_AXES)


def test_two_axes_of_an_array_over_one_mesh_axis_are_refused():
    layout = Layout("twice", {"tensor": 2}, {"embed": "tensor", "mlp": "tensor"})

    with pytest.raises(ConfigError, match=r"'twice' splits two axes of \('mlp', 'embed'\) over"):
        layout.spec(("mlp", "embed"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mesh": {"tensor": 0}}, "mesh axis 'tensor' the size 0. Use a whole number of at least"),
        ({"mesh": {"tensor": 2.0}}, "the size 2.0. Use a whole number"),
        (
            {"mesh": {"tensor": 2}, "rules": {"mpl": "tensor"}},
            "rule for 'mpl', which is no axis of an array; did you mean 'mlp'? Use one of",
        ),
        (
            {"mesh": {"data": 2}, "rules": {"mlp": "data"}},
            "splits 'mlp' over 'data', the axis of whole engines side by side. Give it another",
        ),
        (
            {"mesh": {"tensor": 2}, "rules": {"mlp": "model"}},
            r"splits 'mlp' over 'model', and its mesh has \['tensor'\]. Add 'model' to the mesh",
        ),
        ({"mehs": {}}, "A layout has no 'mehs'; did you mean 'mesh'? Write"),
        ({"mesh": 8}, "The mesh of a layout must be a dict, got 8. Write"),
        ({"rules": ["mlp"]}, r"The rules of a layout must be a dict, got \['mlp'\]. Write"),
    ],
)
def test_a_wrong_layout_is_refused(given, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        Layout.from_dict(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a readable JSON file .*No such file.*`Layout.to_json"),
        ("{", "is not a readable JSON file .*Expecting"),
        ("[]", "holds list, and a layout is an object. `Layout.to_json"),
    ],
)
def test_a_file_without_a_layout_is_refused(tmp_path, text, message):
    path = tmp_path / "layout.json"
    if text is not None:
        path.write_text(text)

    with pytest.raises(ConfigError, match=message):
        Layout.from_json(path)


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"layout='tensors' is not a preset; did you mean 'tenso"):
        preset("tensors")
