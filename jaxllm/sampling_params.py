"""What a request asks of the sampler, and when it stops. No JAX here.

Names, defaults and rules are vLLM's. All that needs no model is checked and brought
to one form as the object is made; `check` does what needs one.
"""

import dataclasses
import enum
import logging
import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxllm.errors import ConfigError, RequestError
from jaxllm.keywords import ExplainsKeywords

logger = logging.getLogger("jaxllm")

MIN_TEMPERATURE = 0.01
"""A smaller temperature above 0 is raised to it, as logits divided by less overflow."""

MAX_BIAS = 100.0
"""Of either sign; what is more in `logit_bias` is brought down to it."""

MAX_BIASED_TOKENS = 1024
MAX_LOGPROB_TOKEN_IDS = 128

RANGES = {
    "presence_penalty": (-2.0, 2.0, "[-2, 2]"),
    "frequency_penalty": (-2.0, 2.0, "[-2, 2]"),
    "repetition_penalty": (math.ulp(0.0), math.inf, "(0, inf)"),
    "temperature": (0.0, 2.0, "[0, 2]"),
    "top_p": (math.ulp(0.0), 1.0, "(0, 1]"),
    "min_p": (0.0, 1.0, "[0, 1]"),
}
"""Least and most of each number that is no count, and both as messages say it."""

CLAIMS = (
    "ignore_eos",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)

TOKEN_FIELDS = ("stop_token_ids", "logit_bias", "allowed_token_ids", "logprob_token_ids")
"""What names tokens by their ids."""

LIMITS = {
    "MAX_N_SEQUENCES": 16384,
    "MAX_STOP_STRINGS": None,  # vLLM's 4 is for its server alone
    "MAX_NUM_BAD_WORDS": 128,
    "MAX_BAD_WORDS_TOTAL_TOKENS": 1024,
}
"""Most of something in one request, unless the environment says otherwise."""

UNUSED = ("stream_interval", "skip_clone", "output_text_buffer_length")
"""Keywords of vLLM's server that change no result here, and are dropped."""

_STRUCTURED = (
    "structured outputs are not implemented yet. Leave it out and check the text yourself; "
    "allowed_token_ids and logit_bias restrict single tokens."
)
_PROMPT_LOGPROBS = "not implemented. Use prompt_logprobs, or LLM.score_completions."
_INSIDE = "not implemented, as nothing here would read it. Leave it out."
REMOVED = {
    "best_of": "vLLM has removed it. Ask for n completions with logprobs=0 and keep those of the "
    "highest cumulative_logprob.",
    "use_beam_search": "vLLM has removed it, and beam search is not implemented. Use n with "
    "temperature above 0 for several completions.",
    "length_penalty": "it belongs to beam search, which is not implemented. Leave it out.",
    "early_stopping": "it belongs to beam search, which is not implemented. Leave it out.",
    "logits_processors": "vLLM has removed it. Use logit_bias, allowed_token_ids, bad_words or the "
    "penalties.",
    "truncate_prompt_tokens": "pass tokenization_kwargs={'truncate_prompt_tokens': ...} to "
    "generate.",
    "guided_decoding": _STRUCTURED,
    "structured_outputs": _STRUCTURED,
    "prompt_logprob_token_ids": _PROMPT_LOGPROBS,
    "prompt_logprob_start": _PROMPT_LOGPROBS,
    "watermarking": _INSIDE,
    "routed_experts_prompt_start": _INSIDE,
    "trace_decode_token_ids": _INSIDE,
}
"""Keywords of other versions or of vLLM alone, and why they are refused; None is let be."""


class DefaultInt(int):
    """A value that the caller did not choose."""


DEFAULT_MAX_TOKENS = DefaultInt(16)


class RequestOutputKind(enum.Enum):
    """What each of a request's outputs holds, where there are several."""

    CUMULATIVE = 0
    """All there is so far."""

    DELTA = 1
    """What has come since the last one."""

    FINAL_ONLY = 2
    """There is only one, when the request is done."""


@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """When a completion has fallen into a loop, and ends with finish_reason "repetition".

    Raises:
        RequestError: A size or the count is outside its range.
    """

    max_pattern_size: int = 0
    """Most tokens of what is repeated; 0 looks for nothing."""

    min_pattern_size: int = 0
    """Fewest; 0 is 1."""

    min_count: int = 0
    """How often in a row it must come; 2 or more."""

    def __post_init__(self) -> None:
        """Checks the sizes, alone and together."""
        for field in dataclasses.fields(self):
            # A frozen dataclass brings its values to one form this way only.
            object.__setattr__(
                self, field.name, _whole(field.name, getattr(self, field.name), at_least=0)
            )
        if self.min_pattern_size > self.max_pattern_size:
            raise RequestError(
                f"min_pattern_size must be less than or equal to "
                f"max_pattern_size={self.max_pattern_size}, got {self.min_pattern_size}."
            )
        if self.max_pattern_size and self.min_count < 2:
            raise RequestError(
                f"min_count must be at least 2, got {self.min_count}: one is no repetition."
            )


