"""Mistral: Llama with one window on all layers."""

import dataclasses

from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.families import llama

build = llama.build

HANDLED_FIELDS = (llama.HANDLED_FIELDS - {"attention_bias", "mlp_bias"}) | {"sliding_window"}

IGNORED_WEIGHTS = llama.IGNORED_WEIGHTS

WEIGHTS = llama.WEIGHTS


def config_from_hf(hf: PreTrainedConfig) -> ModelConfig:
    """Returns the sizes and options of a `MistralConfig`."""
    config = llama.config_from_hf(hf)
    windows = (hf.sliding_window,) * config.num_layers if hf.sliding_window else None
    return dataclasses.replace(config, family="mistral", windows=windows)
