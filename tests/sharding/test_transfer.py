"""Arrays of any rank from any sharding to any other, on the same devices or on others."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.sharding.transfer import is_at, transfer

VALUES = np.arange(8 * 4 * 16, dtype=np.float32).reshape(8, 4, 16)


def sharding(devices, sizes, *spec):
    grid = np.array([jax.devices()[i] for i in devices]).reshape(sizes)
    names = ("a", "b", "c")[: len(sizes)]
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    return NamedSharding(mesh, PartitionSpec(*spec))


PLACES = {
    "one": sharding([0], (1,)),
    "another": sharding([5], (1,)),
    "eight": sharding(range(8), (8,), "a"),
    "backwards": sharding(range(7, -1, -1), (8,), "a"),
    "columns": sharding(range(8), (8,), None, None, "a"),
    "both": sharding(range(8), (2, 4), "a", None, "b"),
    "all": sharding(range(8), (2, 2, 2), "b", "a", "c"),
    "over two axes": sharding(range(8), (2, 4), None, None, ("b", "a")),
    "in part": sharding(range(8), (2, 4), "a"),
    "whole": sharding(range(8), (8,)),
    "last four": sharding([4, 5, 6, 7], (4,), None, "a"),
}


@pytest.mark.parametrize("new", PLACES)
@pytest.mark.parametrize("old", PLACES)
def test_every_shard_has_the_values_of_its_place(old, new):
    x = jax.device_put(VALUES, PLACES[old])

    moved = transfer(x, PLACES[new])

    assert is_at(moved, PLACES[new])
    assert (moved is x) == (old == new)
    for shard in moved.addressable_shards:
        np.testing.assert_array_equal(shard.data, VALUES[shard.index])
    np.testing.assert_array_equal(x, VALUES)


@pytest.mark.parametrize("value", [np.float32(3), np.arange(5, dtype=np.int32)])
def test_low_ranks_move_too(value):
    x = jax.device_put(value, PLACES["one"])

    moved = transfer(x, PLACES["whole"])

    assert is_at(moved, PLACES["whole"])
    np.testing.assert_array_equal(moved, value)


@pytest.mark.parametrize("new", ["both", "last four", "another"])
def test_no_value_goes_by_way_of_the_host(new):
    x = jax.device_put(VALUES, PLACES["eight"])

    with jax.transfer_guard_device_to_host("disallow"), jax.transfer_guard_host_to_device("allow"):
        moved = transfer(x, PLACES[new])
        moved.block_until_ready()

    assert x._npy_value is None  # JAX keeps what it fetched
    np.testing.assert_array_equal(moved, VALUES)
