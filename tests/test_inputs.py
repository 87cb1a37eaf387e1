import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.buckets import Bucket
from jaxllm.flags import SamplingFlags
from jaxllm.inputs import (
    ChunkInputs,
    SamplingInputs,
    ScoreInputs,
    StepInputs,
    buffer_size,
    fields,
    pack,
    unpack,
)
from jaxllm.sequence import MAX_STOP_IDS

DECODE = Bucket(tokens=4, rows=4, width=3, decode_rows=4, query_blocks=0)
MIXED = Bucket(tokens=10, rows=4, width=3, decode_rows=4, query_blocks=6)

NONE = SamplingFlags()
ALL = SamplingFlags(
    sampled=True,
    min_p=True,
    top_k=True,
    top_p=True,
    penalties=True,
    edits=3,
    mask_words=2,
    logprobs=5,
    logprob_ids=4,
    scored=1,
)
FLAGS = pytest.mark.parametrize("flags", [NONE, ALL], ids=["plain", "everything"])

unpack_on_device = jax.jit(unpack, static_argnums=(0, 1))


def random_values(bucket, flags=NONE, seed=0):
    """Any bits at all: of the floats, some are NaN, some subnormal."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 2**32, shape, np.uint32).view(dtype).reshape(shape)
        for name, (shape, dtype) in fields(bucket, flags).items()
    }


def by_name(inputs):
    """All inputs of a step, those of its parts among them."""
    parts = [vars(part) for part in (inputs.sampling, inputs.chunks, inputs.score) if part]
    return {name: value for part in (vars(inputs), *parts) for name, value in part.items()}


def names_of(cls):
    return {field.name for field in dataclasses.fields(cls)}


def bits(value):
    return np.asarray(value).reshape(-1).view(np.uint32).tolist()


@FLAGS
@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
def test_what_is_packed_is_unpacked_bit_for_bit(bucket, flags):
    values = random_values(bucket, flags)

    inputs = unpack_on_device(bucket, flags, pack(bucket, flags, values))

    for name, value in values.items():
        got = by_name(inputs)[name]
        assert (got.shape, got.dtype) == (value.shape, value.dtype), name
        assert bits(got) == bits(value), name


def test_floats_and_large_words_keep_every_bit():
    values = random_values(DECODE)
    values["temperature"] = np.array([0.1, -0.0, np.inf, 1e-45], np.float32)
    values["seeds"] = np.array([[0, 2**32 - 1], [2**31, 1], [7, 8], [9, 10]], np.uint32)

    inputs = unpack_on_device(DECODE, NONE, pack(DECODE, NONE, values))

    assert bits(inputs.sampling.temperature) == bits(values["temperature"])
    np.testing.assert_array_equal(inputs.sampling.seeds, values["seeds"])


@FLAGS
@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
def test_the_buffer_is_one_row_of_int32_of_the_stated_size(bucket, flags):
    buffer = pack(bucket, flags, random_values(bucket, flags))

    assert buffer.dtype == np.int32
    assert buffer.shape == (buffer_size(bucket, flags),)


def test_a_decode_program_has_no_inputs_of_chunks():
    inputs = unpack_on_device(DECODE, NONE, pack(DECODE, NONE, random_values(DECODE)))

    assert inputs.chunks is None
    assert not set(fields(DECODE, ALL)) & names_of(ChunkInputs)


def test_every_input_of_a_step_is_in_the_table():
    parts = (SamplingInputs, ChunkInputs, ScoreInputs)
    own = names_of(StepInputs) - {"sampling", "chunks", "score"}

    assert set(fields(MIXED, ALL)) == own.union(*map(names_of, parts))


def test_a_batch_that_asks_for_nothing_sends_nothing_for_it():
    assert set(fields(MIXED, NONE)) & names_of(SamplingInputs) == {"temperature", "seeds"}
    assert not set(fields(MIXED, NONE)) & names_of(ScoreInputs)


def test_the_shapes_in_the_table_are_those_of_the_bucket():
    shapes = {name: shape for name, (shape, _) in fields(MIXED, NONE).items()}

    assert shapes["tokens"] == (10,)
    assert shapes["page_table"] == (1, 4, 3)
    assert shapes["stop_ids"] == (4, MAX_STOP_IDS)
    assert shapes["q_block_seq"] == shapes["q_block_start"] == (6,)


def test_a_value_of_the_wrong_shape_is_refused():
    values = {**random_values(DECODE), "kv_lens": np.zeros(5, np.int32)}

    with pytest.raises(ValueError, match=r"kv_lens is int32\(5,\), not int32\(4,\)"):
        pack(DECODE, NONE, values)


def test_a_value_of_the_wrong_type_is_refused():
    values = {**random_values(DECODE), "temperature": np.zeros(4, np.float64)}

    with pytest.raises(ValueError, match=r"temperature is float64\(4,\), not float32\(4,\)"):
        pack(DECODE, NONE, values)
