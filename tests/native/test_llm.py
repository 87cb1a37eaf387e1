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
    """What a model says of its kernels, and its tokens."""
    with LLM(folder, **SMALL, **options) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8))
        said = llm.report().programs["attention, products, norms"]
    return said, [output.outputs[0].token_ids for output in outputs]


def test_tokens_are_the_same_with_the_kernel_and_without(checkpoints, monkeypatch):
    compiled, tokens = run(checkpoints())
    monkeypatch.setenv(build.SWITCH, "0")
    plain, same_tokens = run(checkpoints())

    assert compiled == "kernels compiled for this processor"
    assert plain == "plain XLA: JAXLLM_NATIVE=0"
    assert tokens == same_tokens


def test_over_several_devices_there_is_no_kernel(checkpoints):
    said, _ = run(checkpoints(), tensor_parallel_size=2)

    assert said == "plain XLA: the model is split over devices"


def test_a_kernel_that_must_be_there_is_asked_for_before_weights_are_read(checkpoints, monkeypatch):
    def no_weights(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setenv(build.SWITCH, "1")
    monkeypatch.setattr(build, "_problem", lambda dtype: "there is no C++ compiler.")
    monkeypatch.setattr("jaxllm.llm.load_params", no_weights)

    with pytest.raises(NativeBuildError, match="JAXLLM_NATIVE=1, but there is no C"):
        LLM(checkpoints(), **SMALL)
