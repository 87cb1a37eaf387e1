"""The compiled programs of a Qwen3-0.6B shape on GPUs that are not here, as `inspect` finds them.

The cache fills the card, as it does in use: XLA compiles differently for a card it
takes to be short of memory. With 28 layers (marked `slow`) and with 2, as what is
done a layer must not depend on their number.
"""

import functools

import pytest

from jaxllm import Inspection, inspect, thunks
from jaxllm.sharding.gpu_topology import CARDS, is_installed

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not is_installed(), reason="needs the CUDA plugin of JAX: extra `aot`"),
]

MIB = 1 << 20
ROWS, CONTEXT = 8, 1024
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
DTYPES = {"h200": "bfloat16", "a100": "bfloat16", "t4": "float16"}
"""By card: sm90, sm80, sm75; what each computes in by default."""

DECODES = {
    "one step": {"program": "decode", "batch": ROWS},
    "8 steps": {"program": "decode", "batch": ROWS, "steps": 8},
}
PREFILLS = {
    "prefill": {"program": "prefill", "tokens": 512},
    "mixed": {"program": "mixed", "tokens": 512, "batch": ROWS},
}
PROGRAMS = {**DECODES, **PREFILLS}


def cases(programs, sizes=(2, 28)):
    """A program of each card and number of layers, the larger ones `slow`."""
    return [
        pytest.param(
            (card, layers, name),
            id=f"{card}-{layers}-{name}",
            marks=pytest.mark.slow if layers > 2 else (),
        )
        for layers in sizes
        for name in programs
        for card in DTYPES
    ]


# The same order in both, so that pytest runs all tests of one program one after the other.
OF_DECODE = cases(DECODES)
OF_ALL = OF_DECODE + cases(["mixed"]) + cases(["prefill"], sizes=(2,))

every_program = pytest.mark.parametrize("found", OF_ALL, indirect=True)
every_decode = pytest.mark.parametrize("found", OF_DECODE, indirect=True)
each_card = pytest.mark.parametrize("card", DTYPES)


@pytest.fixture(scope="module")
def found(request):
    return inspected(*request.param)


@functools.cache
def inspected(card: str, layers: int, program: str, **more: int) -> Inspection:
    config = {**QWEN3, "num_hidden_layers": layers, "max_window_layers": layers}
    asked = {**PROGRAMS[program], **more}
    name = asked.pop("program")
    return inspect(config, name, target=card, **{"context": CONTEXT, **asked})


@every_program
def test_the_cache_is_updated_in_its_own_memory(found):
    assert found.alias_bytes == found.state_bytes


@every_program
def test_neither_weights_nor_cache_nor_slices_of_them_are_copied(found):
    # In the entry or in the body of a loop, outside of fusions: no copy, convert, transpose.
    assert found.copies == ()


@every_program
def test_weights_are_read_once_a_step(found):
    assert 0.99 * found.ideal.weights < found.weights_read <= 1.10 * found.ideal.weights


@every_decode
def test_keys_and_values_are_read_and_written_once_a_step(found):
    # Gathered once; what is gathered is then written and read again, as other bytes.
    assert found.cache_read == found.ideal.cache_read
    assert found.cache_written == found.ideal.cache_written


@every_decode
def test_a_step_is_one_cuda_graph(found):
    assert found.is_one_graph


@every_decode
def test_the_loop_over_steps_has_a_known_length_and_nothing_in_it_loops(found):
    trips = [] if found.key.steps == 1 else [found.key.steps]

    assert [loop.trip_count for loop in found.report.loops] == trips


@every_decode
def test_temporaries_are_logits_activations_and_two_gathered_arrays(found):
    size = 2
    gathered = ROWS * CONTEXT * QWEN3["num_key_value_heads"] * QWEN3["head_dim"] * size
    logits = ROWS * QWEN3["vocab_size"] * 4
    # The residual stream, qkv, gate and up with their product, scores: as if all were held.
    widths = 4 * 1024 + (16 + 2 * 8) * 128 + 3 * 3072
    activations = ROWS * widths * (size + 4) + 4 * ROWS * 16 * CONTEXT * 4
    workspace = 4 * MIB  # cuBLASLt's, before Hopper

    assert gathered < found.temp_bytes <= 2 * gathered + logits + activations + workspace


