"""Qwen3: Llama with RMS norms on query and key heads, and windows on later layers."""

import dataclasses

from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.families import llama
from jaxllm.modeling.families.common import windows_from_hf
from jaxllm.modeling.weights import Weight

build = llama.build

HANDLED_FIELDS = (llama.HANDLED_FIELDS - {"mlp_bias"}) | {
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
}

IGNORED_WEIGHTS = llama.IGNORED_WEIGHTS

WEIGHTS = (
    *llama.WEIGHTS,
    Weight("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attn.q_norm.scale"),
    Weight("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attn.k_norm.scale"),
)


def config_from_hf(hf: PreTrainedConfig) -> ModelConfig:
    """Returns the sizes and options of a `Qwen3Config`."""
    config = llama.config_from_hf(hf)
    return dataclasses.replace(config, family="qwen3", qk_norm=True, windows=windows_from_hf(hf))
