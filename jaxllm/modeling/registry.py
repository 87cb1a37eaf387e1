"""From a checkpoint's `architectures` to the family that builds it.

Families are imported when one is needed, so that a family that cannot be
imported breaks only its own models, with its own error.
"""

import importlib
import json
import warnings
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, Protocol, cast

from transformers import AutoConfig, PreTrainedConfig

from jaxllm.errors import CheckpointError, UnsupportedModelError, nearest
from jaxllm.hub import CONFIG_ERRORS
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.weights import Weight

# Architecture name in config.json -> module in `families`.
ARCHITECTURES: dict[str, str] = {
    "GPT2LMHeadModel": "gpt2",
    "Gemma2ForCausalLM": "gemma2",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Fields of every HF config that say nothing about the forward pass of a trained model.
NEUTRAL_FIELDS = frozenset(
    {
        "_name_or_path",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "id2label",
        "init_std",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "layerdrop",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",  # refused by `read_hf_config` unless it is null
        "resid_pdrop",
        "return_dict",
        "summary_activation",  # of classification heads
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class Family(Protocol):
    """What a module in `families` has."""

    build: Callable[..., Decoder]
    """`build(config, dtype=, rngs=)` -> the module."""

    WEIGHTS: tuple[Weight, ...]
    """Where each parameter comes from."""

    HANDLED_FIELDS: Set[str]
    """Fields of the HF config that `config_from_hf` reads; any other that is not at
    its default is refused."""

    IGNORED_WEIGHTS: tuple[str, ...]
    """Patterns of tensors that a checkpoint may hold and the model does not need."""

    def config_from_hf(self, hf: PreTrainedConfig) -> ModelConfig:
        """Returns the sizes and options of an HF config of this family."""
        ...


def read_hf_config(folder: Path) -> PreTrainedConfig:
    """Returns the config of a checkpoint folder; runs none of its code.

    Raises:
        CheckpointError: There is no readable config.json.
        UnsupportedModelError: transformers does not know the `model_type`, or refuses
            a value; or the checkpoint is quantized.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"Invalid repository ID or local directory specified: {str(folder)!r} has no "
            "config.json. Give the folder that holds config.json and *.safetensors, or a hub id "
            "such as 'Qwen/Qwen3-0.6B'."
        )
    stated = read_json(path)
    quantization = stated.get("quantization_config")
    if quantization is not None:
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        raise UnsupportedModelError(
            f"{str(folder)!r} is quantized (quant_method={method!r}), and jaxllm reads "
            "unquantized checkpoints only. Use the unquantized repository."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise UnsupportedModelError(
            f"config.json of {str(folder)!r} cannot be read: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is not one.
    """
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not valid JSON ({error}). Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} is not a JSON object. Download the file again.")
    return value


def family_of(hf: PreTrainedConfig) -> tuple[str, Family]:
    """Returns the architecture name and the family of a config.

    Raises:
        UnsupportedModelError: No architecture is named, or none that is known.
    """
    names = hf.architectures or []
    if not names:
        raise UnsupportedModelError(
            "config.json has no top-level 'architectures', so the model cannot be chosen. "
            f"Add one of {sorted(ARCHITECTURES)}."
        )
    for name in names:
        if name in ARCHITECTURES:
            return name, family(ARCHITECTURES[name])
    raise UnsupportedModelError(
        f"Model architectures {names} are not supported for now{nearest(names[0], ARCHITECTURES)}. "
        f"Supported architectures: {sorted(ARCHITECTURES)}."
    )


def family(name: str) -> Family:
    """Imports a family; an import that fails is raised as it is."""
    return cast("Family", importlib.import_module(f"jaxllm.modeling.families.{name}"))


def model_config(hf: PreTrainedConfig, family: Family) -> ModelConfig:
    """Returns the model's config, after checking that nothing in the HF one is lost.

    Raises:
        UnsupportedModelError: A field that the config class declares is not at its
            default and is not handled. Such a model would be silently wrong.
    """
    _refuse_unhandled(hf, family)
    return family.config_from_hf(hf)


def _refuse_unhandled(hf: PreTrainedConfig, family: Family) -> None:
    default = type(hf)().to_dict()
    given = hf.to_dict()
    handled = family.HANDLED_FIELDS | NEUTRAL_FIELDS
    unhandled = [
        f"{key}={given[key]!r} (default {default[key]!r})"
        for key in default
        if key not in handled and given.get(key) != default[key]
    ]
    if unhandled:
        raise UnsupportedModelError(
            f"config.json sets {', '.join(unhandled)}, which jaxllm's {type(hf).__name__} "
            "does not implement; ignoring it would give wrong text."
        )
    undeclared = sorted(set(given) - set(default) - handled)
    if undeclared:
        warnings.warn(
            f"config.json has keys that {type(hf).__name__} does not declare; they are "
            f"ignored: {undeclared}",
            stacklevel=2,
        )
