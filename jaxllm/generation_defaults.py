"""The sampling parameters of a call that passes none: the model's own, and the caller's changes.

Only what `KEYS` names is read of a generation_config.json. Its `do_sample` is not, as
in vLLM: a model whose file says nothing of a temperature is sampled at 1.
"""

import logging
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import CheckpointError, ConfigError, RequestError, nearest
from jaxllm.sampling_params import SamplingParams

logger = logging.getLogger("jaxllm")

KEYS = {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
    "skip_special_tokens": "skip_special_tokens",
}
"""What is read of generation_config.json, and which sampling parameter it is."""

OVERRIDES = KEYS | {"max_tokens": "max_tokens"}
"""What `override_generation_config` may name: the file's keys, or the parameter itself."""


def default_sampling_params(
    stated: Mapping[str, Any] | None, overrides: Mapping[str, Any] | None = None
) -> SamplingParams:
    """Returns the parameters that `generate` uses where it is given none.

    Args:
        stated: generation_config.json as parsed; None where there is none or it is not
            to be read.
        overrides: `override_generation_config`; a None in it takes the file's value away.

    Raises:
        CheckpointError: A value of the file cannot be used, and is not overridden.
        ConfigError: `overrides` has an unknown key or a wrong value.
    """
    changes = _changes(overrides)
    own = _own({} if stated is None else stated, overridden=set(changes))
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        return SamplingParams(**own, **changes)
    except RequestError as error:
        raise ConfigError(
            f"override_generation_config={dict(overrides or {})} cannot be used: {error}"
        ) from error


def _changes(overrides: Any) -> dict[str, Any]:
    """Returns the caller's values by parameter."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            "override_generation_config must be a dict such as {'temperature': 0.5}, "
            f"got {overrides!r}."
        )
    for key in overrides:
        if key not in OVERRIDES:
            guess = nearest(str(key), OVERRIDES) or "."
            raise ConfigError(
                f"override_generation_config has an unknown key {key!r}{guess} "
                f"It takes: {', '.join(OVERRIDES)}."
            )
    if {"max_tokens", "max_new_tokens"} <= set(overrides):
        raise ConfigError(
            "override_generation_config has both 'max_tokens' and 'max_new_tokens', which are "
            "one. Leave one out."
        )
    return {OVERRIDES[key]: value for key, value in overrides.items()}


def _own(stated: Any, overridden: set[str]) -> dict[str, Any]:
    """Returns the file's values by parameter, each of which can be used."""
    if not isinstance(stated, Mapping):
        raise CheckpointError(
            f"generation_config.json holds a {type(stated).__name__} and must hold an object. "
            "Mend the file, or pass generation_config='vllm' to leave it unread."
        )
    own = {
        parameter: stated[key]
        for key, parameter in KEYS.items()
        if stated.get(key) is not None and parameter not in overridden
    }
    try:
        SamplingParams(**own)
    except RequestError as error:
        raise CheckpointError(
            f"generation_config.json of the model cannot be used: {error} Mend the file, pass "
            "override_generation_config, or pass generation_config='vllm' to leave it unread."
        ) from error
    if own:
        logger.info(
            "sampling defaults of the model's generation_config.json: %s; "
            "generation_config='vllm' leaves it unread",
            ", ".join(f"{name}={value}" for name, value in own.items()),
        )
    return own
