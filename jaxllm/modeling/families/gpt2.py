"""GPT-2, and Cerebras-GPT: learned positions, layer norms, one tensor for q, k and v."""

import numpy as np
from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.families.common import activation_from_hf, head_dim_from_hf
from jaxllm.modeling.weights import Weight

build = Decoder

HANDLED_FIELDS = frozenset(
    {
        "vocab_size",
        "n_embd",
        "n_inner",
        "n_layer",
        "n_head",
        "n_positions",
        "layer_norm_epsilon",
        "activation_function",
        "tie_word_embeddings",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",  # asks for float32 scores, which ours always are
    }
)

IGNORED_WEIGHTS = ("*h.*.attn.bias", "*h.*.attn.masked_bias")  # buffers of the causal mask

_NORMS = {"h.{i}.ln_1": "layers.{i}.attn_norm", "h.{i}.ln_2": "layers.{i}.mlp_norm", "ln_f": "norm"}
_LINEARS = {
    "h.{i}.attn.c_attn": "layers.{i}.attn.qkv",
    "h.{i}.attn.c_proj": "layers.{i}.attn.o",
    "h.{i}.mlp.c_fc": "layers.{i}.mlp.up",
    "h.{i}.mlp.c_proj": "layers.{i}.mlp.down",
}

WEIGHTS = (
    Weight("transformer.wte.weight", "embed.weight"),
    Weight("transformer.wpe.weight", "positions.weight"),
    *(Weight(f"transformer.{n}.weight", f"{path}.scale") for n, path in _NORMS.items()),
    *(Weight(f"transformer.{n}.bias", f"{path}.bias") for n, path in _NORMS.items()),
    *(  # stored [in, out]
        Weight(f"transformer.{n}.weight", f"{path}.weight", np.transpose)
        for n, path in _LINEARS.items()
    ),
    *(Weight(f"transformer.{n}.bias", f"{path}.bias") for n, path in _LINEARS.items()),
    Weight("lm_head.weight", "head.weight"),
)


def config_from_hf(hf: PreTrainedConfig) -> ModelConfig:
    """Returns the sizes and options of a `GPT2Config`."""
    head_dim = head_dim_from_hf(hf)
    scale = head_dim**-0.5 if hf.scale_attn_weights else 1.0
    by_layer = hf.scale_attn_by_inverse_layer_idx
    return ModelConfig(
        family="gpt2",
        vocab_size=hf.vocab_size,
        embed_dim=hf.n_embd,
        mlp_dim=hf.n_inner or 4 * hf.n_embd,
        num_layers=hf.n_layer,
        num_heads=hf.n_head,
        num_kv_heads=hf.n_head,
        head_dim=head_dim,
        max_position=hf.n_positions,
        norm_eps=hf.layer_norm_epsilon,
        activation=activation_from_hf(hf, "activation_function"),
        rope=None,
        tie_embeddings=hf.tie_word_embeddings,
        norm="layer",
        mlp="plain",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        position_offset=0,
        attn_scales=tuple(scale / (i + 1) if by_layer else scale for i in range(hf.n_layer)),
    )
