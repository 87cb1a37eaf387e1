"""Models run with the compiled kernel and without, and say which."""

import pytest

from jaxllm import LLM, NativeBuildError, SamplingParams
from jaxllm.native import build

SMALL = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 1 << 20,
}
PROMPTS = [[7, 3, 9], list(range(70)), [5], [11] * 110]


def run(folder, **options):
    """What a model says of its attention and its products, and its tokens."""
    with LLM(folder, **SMALL, **options) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8))
        programs = llm.report().programs
    said = programs["attention"], programs["products with weights"]
    return said, [output.outputs[0].token_ids for output in outputs]


def test_tokens_are_the_same_with_the_kernel_and_without(checkpoints, monkeypatch):
    compiled, tokens = run(checkpoints())
    monkeypatch.setenv(build.SWITCH, "0")
    plain, same_tokens = run(checkpoints())

    assert compiled == ("a kernel compiled for this processor",) * 2
    assert plain == ("plain XLA: JAXLLM_NATIVE=0",) * 2
    assert tokens == same_tokens


def test_products_of_bfloat16_are_compiled_only_for_a_matrix_unit(checkpoints, monkeypatch):
    monkeypatch.setattr("jaxllm.pallas_kernels.linear.linear_in_tiles", lambda dtype: False)

    said, _ = run(checkpoints(), dtype="bfloat16")

    assert said == (
        "a kernel compiled for this processor",
        "plain XLA: the processor has no matrix unit for bfloat16",
    )


def test_over_several_devices_there_is_no_kernel(checkpoints):
    said, _ = run(checkpoints(), tensor_parallel_size=2)

    assert said == ("plain XLA: the model is split over devices",) * 2


def test_a_kernel_that_must_be_there_is_asked_for_before_weights_are_read(checkpoints, monkeypatch):
    def no_weights(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setenv(build.SWITCH, "1")
    monkeypatch.setattr(build, "_problem", lambda dtype: "there is no C++ compiler.")
    monkeypatch.setattr("jaxllm.llm.load_params", no_weights)

    with pytest.raises(NativeBuildError, match="JAXLLM_NATIVE=1, but there is no C"):
        LLM(checkpoints(), **SMALL)
