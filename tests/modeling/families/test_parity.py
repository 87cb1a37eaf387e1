"""Every family and variant gives the tokens and log-probabilities of transformers."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jaxllm.modeling.registry import ARCHITECTURES
from tests.parity import (
    MAX_GAP,
    Variant,
    assert_same,
    forward,
    reference_forward,
    references,
    write,
)
from tests.tiny import gpt2_config, gpt_neox_config, opt_config

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
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0, 32.0, 48.0],
}
GRANITE = {
    "embedding_multiplier": 3.3,
    "residual_multiplier": 0.61,
    "attention_multiplier": 0.17,
    "logits_scaling": 0.83,
}
GEMMA2 = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}


def llama(name, old_spelling=False, settings=None, **changes):
    return Variant(
        f"llama-{name}", LlamaForCausalLM, LlamaConfig, changes, old_spelling, settings or {}
    )


def qwen3(name, **changes):
    return Variant(f"qwen3-{name}", Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, **changes})


def qwen2(name, **changes):
    return Variant(f"qwen2-{name}", Qwen2ForCausalLM, Qwen2Config, changes)


def mistral(name, **changes):
    return Variant(f"mistral-{name}", MistralForCausalLM, MistralConfig, changes)


def granite(name, **changes):
    return Variant(f"granite-{name}", GraniteForCausalLM, GraniteConfig, {**GRANITE, **changes})


def gemma2(name, **changes):
    return Variant(f"gemma2-{name}", Gemma2ForCausalLM, Gemma2Config, {**GEMMA2, **changes})


def gpt2(name, **changes):
    return Variant(f"gpt2-{name}", GPT2LMHeadModel, gpt2_config, changes)


def gpt_neox(name, **changes):
    return Variant(f"gpt_neox-{name}", GPTNeoXForCausalLM, gpt_neox_config, changes)


def opt(name, **changes):
    return Variant(f"opt-{name}", OPTForCausalLM, opt_config, changes)


VARIANTS = [
    llama("gqa-untied"),
    llama("mha-tied", num_key_value_heads=4, tie_word_embeddings=True),
    llama("mqa-odd-vocab", num_key_value_heads=1, vocab_size=97),
    llama("biases", attention_bias=True, mlp_bias=True),
    llama("wide-heads-llama3-rope", head_dim=24, rope_parameters=LLAMA3_ROPE),
    llama("yarn-rope-gelu", rope_parameters=YARN_ROPE, hidden_act="gelu_pytorch_tanh"),
    llama("linear-rope-old-spelling", True, rope_parameters=LINEAR_ROPE),
    # Sequences have at most 40 + 64 tokens, and both kinds are their plain selves up to 128.
    llama(
        "dynamic-rope-within",
        settings={"max_model_len": 128},
        max_position_embeddings=128,
        rope_parameters=DYNAMIC_ROPE,
    ),
    llama("longrope-short", settings={"max_model_len": 128}, rope_parameters=LONGROPE),
    qwen3("gqa-tied", tie_word_embeddings=True),
    qwen3("mha-bias-wide-heads", num_key_value_heads=4, head_dim=32, attention_bias=True),
    qwen3("mqa-odd-vocab", num_key_value_heads=1, vocab_size=97),
    qwen3(
        "windows",
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    qwen2("mha-tied", num_key_value_heads=4, tie_word_embeddings=True),
    qwen2("windows", use_sliding_window=True, sliding_window=16, max_window_layers=1),
    qwen2("mqa-odd-vocab", num_key_value_heads=1, vocab_size=97, sliding_window=16),
    mistral("window", sliding_window=13),
    mistral("no-window-wide-heads", sliding_window=None, head_dim=32),
    mistral("mqa-tied", num_key_value_heads=1, tie_word_embeddings=True, sliding_window=500),
    granite("gqa-untied", rms_norm_eps=0.1),
    granite("biases-tied", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    granite("mqa-linear-rope", num_key_value_heads=1, rope_parameters=LINEAR_ROPE),
    gemma2("caps", attn_logit_softcapping=2.0, final_logit_softcapping=5.0, rms_norm_eps=0.1),
    gemma2(
        "odd-heads-no-caps",
        head_dim=20,
        query_pre_attn_scalar=7,
        **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping"]),
    ),
    gemma2(
        "mqa-untied-biases-windows-last",
        num_key_value_heads=1,
        tie_word_embeddings=False,
        attention_bias=True,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
    ),
    gpt2("plain"),
    gpt2(
        "cerebras",
        activation_function="gelu",
        intermediate_size=200,
        vocab_size=97,
        layer_norm_epsilon=0.1,
    ),
    gpt2("inverse-layer-scale", scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
    gpt2("unscaled-upcast", scale_attn_weights=False, reorder_and_upcast_attn=True),
    gpt_neox("parallel", layer_norm_eps=0.1),
    gpt_neox("sequential-whole-heads", use_parallel_residual=False, rotary_pct=1.0),
    gpt_neox("tied-gelu-new", tie_word_embeddings=True, hidden_act="gelu_new", rotary_pct=1.0),
    gpt_neox(
        "no-attention-bias-odd-vocab", attention_bias=False, vocab_size=97, intermediate_size=200
    ),
    gpt_neox(
        "sequential-tied-linear-rope",
        use_parallel_residual=False,
        tie_word_embeddings=True,
        rope_parameters={**LINEAR_ROPE, "partial_rotary_factor": 0.5},
    ),
    opt("tied"),
    opt("post-norm-projected", do_layer_norm_before=False, word_embed_proj_dim=40),
    opt("no-bias-untied", enable_bias=False, tie_word_embeddings=False),
    opt("no-affine-gelu", layer_norm_elementwise_affine=False, activation_function="gelu"),
    opt(
        "no-last-norm-wide-untied",
        _remove_final_layer_norm=True,
        initializer_range=0.1,  # logits are as wide as the stream, which no norm bounds
        word_embed_proj_dim=80,
        tie_word_embeddings=False,
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

    assert_same(tmp_path, references(model), **variant.settings)


def test_every_family_has_three_variants():
    names = [variant.family for variant in VARIANTS]

    assert all(names.count(family) >= 3 for family in ARCHITECTURES.values())


@pytest.mark.parametrize("rope", [DYNAMIC_ROPE, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_sequences_longer_than_the_original_context_turn_as_transformers_turns_them(rope, tmp_path):
    variant = llama("long", max_position_embeddings=128, rope_parameters=rope)
    write(variant, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 151, (2, 250))

    ours = forward(tmp_path, tokens, length=250)

    wanted = reference_forward(tmp_path, tokens, variant.model, torch.float32)
    assert np.abs(ours - wanted).max() <= MAX_GAP
    assert np.abs(forward(tmp_path, tokens, length=128) - wanted).max() > 1


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES.values())))
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(family, tmp_path):
    variant = next(v for v in VARIANTS if v.family == family)
    write(variant, tmp_path).bfloat16().save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 151, (16, 64))

    ours = forward(tmp_path, tokens, "bfloat16")

    exact, theirs = (
        reference_forward(tmp_path, tokens, variant.model, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert np.abs(ours - exact).mean() <= 1.2 * np.abs(theirs - exact).mean()
