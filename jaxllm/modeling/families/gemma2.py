"""Gemma 2: norms before and after each branch, soft caps, windows on every other layer."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.context import Context
from jaxllm.modeling.decoder import Decoder, DecoderLayer
from jaxllm.modeling.families import llama
from jaxllm.modeling.families.common import windows_from_hf
from jaxllm.modeling.layers.norm import norm_layer
from jaxllm.modeling.weights import Weight
from jaxllm.pallas_kernels.attention import LayerCache

HANDLED_FIELDS = (llama.HANDLED_FIELDS - {"hidden_act", "mlp_bias"}) | {
    "hidden_activation",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}

IGNORED_WEIGHTS = llama.IGNORED_WEIGHTS

_LAYER = "model.layers.{i}"
_NORMS = {
    f"{_LAYER}.input_layernorm": "layers.{i}.attn_norm",
    f"{_LAYER}.post_attention_layernorm": "layers.{i}.attn_post_norm",
    f"{_LAYER}.pre_feedforward_layernorm": "layers.{i}.mlp_norm",
    f"{_LAYER}.post_feedforward_layernorm": "layers.{i}.mlp_post_norm",
    "model.norm": "norm",
}

WEIGHTS = (
    *(line for line in llama.WEIGHTS if "norm" not in line.path),
    *(Weight(f"{name}.weight", f"{path}.offset") for name, path in _NORMS.items()),
)


class Gemma2Layer(DecoderLayer):
    """A layer that normalises what each branch adds, too."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        self.attn_post_norm = norm_layer(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm_layer(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: LayerCache, ctx: Context
    ) -> tuple[jax.Array, LayerCache]:
        """[T, E] and this layer's cache -> [T, E] and the cache, written."""
        attended, cache = self.attn(self.attn_norm(x), cache, ctx)
        attended = self.stream(attended, ctx)
        x = self.stream(x + self.attn_post_norm(attended), ctx)
        fed = self.stream(self.mlp(ctx.sharder.whole(self.mlp_norm(x))), ctx)
        return self.stream(x + self.mlp_post_norm(fed), ctx), cache


def build(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Decoder:
    """Returns the module. The factor of the embeddings is one of the model's own numbers."""
    scale = float(np.asarray(config.embed_dim**0.5, dtype))
    config = dataclasses.replace(config, embed_scale=scale)
    return Decoder(config, layer=Gemma2Layer, dtype=dtype, rngs=rngs)


def config_from_hf(hf: PreTrainedConfig) -> ModelConfig:
    """Returns the sizes and options of a `Gemma2Config`."""
    config = llama.config_from_hf(hf, activation="hidden_activation")
    return dataclasses.replace(
        config,
        family="gemma2",
        norm="rms_offset",
        attn_scales=(hf.query_pre_attn_scalar**-0.5,) * config.num_layers,
        attn_softcap=hf.attn_logit_softcapping,
        logit_softcap=hf.final_logit_softcapping,
        windows=windows_from_hf(hf),
        float16_overflows=True,
    )
