"""Bare and dressed parameters: copies and padding undone, made again, moved between layouts."""

import jax
import numpy as np
import pytest

from jaxllm.modeling.forms import bare_shape, bare_sharding, is_bare, is_placed, move, to_bare
from jaxllm.sharding.choice import sharders
from tests.layouts import EIGHT_HEADS, load
from tests.tiny import sharder

HOW = {
    "one": {},
    "two": {"tensor": 2},
    "eight": {"tensor": 8},
    "2d": {"layout": "tensor_2d", "tensor": 8},
    "others": {"tensor": 4, "devices": [7, 2, 5, 0]},
}


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """By layout: the leaves and the parameters, read from one checkpoint."""
    folder = checkpoints("qwen2", **EIGHT_HEADS)
    plans = {name: load(folder, sharders(**how)[0]) for name, how in HOW.items()}
    return {name: (plan.model.leaves, params) for name, (plan, params) in plans.items()}


def test_layouts_here_have_copies_and_padding(loaded):
    dressed = {leaf.path.split(".")[-2] for leaf in loaded["eight"][0] if not is_bare(leaf)}

    assert dressed == {"qkv", "embed", "head"}
    assert all(is_bare(leaf) for leaf in loaded["one"][0])


@pytest.mark.parametrize("name", HOW)
def test_bare_form_is_what_one_device_has(loaded, name):
    for one, value, leaf, param in zip(*loaded["one"], *loaded[name], strict=True):
        bare = to_bare(leaf, param)

        assert bare_shape(leaf) == one.shape.shape
        assert bare.sharding.is_equivalent_to(bare_sharding(leaf), bare.ndim)
        np.testing.assert_array_equal(bare, value)


def test_bare_form_of_a_split_parameter_is_split_too(loaded):
    leaf = next(x for x in loaded["eight"][0] if x.path.endswith("qkv.weight"))

    assert np.prod(bare_sharding(leaf).shard_shape(bare_shape(leaf))) * 8 == np.prod(
        bare_shape(leaf)
    )


@pytest.mark.parametrize("new", HOW)
@pytest.mark.parametrize("old", HOW)
def test_moved_parameters_are_those_that_are_read(loaded, old, new):
    for before, x, after, wanted in zip(*loaded[old], *loaded[new], strict=True):
        moved = move(x, before, after)

        assert is_placed(moved, after)
        for ours, theirs in zip(moved.addressable_shards, wanted.addressable_shards, strict=True):
            assert ours.device == theirs.device
            np.testing.assert_array_equal(ours.data, theirs.data)


def test_what_is_in_place_is_not_copied(loaded):
    for leaf, param in zip(*loaded["eight"], strict=True):
        assert move(param, leaf, leaf) is param
    assert not is_placed(jax.device_put(param, sharder().sharding()), leaf)