@dataclass(slots=True, repr=False)
class SamplingParams(metaclass=ExplainsKeywords):
    """How tokens of one request are chosen, and when it ends.

    Args:
        n: Completions of each prompt.
        presence_penalty: Taken from the logit of each token generated before.
        frequency_penalty: Taken as often as the token was generated.
        repetition_penalty: Divides positive and multiplies negative logits of tokens
            of the prompt and the output; 1 is none.
        temperature: Divides the logits; 0 is greedy. From 0 to 2.
        top_p: Choose among the likeliest tokens with this probability together.
        top_k: Choose among this many likeliest tokens; 0 or -1 among all.
        min_p: Choose among tokens with this share of the likeliest one's probability.
        seed: Makes the request's samples repeatable; None draws one, -1 is None.
            With n completions they use `seed`, `seed + 1` and so on.
        stop: Text, or texts, that end the completion; left out of it.
        stop_token_ids: Tokens that end the request.
        ignore_eos: Whether to go on after the end-of-sequence token.
        max_tokens: Most tokens to generate; None: up to `max_model_len`.
        min_tokens: Tokens to generate before anything but `max_tokens` may end it.
        logprobs: Return the log-probability of each token and of this many
            alternatives; None returns none, -1 those of the whole vocabulary.
        prompt_logprobs: The same for the tokens of the prompt.
        logprob_token_ids: Return the log-probabilities of these tokens in place of the
            likeliest ones.
        flat_logprobs: Return log-probabilities as `FlatLogprobs`, with fewer objects.
        detokenize: Whether to make text of the tokens.
        skip_special_tokens: Whether text leaves out special tokens.
        spaces_between_special_tokens: Whether there are spaces between them if not.
        include_stop_str_in_output: Whether text keeps what of `stop` ended it.
        output_kind: Whether outputs of a stream hold all or what is new.
        logit_bias: Added to the logits of these tokens; from -100 to 100.
        allowed_token_ids: The only tokens that may be generated.
        bad_words: Texts that may not be generated.
        thinking_token_budget: Most tokens between `<think>` and `</think>`; None or
            -1: no bound.
        repetition_detection: When to end a completion that repeats itself.
        skip_reading_prefix_cache: Whether to compute the prompt anew, even if it is
            cached; with `prompt_logprobs` that is so unless False is given.
        extra_args: Kept for the caller; nothing reads it.

    Raises:
        RequestError: A value is outside its range, or two do not go together.
        TypeError: An unknown name, with the nearest known one; or a removed one, with
            what to use instead.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None

    _removed_keywords: ClassVar[Mapping[str, str]] = REMOVED

    def __post_init__(self) -> None:
        """Brings every value to one form, and checks what needs no model to check."""
        for name, (low, high, both) in RANGES.items():
            setattr(self, name, _number(name, getattr(self, name), low, high, both))
        for name in CLAIMS:
            setattr(self, name, _claim(name, getattr(self, name)))
        self._read_counts()
        self._read_texts()
        self._read_token_fields()
        self._read_others()
        self._raise_tiny_temperature()
        self._check_together()
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0

    # ---------------------------------------------------------------- one value each

    def _read_counts(self) -> None:
        self.n = _whole("n", self.n, at_least=1)
        _check_number_of("n", self.n, "MAX_N_SEQUENCES")
        self.top_k = _whole("top_k", self.top_k)
        if self.top_k < -1:
            raise RequestError(f"top_k must be 0 (disable), or at least 1, got {self.top_k}.")
        self.top_k = max(self.top_k, 0)
        self.seed = _whole_or_none("seed", self.seed)
        if self.seed == -1:
            self.seed = None
        if not isinstance(self.max_tokens, DefaultInt):
            self.max_tokens = _whole_or_none("max_tokens", self.max_tokens, at_least=1)
        self.min_tokens = _whole("min_tokens", self.min_tokens, at_least=0)
        self.logprobs = _num_logprobs("logprobs", self.logprobs)
        self.prompt_logprobs = _num_logprobs("prompt_logprobs", self.prompt_logprobs)
        budget = _whole_or_none("thinking_token_budget", self.thinking_token_budget)
        if budget is not None and budget < -1:
            raise RequestError(
                f"thinking_token_budget must be non-negative, or -1 for no bound, got {budget}."
            )
        self.thinking_token_budget = None if budget == -1 else budget

    def _read_texts(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self.stop = _texts("stop", stop)
        _check_number_of("stop strings", len(self.stop), "MAX_STOP_STRINGS")
        self.bad_words = tuple(dict.fromkeys(_texts("bad_words", self.bad_words)))
        _check_number_of("bad_words", len(self.bad_words), "MAX_NUM_BAD_WORDS")

    def _read_token_fields(self) -> None:
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        self.logit_bias = _biases(self.logit_bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError(
                    "allowed_token_ids is not None and empty! Name the tokens that may be "
                    "generated, or leave it out to allow all."
                )
        self.logprob_token_ids = _token_ids("logprob_token_ids", self.logprob_token_ids) or None
        count = len(self.logprob_token_ids or ())
        if count > MAX_LOGPROB_TOKEN_IDS:
            raise RequestError(
                f"logprob_token_ids must be at most {MAX_LOGPROB_TOKEN_IDS} tokens, got {count}."
            )

    def _read_others(self) -> None:
        self.output_kind = _output_kind(self.output_kind)
        self.repetition_detection = _repetition_detection(self.repetition_detection)
        if self.skip_reading_prefix_cache is not None:
            self.skip_reading_prefix_cache = _claim(
                "skip_reading_prefix_cache", self.skip_reading_prefix_cache
            )
        elif self.prompt_logprobs is not None:
            # What comes from the cache is not computed, and so has no logits to return.
            self.skip_reading_prefix_cache = True
        if self.extra_args is not None:
            if not isinstance(self.extra_args, Mapping):
                raise RequestError(f"extra_args must be a dict or None, got {self.extra_args!r}.")
            self.extra_args = dict(self.extra_args)

    def _raise_tiny_temperature(self) -> None:
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature=%g is raised to %g; use 0 for greedy",
                self.temperature,
                MIN_TEMPERATURE,
            )
            self.temperature = MIN_TEMPERATURE

    # ---------------------------------------------------------------- values together

    def _check_together(self) -> None:
        """Raises RequestError where two values, each right alone, do not go together."""
        if self.is_greedy and self.n > 1:
            raise RequestError(
                f"n must be 1 when using greedy sampling, got {self.n}: all would be the same. "
                "Raise temperature above 0."
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            is_default = isinstance(self.max_tokens, DefaultInt)
            instead = "That is the default: pass max_tokens too." if is_default else "Raise it."
            raise RequestError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, "
                f"got {self.min_tokens}. {instead}"
            )
        if self.stop and not self.detokenize:
            raise RequestError(
                f"stop strings are only supported when detokenize is True, got stop={self.stop}. "
                "Set detokenize=True, or use stop_token_ids."
            )
        ids = self.logprob_token_ids
        if ids and self.logprobs is not None and self.logprobs != len(ids):
            raise RequestError(
                f"logprobs must equal the number of different logprob_token_ids, which is "
                f"{len(ids)}, got {self.logprobs}. Leave logprobs out."
            )

    def check(self, vocab_size: int, max_logprobs: int) -> None:
        """Checks what needs a model.

        Args:
            vocab_size: Tokens that the model has.
            max_logprobs: Most alternatives a request may ask for; -1: any number.

        Raises:
            RequestError: A token is not in the vocabulary, or too many
                log-probabilities are asked for.
        """
        for name in TOKEN_FIELDS:
            strange = [t for t in getattr(self, name) or () if not 0 <= t < vocab_size]
            if strange:
                more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
                raise RequestError(
                    f"{name} contain out-of-vocab token ids {strange[:8]}{more}. "
                    f"Vocabulary size: {vocab_size}."
                )
        for kind, asked in (("sample", self.logprobs), ("prompt", self.prompt_logprobs)):
            count = vocab_size if asked == -1 else asked
            if count is not None and max_logprobs != -1 and count > max_logprobs:
                raise RequestError(
                    f"Requested {kind} logprobs of {count}, which is greater than max "
                    f"allowed: {max_logprobs}. Pass max_logprobs={asked} to LLM."
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, always."""
        return self.temperature == 0

    # ---------------------------------------------------------------- making and showing

    @classmethod
    def _translate_keywords(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Drops what changes no result."""
        return {
            name: value
            for name, value in kwargs.items()
            if name not in UNUSED and not (name in REMOVED and value is None)
        }

    @classmethod
    def from_optional(cls, **values: Any) -> "SamplingParams":
        """Returns parameters in which None stands for the default.

        Only `max_tokens=None` keeps its meaning: up to `max_model_len`.
        """
        given = {n: v for n, v in values.items() if v is not None or n == "max_tokens"}
        return cls(**given)

    def clone(self) -> "SamplingParams":
        """Returns a copy, checked again."""
        return dataclasses.replace(self)

    def __repr__(self) -> str:
        """The call that makes it, without what is as by default."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"SamplingParams({', '.join(shown)})"


# -------------------------------------------------------------------- readers of one value


def limit(name: str) -> int | None:
    """Returns a bound of `LIMITS`: `JAXLLM_<name>`, or else `VLLM_<name>`, or else its default.

    Raises:
        ConfigError: The variable is set and no integer of at least 1.
    """
    for variable in (f"JAXLLM_{name}", f"VLLM_{name}"):
        value = os.environ.get(variable)
        if value:
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"{variable}={value!r} must be an integer of at least 1.")
            return int(value)
    return LIMITS[name]


