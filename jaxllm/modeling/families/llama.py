"""Llama, and the models that keep its shape."""

from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.families.common import (
    activation_from_hf,
    derived_max_position,
    head_dim_from_hf,
    rope_from_hf,
)
from jaxllm.modeling.weights import Weight

build = Decoder

HANDLED_FIELDS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "attention_bias",
        "mlp_bias",
    }
)

IGNORED_WEIGHTS = ("*.rotary_emb.inv_freq",)

_LAYER = "model.layers.{i}"
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")

WEIGHTS = (
    Weight("model.embed_tokens.weight", "embed.weight"),
    Weight(f"{_LAYER}.input_layernorm.weight", "layers.{i}.attn_norm.scale"),
    Weight([f"{_LAYER}.self_attn.{n}.weight" for n in _QKV], "layers.{i}.attn.qkv.weight"),
    Weight([f"{_LAYER}.self_attn.{n}.bias" for n in _QKV], "layers.{i}.attn.qkv.bias"),
    Weight(f"{_LAYER}.self_attn.o_proj.weight", "layers.{i}.attn.o.weight"),
    Weight(f"{_LAYER}.self_attn.o_proj.bias", "layers.{i}.attn.o.bias"),
    Weight(f"{_LAYER}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
    Weight([f"{_LAYER}.mlp.{n}.weight" for n in _GATE_UP], "layers.{i}.mlp.gate_up.weight"),
    Weight([f"{_LAYER}.mlp.{n}.bias" for n in _GATE_UP], "layers.{i}.mlp.gate_up.bias"),
    Weight(f"{_LAYER}.mlp.down_proj.weight", "layers.{i}.mlp.down.weight"),
    Weight(f"{_LAYER}.mlp.down_proj.bias", "layers.{i}.mlp.down.bias"),
    Weight("model.norm.weight", "norm.scale"),
    Weight("lm_head.weight", "head.weight"),
)


def config_from_hf(hf: PreTrainedConfig, *, activation: str = "hidden_act") -> ModelConfig:
    """Returns the sizes and options of a `LlamaConfig`, or of one that is much like it.

    Args:
        hf: The config; options that its class does not know are off.
        activation: The field that names the activation.
    """
    attention_bias = getattr(hf, "attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=hf.vocab_size,
        embed_dim=hf.hidden_size,
        mlp_dim=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=head_dim_from_hf(hf),
        max_position=derived_max_position(hf),
        norm_eps=hf.rms_norm_eps,
        activation=activation_from_hf(hf, activation),
        rope=rope_from_hf(hf),
        tie_embeddings=hf.tie_word_embeddings,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=getattr(hf, "mlp_bias", False),
    )
