"""What a request asks of the sampler, and when it stops. No JAX here."""

import dataclasses
import logging
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from jaxllm.errors import RequestError
from jaxllm.keywords import ExplainsKeywords

logger = logging.getLogger("jaxllm")

MIN_TEMPERATURE = 0.01
"""A smaller temperature above 0 is raised to it, as logits divided by less overflow."""


@dataclasses.dataclass(slots=True)
class SamplingParams(metaclass=ExplainsKeywords):
    """How tokens of one request are chosen, and when it ends.

    Args:
        temperature: Divides the logits; 0 is greedy. From 0 to 2.
        seed: Makes the request's samples repeatable; None draws one, -1 is None.
        max_tokens: Most tokens to generate; None: up to `max_model_len`.
        stop_token_ids: Tokens that end the request.
        ignore_eos: Whether to go on after the end-of-sequence token.
        logprobs: Return the log-probability of each token and of this many
            alternatives; None returns none.
        detokenize: Whether to make text of the tokens.
        skip_special_tokens: Whether text leaves out special tokens.

    Raises:
        RequestError: A value is outside its range.
        TypeError: An unknown name, with the nearest known one.
    """

    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Checks every value that needs no model to check."""
        self.temperature = _number("temperature", self.temperature, 0.0, 2.0)
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature=%g is raised to %g; use 0 for greedy",
                self.temperature,
                MIN_TEMPERATURE,
            )
            self.temperature = MIN_TEMPERATURE
        self.seed = _whole("seed", self.seed, optional=True)
        if self.seed == -1:
            self.seed = None
        self.max_tokens = _whole("max_tokens", self.max_tokens, at_least=1, optional=True)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.logprobs is True:
            self.logprobs = 1
        self.logprobs = _whole("logprobs", self.logprobs, at_least=0, optional=True)

    def clone(self) -> "SamplingParams":
        """Returns a copy."""
        return dataclasses.replace(self)


def as_integer(value: Any) -> int | None:
    """Returns an integer of any library as an `int`; None for all else, claims and floats too."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # arrays have __index__ too: only calling it tells
    except TypeError:
        return None


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}.")
    if not low <= float(value) <= high:
        raise RequestError(f"{name} must be in [{low:g}, {high:g}], got {value}.")
    return float(value)


def _whole(
    name: str, value: Any, *, at_least: int | None = None, optional: bool = False
) -> int | None:
    if value is None and optional:
        return None
    whole = as_integer(value)
    if whole is None:
        raise RequestError(f"{name} must be an integer, got {value!r}.")
    if at_least is not None and whole < at_least:
        raise RequestError(f"{name} must be at least {at_least}, got {whole}.")
    return whole


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of token ids, got {value!r}.")
    ids = [_whole(f"each of {name}", v, at_least=0) for v in value]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
