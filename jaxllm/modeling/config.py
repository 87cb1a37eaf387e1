"""What a model is: sizes and options, without weights and without JAX.

A number or an optional norm in which architectures differ is a field here; a
different dataflow is a layer class in the family's file.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the names follow transformers' `rope_parameters`."""

    kind: str = "default"
    """One of `layers.rope.KINDS`."""

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    """Context length before scaling, in tokens; 0 where the kind does not use it."""

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
    head_dim: int
    max_position: int
    """Most positions the checkpoint was made for, scaling included."""

    norm_eps: float
    activation: str
    """Key of `layers.mlp.ACTIVATIONS`."""

    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over the head size of queries and keys, before the rotation."""

    attn_scale: float | None = None
    """Factor of the scores; None means `head_dim ** -0.5`."""

    attn_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    """Sliding window of each layer, in tokens (the query's own included); None: full."""

    def window(self, layer: int) -> int | None:
        """Returns the sliding window of one layer."""
        return self.windows[layer] if self.windows else None

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.num_heads // self.num_kv_heads
