"""Granite: Llama with factors on embeddings, scores, branches and logits."""

import dataclasses

from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.families import llama

build = llama.build

HANDLED_FIELDS = (llama.HANDLED_FIELDS - {"head_dim"}) | {
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
}

IGNORED_WEIGHTS = llama.IGNORED_WEIGHTS

WEIGHTS = llama.WEIGHTS


def config_from_hf(hf: PreTrainedConfig) -> ModelConfig:
    """Returns the sizes and options of a `GraniteConfig`."""
    config = llama.config_from_hf(hf)
    return dataclasses.replace(
        config,
        family="granite",
        embed_scale=hf.embedding_multiplier,
        residual_scale=hf.residual_multiplier,
        attn_scales=(hf.attention_multiplier,) * config.num_layers,
        logit_divisor=hf.logits_scaling,
    )
