"""What the keywords of `LLM` say about devices."""

import jax
import numpy as np
import pytest

from jaxllm import ConfigError, Layout
from jaxllm.sharding.choice import choose_layout, find_devices, sharders
from jaxllm.sharding.layouts import preset
from jaxllm.sharding.mesh import make_mesh

MINE = Layout("mine", {"tensor": 2, "more": 2}, {"mlp": ("tensor", "more")})


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({}, "replicated"),
        ({"tensor": 1, "data": 1}, "replicated"),
        ({"tensor": 2}, "tensor"),
        ({"data": 2}, "data"),
        ({"tensor": 2, "data": 2}, "data_tensor"),
    ],
)
def test_sizes_alone_choose_the_usual_layout(sizes, name):
    assert choose_layout(None, **sizes) == preset(name, **sizes)


def test_a_layout_comes_as_a_value_a_dict_or_a_file(tmp_path):
    MINE.to_json(tmp_path / "mine.json")

    for given in (MINE, MINE.to_dict(), tmp_path / "mine.json", str(tmp_path / "mine.json")):
        assert choose_layout(given) == MINE
        assert choose_layout(given, tensor=4, data=1) == MINE


def test_a_layout_of_one_engine_may_be_repeated():
    two = choose_layout(MINE, data=2)

    assert two.mesh == {"data": 2, "tensor": 2, "more": 2}
    assert two.rules == MINE.rules


def test_each_engine_has_devices_of_its_own():
    found = sharders("tensor", np.int64(2), 3)

    assert [[d.id for d in s.mesh.devices.flat] for s in found] == [[0, 1], [2, 3], [4, 5]]
    assert {s.layout for s in found} == {preset("tensor", tensor=2)}


@pytest.mark.parametrize("given", [[3, 1], [jax.devices()[3], 1], [np.int32(3), np.int64(1)]])
def test_devices_are_taken_in_the_order_given(given):
    (sharder,) = sharders(None, 2, devices=given)

    assert [device.id for device in sharder.mesh.devices.flat] == [3, 1]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tensor": 0}, "tensor_parallel_size=0 must be a whole number of at least 1"),
        ({"data": "2"}, "data_parallel_size='2' must be a whole number of at least 1"),
        ({"layout": 3}, r"layout=3 is none. Use the name of a preset \(\['data'"),
        ({"layout": "tensr"}, "layout='tensr' is not a preset; did you mean 'tensor'"),
        (
            {"layout": MINE, "tensor": 2},
            "tensor_parallel_size=2 and the mesh of layout 'mine' has 4. Leave out",
        ),
        (
            {"layout": choose_layout(MINE, data=2), "data": 4},
            "data_parallel_size=4 and the mesh of layout 'mine' has 2. Leave out",
        ),
        (
            {"tensor": 3, "data": 3},
            r"World size \(9\) is larger than the number of available devices \(8\): "
            "data 3 x tensor 3. Use sizes whose product is 8 or less",
        ),
        ({"devices": 1}, r"devices=1 must be a list of ids, such as \[0, 1\]"),
        ({"devices": "01"}, "devices='01' must be a list of ids"),
        ({"devices": [8]}, r"devices names 8, and JAX has \[0, 1, .*, 7\]. Name those"),
        ({"devices": ["cpu"]}, "devices names 'cpu', and JAX has"),
        ({"devices": [1, 1], "tensor": 2}, r"devices=\[1, 1\] names one twice. Name each once"),
        (
            {"devices": [1, 2]},
            r"devices=\[1, 2\] are 2, and layout 'replicated' needs 1 \(one\). Pass "
            "tensor_parallel_size=2 to share the model, data_parallel_size=2 for as many engines",
        ),
    ],
)
def test_a_wrong_choice_is_refused(keywords, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        sharders(**keywords)


def test_a_mesh_needs_its_devices():
    with pytest.raises(ConfigError, match=r"World size \(4\) .* \(2\): layout 'tensor' has tensor"):
        make_mesh(preset("tensor", tensor=4), find_devices([0, 1], preset("tensor", tensor=2)))
