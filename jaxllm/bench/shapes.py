"""Models by name that are all shape: a config.json, and no file of weights."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, nearest

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **_LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "word_embed_proj_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
}
"""By name, the fields of the published config.json that decide how fast a model is."""

NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def write_config(name: str, folder: Path) -> None:
    """Writes the config.json of a shape."""
    stated = {"dtype": "bfloat16", **SHAPES[name], **NO_SPECIAL_TOKENS}
    (folder / "config.json").write_text(json.dumps(stated, indent=2))


@contextmanager
def model_folder(model: str) -> Iterator[str]:
    """A name or path that `LLM` takes: of a shape, a folder for as long as it is needed.

    Args:
        model: A name in `SHAPES`; anything else is passed on as it is.

    Raises:
        ConfigError: It is none, and looks like a misspelt one.
    """
    if model in SHAPES:
        with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as folder:
            write_config(model, Path(folder))
            yield folder
        return
    guess = nearest(model, SHAPES)
    if guess and not Path(model).exists():
        raise ConfigError(
            f"--model {model!r} is neither a folder nor one of the shapes {sorted(SHAPES)}{guess} "
            "Give one of them, a folder with a config.json, or a hub id such as 'Qwen/Qwen3-0.6B'."
        )
    yield model
