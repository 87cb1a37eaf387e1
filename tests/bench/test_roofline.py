"""What a machine does at its best, and what a workload costs at least."""

import pytest

from jaxllm import LLM
from jaxllm.bench.roofline import ModelWork, model_work
from jaxllm.bench.workload import Sizes
from jaxllm.machine import Machine, measure_machine

MACHINE = Machine("abacus", "float32", read_bytes_per_s=1000.0, flops_per_s=1e6)
WORK = ModelWork(
    weight_bytes=100,
    kv_bytes=1,
    token_flops=10,
    logit_flops=5,
    attention_flops=2,
    max_num_seqs=4,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_rates_are_those_of_a_computer(dtype):
    machine = measure_machine(dtype, seconds=0.05, read_bytes=16 << 20, side=256)

    assert 1e8 < machine.read_bytes_per_s < 1e13
    assert 1e8 < machine.flops_per_s < 1e16
    assert f"of {dtype}" in str(machine)


def test_a_batch_reads_weights_for_its_prompts_and_for_each_further_token():
    workload = Sizes(2, input_len=3, output_len=3).draw(vocab_size=9, seed=0)

    # The weights thrice; the two further tokens of a row attend to 4 and 5.
    assert WORK.floor_seconds(workload, MACHINE) == pytest.approx((3 * 100 + 2 * 9) / 1000)


def test_more_prompts_than_rows_take_more_steps():
    workload = Sizes(8, input_len=1, output_len=3).draw(vocab_size=9, seed=0)

    assert WORK.floor_seconds(workload, MACHINE) == pytest.approx((100 + 4 * 100 + 8 * 5) / 1000)


def test_where_products_are_slow_they_count():
    slow = Machine("abacus", "float32", read_bytes_per_s=1e9, flops_per_s=1.0)
    workload = Sizes(1, input_len=3, output_len=2).draw(vocab_size=9, seed=0)

    prompt = 3 * 10 + 5 + (1 + 2 + 3) * 2
    assert WORK.floor_seconds(workload, slow) == prompt + 10 + 5 + 4 * 2


def test_devices_share_the_work():
    both = Machine("abacus", "float32", 1000.0, 1e6, num_devices=2)
    workload = Sizes(1, input_len=3, output_len=3).draw(vocab_size=9, seed=0)

    halved = WORK.floor_seconds(workload, MACHINE) / 2
    assert WORK.floor_seconds(workload, both) == pytest.approx(halved)


@pytest.mark.parametrize("tied", [True, False])
def test_the_work_of_a_model_leaves_out_rows_that_are_looked_up(checkpoints, tied):
    folder = checkpoints("llama", tie_word_embeddings=tied)
    with LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=2) as llm:
        work = model_work(llm._plan)

    embed, mlp, layers, kv_width = 32, 48, 2, 2 * 8
    layer = embed * (embed + 2 * kv_width + embed) + 3 * embed * mlp
    norms = (2 * layers + 1) * embed
    head = 101 * embed
    assert work == ModelWork(
        weight_bytes=4 * (layers * layer + norms + head),
        kv_bytes=4 * layers * 2 * kv_width,
        token_flops=2 * layers * layer,
        logit_flops=2 * head,
        attention_flops=4 * layers * embed,
        max_num_seqs=2,
    )
