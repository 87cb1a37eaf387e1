"""Readings of a Hugging Face config that several families share."""

from typing import Any

from transformers import PreTrainedConfig

from jaxllm.errors import UnsupportedModelError
from jaxllm.modeling.config import RopeConfig
from jaxllm.modeling.layers.mlp import ACTIVATIONS
from jaxllm.modeling.layers.rope import KINDS

# Keys of `rope_parameters`, by the field of RopeConfig they fill.
ROPE_KEYS = {
    "rope_theta": "theta",
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}

# Kinds whose `max_position_embeddings` states the scaled length already.
SCALED_ALREADY = ("default", "llama3", "yarn", "longrope", "proportional")


def rope_from_hf(hf: PreTrainedConfig, *, partial: bool = False) -> RopeConfig:
    """Returns the rotary embedding of a config, whose spelling transformers has unified.

    Args:
        hf: The config.
        partial: Whether the family can rotate a part of each head only.

    Raises:
        UnsupportedModelError: The scaling, or one of its keys, is not implemented.
    """
    given = {k: v for k, v in (hf.rope_parameters or {}).items() if v is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"rope_parameters has rope_type={kind!r}, which jaxllm does not implement. "
            f"It has {sorted(KINDS)}."
        )
    keys = dict(ROPE_KEYS)
    if partial or kind == "proportional":
        keys["partial_rotary_factor"] = "partial"
    unknown = sorted(set(given) - set(keys))
    if unknown:
        raise UnsupportedModelError(
            f"rope_parameters has {unknown}, which jaxllm does not read; a model that needs "
            f"them would be silently wrong. It reads {sorted(keys)}."
        )
    if kind in ("yarn", "longrope") and "factor" not in given:
        given["factor"] = hf.max_position_embeddings / given["original_max_position_embeddings"]
    if kind == "dynamic":
        given["original_max_position_embeddings"] = hf.max_position_embeddings
    fields: dict[str, Any] = {
        keys[key]: tuple(value) if isinstance(value, list) else value
        for key, value in given.items()
    }
    rope = RopeConfig(kind=kind, **fields)
    _check_factors(rope, rope.rotary_dim(head_dim_from_hf(hf)) // 2)
    return rope


def _check_factors(rope: RopeConfig, num_pairs: int) -> None:
    sizes = {"short_factor": len(rope.short_factors), "long_factor": len(rope.long_factors)}
    wrong = {name: size for name, size in sizes.items() if size != num_pairs}
    if rope.kind == "longrope" and wrong:
        raise UnsupportedModelError(
            f"rope_parameters has {wrong} numbers, and a head here rotates {num_pairs} pairs of "
            "dimensions: each needs its own."
        )


def head_dim_from_hf(hf: PreTrainedConfig) -> int:
    """Returns the size of a head, stated or derived."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def activation_from_hf(hf: PreTrainedConfig, field: str = "hidden_act") -> str:
    """Returns the activation of the feed-forward layers, from a field of the config.

    Raises:
        UnsupportedModelError: It is not implemented.
    """
    name = getattr(hf, field)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json has {field}={name!r}, which jaxllm does not implement. "
            f"It has {sorted(ACTIVATIONS)}."
        )
    return name


def derived_max_position(hf: PreTrainedConfig) -> int:
    """Returns the longest sequence of a config, in tokens, rope scaling included."""
    rope = hf.rope_parameters or {}
    if rope.get("rope_type", "default") in SCALED_ALREADY:
        return hf.max_position_embeddings
    return int(hf.max_position_embeddings * (rope.get("factor") or 1.0))


def windows_from_hf(hf: PreTrainedConfig) -> tuple[int | None, ...] | None:
    """Returns the sliding window of each layer, from `layer_types`."""
    if "sliding_attention" not in (hf.layer_types or ()):
        return None
    return tuple(hf.sliding_window if t == "sliding_attention" else None for t in hf.layer_types)
