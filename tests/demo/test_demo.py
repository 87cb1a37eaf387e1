"""The model that ships with the package."""

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.hub import DEMO


def test_it_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 8_000_000


def test_it_ships_with_the_package():
    names = {path.name for path in DEMO.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_it_writes_code():
    with LLM("demo", max_num_seqs=4, max_num_batched_tokens=64) as llm:
        prompts = ["import os\n", "class Parser:\n", "def main():\n"]
        params = SamplingParams(temperature=0, max_tokens=60)
        outputs = llm.generate(prompts, params, use_tqdm=False)

    text = " ".join(output.outputs[0].text for output in outputs)
    assert sum(word in text for word in ("import ", "def ", "self", "return", "if ", "class ")) >= 3


@pytest.mark.torch
def test_it_gives_the_tokens_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with LLM("demo", max_num_seqs=2, max_num_batched_tokens=64) as llm:
        prompt = llm.get_tokenizer().encode("def main():\n")
        params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
        ours = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    theirs = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )

    assert ours == theirs[0, len(prompt) :].tolist()
