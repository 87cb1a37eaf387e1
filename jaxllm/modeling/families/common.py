"""Readings of a Hugging Face config that several families share."""

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
}

# Kinds whose `max_position_embeddings` states the scaled length already.
SCALED_ALREADY = ("llama3", "yarn", "longrope")


def rope_from_hf(hf: PreTrainedConfig) -> RopeConfig:
    """Returns the rotary embedding of a config, whose spelling transformers has unified.

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
    unknown = sorted(set(given) - set(ROPE_KEYS))
    if unknown:
        raise UnsupportedModelError(
            f"rope_parameters has {unknown}, which jaxllm does not read; a model that needs "
            f"them would be silently wrong. It reads {sorted(ROPE_KEYS)}."
        )
    if kind == "yarn" and "factor" not in given:
        given["factor"] = hf.max_position_embeddings / given["original_max_position_embeddings"]
    fields = {ROPE_KEYS[key]: value for key, value in given.items()}
    return RopeConfig(kind=kind, **fields)


def activation_from_hf(hf: PreTrainedConfig) -> str:
    """Returns the activation of the feed-forward layers.

    Raises:
        UnsupportedModelError: It is not implemented.
    """
    if hf.hidden_act not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json has hidden_act={hf.hidden_act!r}, which jaxllm does not implement. "
            f"It has {sorted(ACTIVATIONS)}."
        )
    return hf.hidden_act


def derived_max_position(hf: PreTrainedConfig) -> int:
    """Returns the longest sequence of a config, in tokens, rope scaling included."""
    rope = hf.rope_parameters or {}
    kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
    if kind in SCALED_ALREADY or kind == "default":
        return hf.max_position_embeddings
    return int(hf.max_position_embeddings * factor)


def windows_from_hf(hf: PreTrainedConfig) -> tuple[int | None, ...] | None:
    """Returns the sliding window of each layer, from `layer_types`."""
    if "sliding_attention" not in (hf.layer_types or ()):
        return None
    return tuple(hf.sliding_window if t == "sliding_attention" else None for t in hf.layer_types)
