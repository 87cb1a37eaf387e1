"""Reads what callers pass as prompts. No JAX here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.errors import RequestError
from jaxllm.sampling_params import as_integer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: text, or token ids, or both."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None


KEYS = ("prompt", "prompt_token_ids", "cache_salt")

_TEXT_ONLY = "this model reads text only. Leave it out."
_INSTEAD = "Pass 'prompt' or 'prompt_token_ids'."
_DECODER_ONLY = f"Cannot pass encoder-decoder prompt to decoder-only models. {_INSTEAD}"
REFUSED = {
    "encoder_prompt": _DECODER_ONLY,
    "decoder_prompt": _DECODER_ONLY,
    "multi_modal_data": _TEXT_ONLY,
    "multi_modal_uuids": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "prompt_embeds": f"embeddings as prompts are not implemented. {_INSTEAD}",
}
"""Keys of vLLM that jaxllm cannot serve, and why; with None for a value they are let be."""


def parse_prompts(prompts: Any) -> list[Prompt]:
    """Returns the prompts of a call: one, or a sequence of them.

    Raises:
        RequestError: Something in it is no prompt; the message says which and why.
    """
    return [_parse(prompt, where) for prompt, where in _places(prompts)]


def parse_each(prompts: Any) -> list[Prompt | RequestError]:
    """Returns the prompts of a call, with the error in place of one that is none.

    Raises:
        RequestError: They are neither a prompt nor a sequence at all.
    """
    parsed: list[Prompt | RequestError] = []
    for prompt, where in _places(prompts):
        try:
            parsed.append(_parse(prompt, where))
        except RequestError as error:
            parsed.append(error)
    return parsed


def _places(prompts: Any) -> list[tuple[Any, str]]:
    """Returns each prompt with what to call it: the one there is, or those of a sequence."""
    if isinstance(prompts, (str, Mapping)) or _is_token_ids(prompts):
        return [(prompts, "the prompt")]
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Sequence):
        raise RequestError(
            "Prompt should be a string, list of tokens, or dictionary, or a list of those; "
            f"got {type(prompts).__name__}."
        )
    return [(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]


def _is_token_ids(prompt: Any) -> bool:
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and prompt.size > 0 and np.issubdtype(prompt.dtype, np.integer)
    if isinstance(prompt, (str, bytes, bytearray)) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and all(as_integer(token) is not None for token in prompt)


def _parse(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(prompt, None)
    if _is_token_ids(prompt):
        return Prompt(None, [int(token) for token in prompt])
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt, where)
    is_array = isinstance(prompt, np.ndarray) and prompt.ndim > 0
    if is_array or (isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray))):
        what = "is empty" if not len(prompt) else "holds something that is no integer"
        raise RequestError(f"Token prompt should be a list of integers: {where} {what}.")
    raise RequestError(
        f"Prompt should be a string, list of tokens, or dictionary; {where} is "
        f"{type(prompt).__name__}."
    )


def _parse_mapping(prompt: Mapping[str, Any], where: str) -> Prompt:
    for key, why in REFUSED.items():
        if prompt.get(key) is not None:
            raise RequestError(f"{where} has {key!r}: {why}")
    unknown = sorted(set(prompt) - set(KEYS) - set(REFUSED), key=str)
    if unknown:
        raise RequestError(f"{where} has the keys {unknown}; jaxllm reads {list(KEYS)}.")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and token_ids is None:
        raise RequestError(
            f"Prompt dictionary must contain text or tokens: {where} has neither 'prompt' nor "
            "'prompt_token_ids'."
        )
    if text is not None and not isinstance(text, str):
        raise RequestError(f"Prompt text should be a string; that of {where} is {text!r}.")
    if token_ids is not None and not _is_token_ids(token_ids):
        raise RequestError(
            f"Token prompt should be a list of integers; 'prompt_token_ids' of {where} is not."
        )
    salt = prompt.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(f"cache_salt of {where} must be a non-empty string, got {salt!r}.")
    ids = None if token_ids is None else [int(token) for token in token_ids]
    return Prompt(text, ids, salt)
