"""OPT: learned positions, layer norms before or after each branch, narrow embeddings."""

import functools
from dataclasses import dataclass

import jax
from flax import nnx
from jax.typing import DTypeLike
from transformers import PreTrainedConfig

from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.context import Context
from jaxllm.modeling.decoder import Decoder, DecoderLayer
from jaxllm.modeling.families.common import activation_from_hf, head_dim_from_hf
from jaxllm.modeling.layers.embedding import Embedding
from jaxllm.modeling.layers.linear import Linear
from jaxllm.modeling.weights import Weight
from jaxllm.pallas_kernels.attention import LayerCache

HANDLED_FIELDS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "ffn_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "activation_function",
        "word_embed_proj_dim",
        "do_layer_norm_before",
        "_remove_final_layer_norm",
        "enable_bias",
        "layer_norm_elementwise_affine",
        "tie_word_embeddings",
    }
)

IGNORED_WEIGHTS = ()

_DECODER = "model.decoder"
_LAYER = f"{_DECODER}.layers.{{i}}"
_QKV = ("q_proj", "k_proj", "v_proj")
_NORMS = {
    f"{_LAYER}.self_attn_layer_norm": "layers.{i}.attn_norm",
    f"{_LAYER}.final_layer_norm": "layers.{i}.mlp_norm",
    f"{_DECODER}.final_layer_norm": "norm",
}
_LINEARS = {
    f"{_LAYER}.self_attn.out_proj": "layers.{i}.attn.o",
    f"{_LAYER}.fc1": "layers.{i}.mlp.up",
    f"{_LAYER}.fc2": "layers.{i}.mlp.down",
}

WEIGHTS = (
    Weight(f"{_DECODER}.embed_tokens.weight", "embed.weight"),
    Weight(f"{_DECODER}.embed_positions.weight", "positions.weight"),
    Weight(f"{_DECODER}.project_in.weight", "project_in.weight"),
    Weight(f"{_DECODER}.project_out.weight", "project_out.weight"),
    *(Weight(f"{name}.weight", f"{path}.scale") for name, path in _NORMS.items()),
    *(Weight(f"{name}.bias", f"{path}.bias") for name, path in _NORMS.items()),
    *(
        Weight([f"{_LAYER}.self_attn.{n}.{kind}" for n in _QKV], f"layers.{{i}}.attn.qkv.{kind}")
        for kind in ("weight", "bias")
    ),
    *(
        Weight(f"{name}.{kind}", f"{path}.{kind}")
        for name, path in _LINEARS.items()
        for kind in ("weight", "bias")
    ),
    Weight("lm_head.weight", "head.weight"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OPTConfig(ModelConfig):
    """One OPT model."""

    token_dim: int
    """Width of the token embedding; another than `embed_dim` is projected from and to."""

    post_norm: bool
    """Whether norms come after the sum of stream and branch, as in the 350m model."""

    final_norm: bool


class PostNormLayer(DecoderLayer):
    """Attention and feed-forward, each followed by the norm of the whole stream."""

    def __call__(
        self, x: jax.Array, cache: LayerCache, ctx: Context
    ) -> tuple[jax.Array, LayerCache]:
        """[T, E] and this layer's cache -> [T, E] and the cache, written."""
        x, cache = self.attn(x, cache, ctx, onto=x)
        x = self.attn_norm(self.stream(x, ctx))
        return self.mlp_norm(self.stream(self.mlp(ctx.sharder.whole(x), onto=x), ctx)), cache


class OPTDecoder(Decoder):
    """A decoder whose tokens may be narrower than its stream, with or without a last norm."""

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        layer = PostNormLayer if config.post_norm else DecoderLayer
        super().__init__(config, layer=layer, dtype=dtype, rngs=rngs)
        if not config.final_norm:
            self.norm = None
        narrow, wide = {"token_embed": config.token_dim}, {"embed": config.embed_dim}
        projected = config.token_dim != config.embed_dim
        self.project_in = Linear(narrow, wide, dtype=dtype, rngs=rngs) if projected else None
        self.project_out = Linear(wide, narrow, dtype=dtype, rngs=rngs) if projected else None
        if projected:
            table = functools.partial(
                Embedding,
                config.vocab_size,
                config.token_dim,
                axis="token_embed",
                padding=config.vocab_padding,
                dtype=dtype,
                rngs=rngs,
            )
            self.embed, self.head = table(), self.head and table()

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32 [T] twice -> what the first layer reads, [T, E]."""
        x = self.embed(tokens)
        x = x if self.project_in is None else self.project_in(x)
        return x if self.positions is None else x + self.positions(positions)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> float32 [R, V]."""
        return super().logits(hidden if self.project_out is None else self.project_out(hidden))


build = OPTDecoder


def config_from_hf(hf: PreTrainedConfig) -> OPTConfig:
    """Returns the sizes and options of a transformers `OPTConfig`."""
    return OPTConfig(
        family="opt",
        vocab_size=hf.vocab_size,
        embed_dim=hf.hidden_size,
        mlp_dim=hf.ffn_dim,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=head_dim_from_hf(hf),
        max_position=hf.max_position_embeddings,
        norm_eps=1e-5,  # the class has no field for it
        activation=activation_from_hf(hf, "activation_function"),
        rope=None,
        tie_embeddings=hf.tie_word_embeddings,
        norm="layer" if hf.layer_norm_elementwise_affine else "layer_plain",
        mlp="plain",
        qkv_bias=hf.enable_bias,
        o_bias=hf.enable_bias,
        mlp_bias=hf.enable_bias,
        position_offset=2,
        token_dim=hf.word_embed_proj_dim,
        post_norm=not hf.do_layer_norm_before,
        final_norm=hf.do_layer_norm_before and not hf._remove_final_layer_norm,
    )
