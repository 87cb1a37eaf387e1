"""What a model is: sizes and options, without weights and without JAX.

A number or an optional norm in which architectures differ is a field here; a
different dataflow is a layer class in the family's file.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the names follow transformers' `rope_parameters`."""

    kind: str = "default"
    """One of `layers.rope.KINDS`."""

    theta: float = 10000.0
    factor: float = 1.0
    partial: float = 1.0
    """Share of each head that is rotated, its first dimensions."""

    original_max_position: int = 0
    """Context length before scaling, in tokens; 0 where the kind does not use it."""

    length: int = 0
    """Longest sequence to come, in tokens, of `with_length`; 0: the original context."""

    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency where no sequence is longer than the original."""

    long_factors: tuple[float, ...] = ()
    """longrope: the same where some sequence may be."""

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Multiplies cos and sin; None means what the kind's formula gives."""

    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether yarn rounds the bounds of its ramp to whole dimensions."""

    def rotary_dim(self, head_dim: int) -> int:
        """Returns how many dimensions of a head are rotated."""
        return int(head_dim * self.partial)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One model, as the programs see it. Hashable, so it can key a program cache."""

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """As they are stored, `kv_copies` included."""

    head_dim: int
    max_position: int
    """Most positions the checkpoint was made for, scaling included."""

    norm_eps: float
    activation: str
    """Key of `layers.mlp.ACTIVATIONS`."""

    rope: RopeConfig | None
    """None: positions are not rotated."""

    tie_embeddings: bool
    norm: str = "rms"
    """Key of `layers.norm.NORMS`."""

    mlp: str = "gated"
    """Key of `layers.mlp.MLPS`."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Norm over the head size of queries and keys, before the rotation."""

    position_offset: int | None = None
    """Row of position 0 in a table of learned positions; None: there is no table."""

    embed_scale: float | None = None
    """Factor of the looked-up embeddings."""

    residual_scale: float | None = None
    """Factor of what each attention and feed-forward adds to the residual stream."""

    logit_divisor: float | None = None
    logit_softcap: float | None = None
    attn_softcap: float | None = None
    attn_scales: tuple[float, ...] | None = None
    """Factor of each layer's scores; None means `head_dim ** -0.5`."""

    windows: tuple[int | None, ...] | None = None
    """Sliding window of each layer, in tokens (the query's own included); None: full."""

    kv_copies: int = 1
    """How often each KV head of the checkpoint is stored, its query heads divided among the
    copies: where there are more devices than KV heads (`fitting.fit`)."""

    vocab_padding: int = 0
    """Rows after the last token, so that devices have equal shares; never sampled."""

    float16_overflows: bool = False
    """Whether activations leave the range of float16, which ends at 65504."""

    @property
    def num_logits(self) -> int:
        """Columns of the logits (V): the vocabulary and its padding."""
        return self.vocab_size + self.vocab_padding

    def window(self, layer: int) -> int | None:
        """Returns the sliding window of one layer."""
        return self.windows[layer] if self.windows else None

    def attn_scale(self, layer: int) -> float:
        """Returns the factor of one layer's scores."""
        return self.attn_scales[layer] if self.attn_scales else self.head_dim**-0.5

    @property
    def group_size(self) -> int:
        """Query heads that share one stored KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def default_length(self) -> int:
        """Longest sequence where the caller asks for none, in tokens.

        Not all that longrope can do: its long factors make short texts worse.
        """
        if self.rope is not None and self.rope.kind == "longrope":
            return min(self.max_position, self.rope.original_max_position)
        return self.max_position


def with_length(config: ModelConfig, max_model_len: int) -> ModelConfig:
    """Returns the config of an engine whose sequences have at most this many tokens.

    The frequencies of some rotations depend on the longest sequence. Here they are
    the same for all sequences of an engine, so that cached keys stay right.
    """
    if config.rope is None:
        return config
    return replace(config, rope=replace(config.rope, length=max_model_len))
