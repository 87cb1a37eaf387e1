"""GPT-NeoX, Pythia and Dolly: attention and feed-forward of one stream, heads rotated in part."""

from dataclasses import dataclass

import jax
from flax import nnx
from jax.typing import DTypeLike
from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.context import Context
from jaxllm.modeling.decoder import Decoder, DecoderLayer
from jaxllm.modeling.families.common import (
    activation_from_hf,
    derived_max_position,
    head_dim_from_hf,
    rope_from_hf,
)
from jaxllm.modeling.weights import Weight
from jaxllm.pallas_kernels.attention import LayerCache

HANDLED_FIELDS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "layer_norm_eps",
        "tie_word_embeddings",
        "use_parallel_residual",
        "rope_parameters",
        "attention_bias",
    }
)

IGNORED_WEIGHTS = (  # buffers of the causal mask and of the rotation
    "*layers.*.attention.bias",
    "*layers.*.attention.masked_bias",
    "*.rotary_emb.inv_freq",
)

_LAYER = "gpt_neox.layers.{i}"
_NORMS = {
    f"{_LAYER}.input_layernorm": "layers.{i}.attn_norm",
    f"{_LAYER}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "gpt_neox.final_layer_norm": "norm",
}
_LINEARS = {
    f"{_LAYER}.attention.dense": "layers.{i}.attn.o",
    f"{_LAYER}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
    f"{_LAYER}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
}
_QKV = f"{_LAYER}.attention.query_key_value"

WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", "embed.weight"),
    *(Weight(f"{name}.weight", f"{path}.scale") for name, path in _NORMS.items()),
    *(Weight(f"{name}.bias", f"{path}.bias") for name, path in _NORMS.items()),
    *(Weight(f"{name}.weight", f"{path}.weight") for name, path in _LINEARS.items()),
    *(Weight(f"{name}.bias", f"{path}.bias") for name, path in _LINEARS.items()),
    Weight(f"{_QKV}.weight", "layers.{i}.attn.qkv.weight", interleaved=True),
    Weight(f"{_QKV}.bias", "layers.{i}.attn.qkv.bias", interleaved=True),
    Weight("embed_out.weight", "head.weight"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTNeoXConfig(ModelConfig):
    """One GPT-NeoX model."""

    parallel: bool
    """Whether attention and feed-forward read the same stream, and are added together."""


class ParallelLayer(DecoderLayer):
    """Attention and feed-forward of the same stream, each behind a norm of its own."""

    def __call__(
        self, x: jax.Array, cache: LayerCache, ctx: Context
    ) -> tuple[jax.Array, LayerCache]:
        """[T, E] and this layer's cache -> [T, E] and the cache, written."""
        whole = ctx.sharder.whole(x)  # once for both
        attended, cache = self.attn(self.attn_norm(whole), cache, ctx)
        return self.stream(x + (self.mlp(self.mlp_norm(whole)) + attended), ctx), cache


def build(config: GPTNeoXConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Decoder:
    """Returns the module."""
    layer = ParallelLayer if config.parallel else DecoderLayer
    return Decoder(config, layer=layer, dtype=dtype, rngs=rngs)


def config_from_hf(hf: PreTrainedConfig) -> GPTNeoXConfig:
    """Returns the sizes and options of a transformers `GPTNeoXConfig`."""
    return GPTNeoXConfig(
        family="gpt_neox",
        vocab_size=hf.vocab_size,
        embed_dim=hf.hidden_size,
        mlp_dim=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=head_dim_from_hf(hf),
        max_position=derived_max_position(hf),
        norm_eps=hf.layer_norm_eps,
        activation=activation_from_hf(hf),
        rope=rope_from_hf(hf, partial=True),
        tie_embeddings=hf.tie_word_embeddings,
        norm="layer",
        mlp="plain",
        qkv_bias=hf.attention_bias,
        o_bias=hf.attention_bias,
        mlp_bias=True,
        parallel=hf.use_parallel_residual,
    )
