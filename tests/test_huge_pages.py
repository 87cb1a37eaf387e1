"""Weights on CPU lie in huge pages, and JAX takes them as they lie."""

import gc
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm import LLM
from jaxllm.huge_pages import ALIGNMENT, HugePages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux has them")


def on_one_device():
    mesh = jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])
    return jax.NamedSharding(mesh, PartitionSpec())


def test_arrays_are_zeros_that_jax_does_not_copy():
    room = HugePages(1 << 16)
    first, second = room.zeros((3, 5), "bfloat16"), room.zeros((100,), "float32")
    second[...] = 7

    placed = jax.device_put(second, jax.devices()[0])

    assert first.shape == (3, 5)
    assert not first.astype(np.float32).any()
    assert second.ctypes.data % ALIGNMENT == 0
    assert placed.unsafe_buffer_pointer() == second.ctypes.data


def test_moved_arrays_are_the_same_and_outlive_the_room():
    room = HugePages(1 << 16)
    array = jax.device_put(np.arange(1000.0).reshape(10, 100), on_one_device())

    moved = room.moved(array)
    del room
    gc.collect()

    assert moved.sharding == array.sharding
    assert moved.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
    assert np.array_equal(moved, array)


def test_what_does_not_fit_is_refused():
    room = HugePages(100)

    with pytest.raises(MemoryError, match="400 bytes do not fit in 100"):
        room.zeros((100,), "float32")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_all_weights_of_a_model_lie_side_by_side(checkpoints, load_format):
    with LLM(checkpoints(), load_format=load_format, skip_tokenizer_init=True) as llm:
        model, params = llm._plan.model, llm._live_engine().runner.params
        starts = [param.unsafe_buffer_pointer() for param in params]
        sizes = [leaf.num_bytes for leaf in model.leaves]

    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    assert starts == [starts[0] + sum(padded[:i]) for i in range(len(sizes))]


def test_models_over_several_devices_have_none(checkpoints):
    with LLM(checkpoints(), tensor_parallel_size=2, skip_tokenizer_init=True) as llm:
        assert HugePages.of_model(llm._plan.model) is None