@each_card
def test_each_card_computes_in_its_own_type(card):
    assert inspected(card, 2, "8 steps").dtype == DTYPES[card]


@pytest.mark.parametrize("card", ["h200", "a100"])
def test_the_cache_fills_the_card_as_it_does_in_use(card):
    # From 0.8 on XLA computes again to save memory, where it is not told otherwise.
    arguments = inspected(card, 2, "8 steps").report.argument_bytes

    assert arguments > 0.8 * CARDS[card].memory_bytes


@each_card
@pytest.mark.parametrize("steps", [2, 32])
def test_temporaries_are_the_same_for_every_number_of_steps(card, steps):
    # What each step returns is kept for all: tokens, and whether they are any good.
    kept = 16 * ROWS * steps

    some = inspected(card, 2, "8 steps", steps=steps)

    assert abs(some.temp_bytes - inspected(card, 2, "8 steps").temp_bytes) <= max(1024, kept)
    assert some.is_one_graph


@every_program
def test_the_bound_covers_the_temporaries(found):
    assert found.temp_bytes <= found.temp_bound


@each_card
@pytest.mark.slow
def test_layers_cost_the_same_whatever_their_number(card):
    two, many = (inspected(card, n, "8 steps") for n in (2, 28))

    assert many.kernels_per_layer == pytest.approx(two.kernels_per_layer, abs=1)
    assert many.temp_bytes <= two.temp_bytes + MIB


@each_card
@pytest.mark.slow
def test_how_long_28_layers_take_to_compile(card, record_property):
    found = inspected(card, 28, "8 steps")

    record_property("compile_seconds", found.compile_seconds)
    assert 0 < found.compile_seconds < 120


@each_card
def test_instructions_and_what_the_gpu_is_told_agree(card):
    found = inspected(card, 2, "8 steps")
    (loop,) = thunks.loops(found.thunks)
    body = [launch for launch in found.report.launches if launch.runs == 8]

    # A slice of a result that is copied by itself is one instruction, and one thunk.
    assert len(list(loop.launches())) == len(body)


@each_card
def test_rows_in_groups_are_still_one_cuda_graph(card):
    found = inspected(card, 2, "8 steps", batch=64)

    assert found.is_one_graph
    assert found.temp_bytes <= found.temp_bound
    assert found.cache_read == found.ideal.cache_read


def test_more_groups_than_are_written_out_loop_and_the_table_says_so():
    found = inspected("h200", 2, "8 steps", batch=256, context=4096)

    assert not found.is_one_graph
    assert "CUDA graphs, between them kWhile" in found.rows["kernels"]


def test_groups_are_of_the_heads_that_a_device_has():
    # An eighth of each row's keys: four groups, where one device has thirty-two and loops.
    found = inspected("h200", 2, "8 steps", devices=8, batch=256, context=4096)

    assert [loop.trip_count for loop in found.report.loops] == [8]
    assert found.temp_bytes <= found.temp_bound


def test_a_prefill_loops_over_its_query_blocks_between_graphs():
    found = inspected("h200", 2, "prefill")
    kinds = [thunk.kind for thunk in found.thunks]

    assert kinds == ["kCommandBuffer", "kWhile", "kCommandBuffer", "kWhile", "kCommandBuffer"]
    assert all(thunks.is_one_graph(loop.part("body")) for loop in thunks.loops(found.thunks))


def test_tensor_parallel_devices_reduce_twice_a_layer():
    found = inspected("h200", 2, "8 steps", devices=8)

    assert found.weights_read <= 1.10 * found.ideal.weights
    assert found.rows["collectives"].startswith("5 all-reduce")
    assert found.copies == ()