def as_integer(value: Any) -> int | None:
    """Returns an integer of any library as an `int`; None for all else, claims and floats too."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # arrays have __index__ too: only calling it tells
    except TypeError:
        return None


def _check_number_of(what: str, count: int, name: str) -> None:
    most = limit(name)
    if most is not None and count > most:
        raise RequestError(f"{what} must be at most {most}, got {count}. JAXLLM_{name} raises it.")


def _number(name: str, value: Any, low: float, high: float, both: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} must be a number in {both}, got {value!r}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(f"{name} must be a number in {both}, got {value!r}.")
    if not low <= number <= high:
        raise RequestError(f"{name} must be in {both}, got {value}.")
    return number


def _claim(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)) or as_integer(value) in (0, 1):
        return bool(value)
    raise RequestError(f"{name} must be True or False, got {value!r}.")


def _whole(name: str, value: Any, *, at_least: int | None = None) -> int:
    whole = as_integer(value)
    if whole is None:
        raise RequestError(f"{name} must be an integer, got {value!r}.")
    if at_least is not None and whole < at_least:
        raise RequestError(f"{name} must be at least {at_least}, got {whole}.")
    return whole


def _whole_or_none(name: str, value: Any, *, at_least: int | None = None) -> int | None:
    return None if value is None else _whole(name, value, at_least=at_least)


def _num_logprobs(name: str, value: Any) -> int | None:
    if isinstance(value, (bool, np.bool_)):
        return 1 if value else None
    count = _whole_or_none(name, value)
    if count is not None and count < -1:
        raise RequestError(
            f"{name} must be non-negative or -1, got {count}. -1 is the whole vocabulary."
        )
    return count


def _items(name: str, value: Any, what: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of {what}, got {value!r}.")
    try:
        return list(value)
    except TypeError:  # an array without dimensions is iterable only by name
        raise RequestError(f"{name} must be a list of {what}, got {value!r}.") from None


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = tuple(_items(name, value, "strings"))
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"{name} must be a list of strings, got {text!r} in it.")
        if not text:
            raise RequestError(f"{name} cannot contain an empty string. Leave it out.")
    return texts


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = _items(name, value, "token ids")
    return tuple(dict.fromkeys(_whole(f"each of {name}", v, at_least=0) for v in ids))


def _biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias must be a dict of token ids and numbers, such as {{42: -100}}, "
            f"got {value!r}."
        )
    biases = {}
    for key, bias in value.items():
        is_number = isinstance(key, str) and key.isdecimal() and len(key) < 20
        token = int(key) if is_number else key  # JSON has only strings for keys
        token = _whole("each token of logit_bias", token, at_least=0)
        name = f"logit_bias of token {token}"
        number = _number(name, bias, -math.inf, math.inf, f"[-{MAX_BIAS:g}, {MAX_BIAS:g}]")
        biases[token] = min(max(number, -MAX_BIAS), MAX_BIAS)
    if len(biases) > MAX_BIASED_TOKENS:
        raise RequestError(
            f"logit_bias must be of at most {MAX_BIASED_TOKENS} tokens, got {len(biases)}. "
            "Use allowed_token_ids to ban many."
        )
    return biases


def _output_kind(value: Any) -> RequestOutputKind:
    if isinstance(value, RequestOutputKind):
        return value
    number = as_integer(value)
    if number in {kind.value for kind in RequestOutputKind}:
        return RequestOutputKind(number)
    names = ", ".join(f"RequestOutputKind.{kind.name}" for kind in RequestOutputKind)
    raise RequestError(f"output_kind must be one of {names}, got {value!r}.")


def _repetition_detection(value: Any) -> RepetitionDetectionParams | None:
    if value is None or isinstance(value, RepetitionDetectionParams):
        return value
    known = [field.name for field in dataclasses.fields(RepetitionDetectionParams)]
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise RequestError(
            f"repetition_detection must be a RepetitionDetectionParams, or a dict with keys of "
            f"{known}, got {value!r}."
        )
    return RepetitionDetectionParams(**value)
