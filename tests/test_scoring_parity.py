"""Prompt log-probabilities and scores of completions are those of transformers in float32."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from jaxllm import LLM, SamplingParams
from tests.parity import MAX_GAP, Variant, write

pytestmark = pytest.mark.torch

WINDOWS = {
    "head_dim": 16,
    "use_sliding_window": True,
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
VARIANTS = [
    Variant("llama", LlamaForCausalLM, LlamaConfig),
    Variant("qwen3-windows", Qwen3ForCausalLM, Qwen3Config, WINDOWS),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    return folder, write(request.param, folder)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 151, 40).tolist()
    tails = [rng.integers(0, 151, size).tolist() for size in (1, 7, 16, 33, 80)]
    return [shared + tail for tail in tails] + [tails[4], [5]]


def logprobs_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("backwards", [False, True])
def test_logprobs_of_prompts_and_completions(checkpoint, prompts, caching, backwards):
    folder, model = checkpoint
    asked = prompts[::-1] if backwards else prompts
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, logprobs=2)
    settings = {"max_num_batched_tokens": 48, "max_num_seqs": 4, "block_size": 8}
    with LLM(
        folder,
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        enable_prefix_caching=caching,
        **settings,
    ) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        ends = [output.outputs[0].token_ids for output in outputs]
        scores = llm.score_completions(asked, ends, use_tqdm=False)

    for prompt, output, score in zip(asked, outputs, scores, strict=True):
        one = output.outputs[0]
        rows = logprobs_of(model, prompt + one.token_ids)
        entries = [*output.prompt_logprobs[1:], *one.logprobs]
        for row, entry in zip(rows, entries, strict=False):
            for token, found in entry.items():
                assert abs(found.logprob - row[token]) <= MAX_GAP
                assert found.rank == (row >= row[token]).sum()
        chosen = rows[np.arange(len(prompt) - 1, len(rows) - 1), one.token_ids]
        np.testing.assert_allclose(score.logprobs, chosen, atol=MAX_GAP)
