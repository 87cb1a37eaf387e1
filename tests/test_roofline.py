"""What a layout's rules ask for, beside what the compiler makes of them."""

from collections import Counter
from dataclasses import replace

import jax
import pytest

from jaxllm.buckets import Buckets
from jaxllm.compiling import compile_here
from jaxllm.config import EngineConfig
from jaxllm.hardware import parse
from jaxllm.loading import Wishes
from jaxllm.pallas_kernels.attention.spec import TUNING
from jaxllm.planner import Planner, layout_for
from jaxllm.roofline import Roofline, Transfer, Work, roofline, sent_bytes
from tests.tiny import CONFIGS, SIZES

H200 = parse("h200:8")
# All that is split divides by 8, so that nothing is copied or padded.
WIDE = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
CASES = [
    ("llama", "tensor:8"),
    ("llama", "tensor_2d:8"),
    ("llama", "sequence:4"),
    ("llama", "tensor_replicated_vocab:4"),
    ("gpt2", "tensor_2d:8"),
]


def planner(family="llama", hardware="cpu:8", dtype="bfloat16", **config):
    make, fixed = CONFIGS[family]
    wishes = Wishes(dtype=dtype, max_num_seqs=16, max_num_batched_tokens=64)
    return Planner("tiny", make(**{**WIDE, **fixed, **config}), wishes, parse(hardware))


def shape_of(layout, **about):
    one = planner(**about)
    return one.shaped(layout_for(layout, one.hardware)).shape


def asked(layout, **about):
    """The transfers of a step by opcode, the sampler's apart."""
    found = Counter()
    for transfer in shape_of(layout, **about).transfers():
        if transfer.where != "sampler":
            found[transfer.opcode] += transfer.count
    return dict(found)


@pytest.mark.parametrize(
    ("opcode", "whole"), [("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1)]
)
def test_a_ring_sends_all_but_one_share(opcode, whole):
    assert sent_bytes(opcode, 800, 8) == whole * 700
    assert sent_bytes(opcode, 800, 1) == 0


def test_times_are_those_of_the_slowest_term_and_the_link():
    work = Work(flops=989.5e12, memory_bytes=2.4e12, link_bytes=45e9, num_transfers=10)

    found = roofline(work, replace(H200, link_seconds=0.02), "bfloat16")

    assert found == Roofline(compute=1.0, memory=0.5, link=0.1, latency=0.2)
    assert found.seconds == pytest.approx(1.3)
    assert found.binds == "compute"


def test_a_latency_counts_for_each_transfer():
    found = roofline(Work(0, 0, 0, 64), H200, "bfloat16")

    assert found.latency == pytest.approx(64 * 6.6e-6)
    assert (found.link, found.binds) == (0, "latency")


def test_tensor_parallelism_sums_twice_a_layer():
    layers = [t for t in shape_of("tensor:8").transfers() if t.where == "layers"]

    assert layers == [Transfer("all-reduce", "layers", 2 * 2, 8, 64 * 2)]


def test_data_parallelism_sends_nothing():
    assert shape_of("data:8").transfers() == ()


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_compiler_sends_what_the_rules_ask_for_and_no_more(family, layout):
    prefill, decode = compile_here(
        planner(family), layout_for(layout, planner().hardware), batch=8, context=8
    )
    expected = asked(layout, family=family)
    if layout.startswith("sequence"):  # XLA:CPU has no reduce-scatter of what it sums
        expected["all-reduce"] = expected.pop("reduce-scatter")

    for program in (prefill, decode):
        assert program.counts(in_layers=True).keys() <= expected.keys()
        total = sum(program.counts().values())
        # A norm's last sum is as small as what is sampled from, and counted with that.
        assert total <= sum(expected.values()) <= total + 2


def test_a_step_of_16_bits_sends_16_bits_though_a_cpu_prints_32():
    layout = layout_for("tensor:8", planner().hardware)
    narrow, wide = (
        compile_here(planner(dtype=dtype), layout, batch=8, context=8)[1]
        for dtype in ("bfloat16", "float32")
    )
    shape = shape_of("tensor:8")
    expected = sum(t.sent(8, 8) for t in shape.transfers() if t.where != "sampler")

    assert wide.work.link_bytes == 2 * narrow.work.link_bytes
    assert narrow.work.link_bytes == expected
    assert {one.array for one in narrow.sent} == {"bf16[8,64]"}


def test_operations_are_those_of_the_compiled_program():
    # One part of the keys: the CPU's loop over parts ends with the longest row, which no program
    # knows, and is counted once.
    context = TUNING["cpu"].keys_at_once
    one = planner(dtype="float32", max_position_embeddings=128)
    layout = layout_for("tensor:8", one.hardware)
    decode = compile_here(one, layout, batch=16, context=context)[1]

    # On CPU products with ones and with the identity take the place of what it is slow at: the
    # sums of a softmax of one head on each device, and tables of a rotation worked out once.
    head_dim, layers = one.hf.hidden_size // one.hf.num_attention_heads, one.hf.num_hidden_layers
    sums = layers * 2 * 16 * context
    rotation = 2 * 2 * 16 * (head_dim // 2) ** 2  # cosines and sines
    counted = shape_of("tensor:8", dtype="float32").decode(16, context).flops
    assert decode.flops == pytest.approx(counted + sums + rotation)


def test_decode_reads_every_weight_once_and_every_token_of_the_cache():
    shape = shape_of("replicated", dtype="float32")
    embedding = 256 * 64 * 4
    cache = 8 * 100 * shape.token_bytes
    written = 8 * shape.token_bytes

    read = shape.model.bytes_per_device() - embedding  # which is looked up
    assert shape.decode(8, 100).memory_bytes == read + cache + written


def test_windows_bound_what_is_read():
    narrow, full = (
        shape_of("replicated", family="mistral", sliding_window=window) for window in (24, None)
    )

    saved = full.decode(4, 100).memory_bytes - narrow.decode(4, 100).memory_bytes
    assert saved == 4 * (100 - 24) * full.token_bytes
    assert narrow.prefill(4, 100).flops < full.prefill(4, 100).flops


def test_prefill_reads_the_weights_in_each_of_its_steps():
    shape = shape_of("replicated", dtype="float32")
    one, two = shape.prefill(1, 64), shape.prefill(2, 64)

    kept = 64 * 2 * shape.token_bytes  # written, and read once
    assert one.memory_bytes == shape.weights_read + kept
    assert two.memory_bytes == 2 * one.memory_bytes


def test_a_prompt_in_chunks_sees_each_key_as_often_as_one_in_a_step():
    def work(most):
        one = planner(dtype="float32")
        shape = one.shaped(layout_for("replicated", one.hardware)).shape
        engine = EngineConfig(
            max_model_len=128, max_num_seqs=4, max_num_batched_tokens=most, dtype="float32"
        )
        return type(shape)(shape.config, engine, shape.model, shape.layout).prefill(1, 128)

    assert work(32).flops == work(128).flops
    assert work(32).memory_bytes > work(128).memory_bytes


def test_devices_of_tensor_parallelism_share_the_operations():
    alone = shape_of("replicated").decode(8, 64).flops

    assert shape_of("tensor:8").decode(8, 64).flops == alone / 8


def test_the_buckets_of_these_tests_are_full():
    shape = shape_of("tensor:8")

    assert Buckets(shape.engine).largest()[0].rows == 16
    assert len(jax.devices()) == 8
