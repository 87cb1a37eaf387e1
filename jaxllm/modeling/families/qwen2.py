"""Qwen2: Llama with biases on queries, keys and values, and windows on later layers."""

import dataclasses

from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.families import llama
from jaxllm.modeling.families.common import windows_from_hf

build = llama.build

HANDLED_FIELDS = (llama.HANDLED_FIELDS - {"attention_bias", "head_dim", "mlp_bias"}) | {
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
}

IGNORED_WEIGHTS = llama.IGNORED_WEIGHTS

WEIGHTS = llama.WEIGHTS


def config_from_hf(hf: PreTrainedConfig) -> ModelConfig:
    """Returns the sizes and options of a `Qwen2Config`."""
    return dataclasses.replace(
        llama.config_from_hf(hf),
        family="qwen2",
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        windows=windows_from_hf(hf),
    )
