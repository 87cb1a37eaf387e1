"""From a checkpoint's `architectures` to the family that builds it.

Families are imported when one is needed, so that a family that cannot be
imported breaks only its own models, with its own error.
"""

import difflib
import importlib
import json
import warnings
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, Protocol, cast

from transformers import CONFIG_MAPPING, PreTrainedConfig

from jaxllm.errors import (
    CheckpointError,
    ConfigError,
    FamilyImportError,
    UnsupportedModelError,
    nearest,
)
from jaxllm.hub import CONFIG_ERRORS, JSON_ERRORS
from jaxllm.modeling.config import ModelConfig
from jaxllm.modeling.decoder import Decoder
from jaxllm.modeling.weights import Weight
from jaxllm.sampling_params import as_integer

# Architecture name in config.json -> module in `families`.
ARCHITECTURES: dict[str, str] = {
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
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
        "classifier_dropout",
        "dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
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


LENGTH_FIELDS = (
    "max_position_embeddings",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Fields that bound the length of a sequence; the first is the one that families read."""

MOST_LAYERS = 10_000
"""Far more than any model has; config classes make lists of this length."""

MOST_OF_A_SIZE = 2**31 - 1
"""Positions and token ids are int32."""


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


Overrides = Mapping[str, Any] | Callable[[PreTrainedConfig], PreTrainedConfig]
"""Values that replace fields of config.json, nested ones too; or a function over the config."""


def read_hf_config(folder: Path, overrides: Overrides | None = None) -> PreTrainedConfig:
    """Returns the config of a checkpoint folder; runs none of its code.

    Args:
        folder: With a config.json.
        overrides: `hf_overrides` of the caller.

    Raises:
        ConfigError: `overrides` is neither values nor a function that returns a config.
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
    if isinstance(overrides, Mapping):
        stated = merged(stated, overrides)
    quantization = stated.get("quantization_config")
    if quantization is not None:
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        raise UnsupportedModelError(
            f"{str(folder)!r} is quantized (quant_method={method!r}), and jaxllm reads "
            "unquantized checkpoints only. Use the unquantized repository."
        )
    hf = _parse(stated, folder)
    if overrides is None or isinstance(overrides, Mapping):
        return hf
    if not callable(overrides):
        raise ConfigError(
            f"hf_overrides must be a dict of values or a function; got {overrides!r}. "
            "Pass {'architectures': ['LlamaForCausalLM']}, say."
        )
    changed = overrides(hf)
    if not isinstance(changed, PreTrainedConfig):
        raise ConfigError(
            f"hf_overrides returned {type(changed).__name__}, and must return the config it was "
            "given, changed: end it with `return config`."
        )
    return changed


def _parse(stated: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """Returns the config object of a parsed config.json."""
    model_type = stated.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        what = f"has model_type={model_type!r}" if "model_type" in stated else "has no model_type"
        code = (
            " Its auto_map names code of the repository, which jaxllm never runs."
            if "auto_map" in stated
            else ""
        )
        guess = nearest(str(model_type), CONFIG_MAPPING.keys())
        raise UnsupportedModelError(
            f"config.json of {str(folder)!r} cannot be read: it {what}, and transformers knows "
            f"none such{guess}.{code} Pass hf_overrides={{'model_type': 'llama'}}, say, if the "
            "model is a known one under another name."
        )
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(stated.get(key), (int, float)) and stated[key] > MOST_LAYERS:
            raise UnsupportedModelError(
                f"config.json of {str(folder)!r} cannot be read: {key}={stated[key]} is more than "
                f"the {MOST_LAYERS} that any model may have. Download the file again, or do not "
                "use this checkpoint."
            )
    try:
        return CONFIG_MAPPING[model_type].from_dict(stated)
    except CONFIG_ERRORS as error:
        raise UnsupportedModelError(
            f"config.json of {str(folder)!r} cannot be read: {error}"
        ) from error


def merged(stated: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values replaced by overrides; dicts within dicts are merged, not replaced."""
    result = dict(stated)
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        result[key] = value
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is not one.
    """
    try:
        value = json.loads(path.read_text())
    except JSON_ERRORS as error:
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
            "config.json has no top-level 'architectures' (No model architectures are specified), "
            "so the model cannot be chosen. Pass hf_overrides={'architectures': ['...']} with one "
            f"of {sorted(ARCHITECTURES)}."
        )
    for name in names:
        if name in ARCHITECTURES:
            return name, family(ARCHITECTURES[name])
    raise UnsupportedModelError(
        f"Model architectures {names} are not supported for now{nearest(names[0], ARCHITECTURES)}. "
        f"Supported architectures: {by_likeness(names[0])}. If it is one of them under another "
        "name, pass hf_overrides={'architectures': ['...']}."
    )


def by_likeness(name: str) -> list[str]:
    """Returns the supported architectures, those spelt most like a name first."""

    def likeness(known: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), known.lower()).ratio()

    return sorted(sorted(ARCHITECTURES), key=likeness, reverse=True)


def family(name: str) -> Family:
    """Imports a family.

    Raises:
        FamilyImportError: Its module fails; the message has the cause.
    """
    module = f"jaxllm.modeling.families.{name}"
    try:
        return cast("Family", importlib.import_module(module))
    except Exception as error:  # whatever the module does wrong, the caller must read it
        raise FamilyImportError(
            f"The model is supported, but its code failed to be inspected: importing {module} "
            f"raised {type(error).__name__}: {error}. Mend that file, or install what it needs."
        ) from error


def describe(name: str) -> str:
    """Returns one line about a family: its own, or why it cannot be imported."""
    try:
        return (family(name).__doc__ or "").partition("\n")[0]
    except FamilyImportError as error:
        return str(error).replace("\n", " ")


def model_config(hf: PreTrainedConfig, family: Family) -> ModelConfig:
    """Returns the model's config, after checking that nothing in the HF one is lost.

    Raises:
        UnsupportedModelError: A field that the config class declares is not at its
            default and is not handled. Such a model would be silently wrong.
    """
    _refuse_unhandled(hf, family)
    try:
        config = family.config_from_hf(hf)
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"config.json has values that a {type(hf).__name__} cannot have ({error!r}). Download "
            "the file again, or do not use this checkpoint."
        ) from error
    _refuse_absurd(config)
    return config


def _refuse_absurd(config: ModelConfig) -> None:
    """Raises where a size is one that no model has, before anything is made of that size."""
    sizes = {
        "vocabulary": config.vocab_size,
        "width": config.embed_dim,
        "feed-forward width": config.mlp_dim,
        "number of layers": config.num_layers,
        "number of heads": config.num_heads,
        "number of KV heads": config.num_kv_heads,
        "head size": config.head_dim,
        "length": config.max_position,
    }
    for name, size in sizes.items():
        if as_integer(size) is None or not 0 < size <= MOST_OF_A_SIZE:
            raise UnsupportedModelError(
                f"config.json states a {name} of {size!r}, and it must be an integer from 1 to "
                f"{MOST_OF_A_SIZE}. Download the file again, or do not use this checkpoint."
            )


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
    undeclared = sorted(set(given) - set(default) - handled - set(LENGTH_FIELDS))
    if undeclared:
        warnings.warn(
            f"config.json has keys that {type(hf).__name__} does not declare; they are "
            f"ignored: {undeclared}",
            stacklevel=2,
        )
