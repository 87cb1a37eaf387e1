"""Configs of published checkpoints, as they are on the hub, resolve to the right sizes."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from transformers import GPT2Config

from jaxllm.errors import UnsupportedModelError
from jaxllm.modeling import registry
from jaxllm.modeling.abstract import abstract_model
from jaxllm.modeling.families import gemma2
from tests.tiny import gpt2_config, opt_config, sharder, tiny_model

OPT_125M = {
    "_name_or_path": "facebook/opt-125m",
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
OPT_350M = {
    **OPT_125M,
    "_name_or_path": "opt-350m",
    "_remove_final_layer_norm": False,
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 512,
}
CEREBRAS_1_3B = {
    "activation_function": "gelu",
    "architectures": ["GPT2LMHeadModel"],  # the file says GPT2Model, so hf_overrides it is
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_embd": 2048,
    "n_head": 16,
    "n_inner": 8192,
    "n_layer": 24,
    "n_positions": 2048,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "torch_dtype": "float32",
    "transformers_version": "4.19.2",
    "use_cache": True,
    "vocab_size": 50257,
}
GRANITE_3_1_8B = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.0078125,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12800,
    "logits_scaling": 16.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 49155,
}

SIZES = ("vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads")
# By name: the file; SIZES; longest sequence, head size; parameters, counted by hand or by
# the model card; some options.
PUBLISHED = {
    "opt-125m": (
        OPT_125M,
        (50272, 768, 3072, 12, 12, 12),
        (2048, 64),
        125_239_296,
        {"post_norm": False, "final_norm": True, "token_dim": 768, "norm": "layer"},
    ),
    "opt-350m": (
        OPT_350M,
        (50272, 1024, 4096, 24, 16, 16),
        (2048, 64),
        331_196_416,
        {"post_norm": True, "final_norm": False, "token_dim": 512, "position_offset": 2},
    ),
    "Cerebras-GPT-1.3B": (
        CEREBRAS_1_3B,
        (50257, 2048, 8192, 24, 16, 16),
        (2048, 128),
        1_315_723_264,
        {"activation": "gelu", "attn_scales": (128**-0.5,) * 24, "position_offset": 0},
    ),
    "granite-3.1-8b-instruct": (
        GRANITE_3_1_8B,
        (49155, 4096, 12800, 40, 32, 8),
        (131072, 128),
        8_170_848_256,
        {"embed_scale": 12.0, "residual_scale": 0.22, "logit_divisor": 16.0},
    ),
}


@pytest.mark.filterwarnings("ignore:config.json has keys:UserWarning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_its_sizes(name, tmp_path):
    stated, sizes, (longest, head_dim), num_params, options = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(stated))

    hf = registry.read_hf_config(tmp_path)
    architecture, family = registry.family_of(hf)
    config = registry.model_config(hf, family)
    model = abstract_model(config, family.build, "bfloat16", sharder())

    assert architecture == stated["architectures"][0]
    assert tuple(getattr(config, size) for size in SIZES) == sizes
    assert (config.max_position, config.head_dim) == (longest, head_dim)
    assert {option: getattr(config, option) for option in options} == options
    assert config.tie_embeddings
    assert sum(leaf.shape.size for leaf in model.leaves) == num_params


def read(hf):
    _, family = registry.family_of(hf)
    return registry.model_config(hf, family)


def test_cross_attention_is_refused():
    hf = GPT2Config(architectures=["GPT2LMHeadModel"], add_cross_attention=True)

    message = r"sets add_cross_attention=True .*GPT2Config does not implement"
    with pytest.raises(UnsupportedModelError, match=message):
        read(hf)


@pytest.mark.parametrize(
    ("config", "architecture"), [(gpt2_config, "GPT2LMHeadModel"), (opt_config, "OPTForCausalLM")]
)
def test_unknown_activation_is_refused_by_the_name_of_its_field(config, architecture):
    hf = config(architectures=[architecture], activation_function="quick_gelu")

    with pytest.raises(UnsupportedModelError, match=r"activation_function='quick_gelu'.*'gelu'"):
        read(hf)


def test_inner_size_is_four_times_the_width_unless_stated():
    hf = gpt2_config(architectures=["GPT2LMHeadModel"], hidden_size=96)

    assert read(hf).mlp_dim == 384
    assert dataclasses.replace(read(hf), mlp_dim=100) == read(
        gpt2_config(architectures=["GPT2LMHeadModel"], hidden_size=96, intermediate_size=100)
    )


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 8.5), ("float32", np.float32(72**0.5))])
def test_gemma2_scales_embeddings_by_a_number_of_its_own_type(dtype, scale):
    config, _, _ = tiny_model("gemma2", hidden_size=72)

    model = gemma2.build(config, dtype=dtype, rngs=nnx.Rngs(0))

    assert model.embed.scale == scale
