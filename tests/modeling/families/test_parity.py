"""Every family and variant gives the tokens and log-probabilities of transformers."""

import json

import pytest

pytest.importorskip("torch")

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.parity import Variant, assert_same, references, write

pytestmark = pytest.mark.torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(name, old_spelling=False, **changes):
    return Variant(f"llama-{name}", LlamaForCausalLM, LlamaConfig, changes, old_spelling)


def qwen3(name, **changes):
    return Variant(f"qwen3-{name}", Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, **changes})


VARIANTS = [
    llama("gqa-untied"),
    llama("mha-tied", num_key_value_heads=4, tie_word_embeddings=True),
    llama("mqa-odd-vocab", num_key_value_heads=1, vocab_size=97),
    llama("biases", attention_bias=True, mlp_bias=True),
    llama("wide-heads-llama3-rope", head_dim=24, rope_parameters=LLAMA3_ROPE),
    llama("yarn-rope-gelu", rope_parameters=YARN_ROPE, hidden_act="gelu_pytorch_tanh"),
    llama(
        "linear-rope-old-spelling",
        True,
        rope_parameters={
            "rope_type": "linear",
            "rope_theta": 20000.0,
            "factor": 2.0,
        },
    ),
    qwen3("gqa-tied", tie_word_embeddings=True),
    qwen3("mha-bias-wide-heads", num_key_value_heads=4, head_dim=32, attention_bias=True),
    qwen3("mqa-odd-vocab", num_key_value_heads=1, vocab_size=97),
    qwen3(
        "windows",
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
]


def spell_as_before_transformers_5(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(variant, tmp_path):
    model = write(variant, tmp_path)
    if variant.old_spelling:
        spell_as_before_transformers_5(tmp_path)

    assert_same(tmp_path, references(model))
