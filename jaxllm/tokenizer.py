"""Text to tokens, and single tokens to text; `text_stream` has the text of sequences.

transformers' tokenizers do the work. This holds what vLLM's options ask of them:
truncation, words to avoid, texts that are too long to look at.
"""

import functools
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jaxllm.errors import CheckpointError, ConfigError, RequestError
from jaxllm.sampling_params import as_integer, limit
from jaxllm.text_stream import INCOMPLETE, Detokenizer, decode, ids_of

__all__ = [
    "Detokenizer",
    "bad_word_ids",
    "certainly_too_long",
    "decoded_token",
    "encode",
    "load_tokenizer",
    "truncate_tokens",
]

logger = logging.getLogger("jaxllm")

MODES: dict[str, dict[str, Any]] = {"auto": {}, "hf": {}, "slow": {"use_fast": False}}
"""What `tokenizer_mode` tells transformers; its releases from 5.0 on choose for themselves."""

MAX_PRECEDING = 4
"""Most tokens before one that may hold the first bytes of its character."""


def load_tokenizer(folder: Path, mode: str = "auto") -> Any:
    """Returns the tokenizer of a checkpoint folder; runs none of its code.

    Args:
        folder: Holds the tokenizer's files.
        mode: "auto" or "hf": as transformers chooses; "slow": its Python one, if it still
            has one.

    Raises:
        CheckpointError: There is none, or transformers cannot read it.
        ConfigError: An unknown mode.
    """
    if mode not in MODES:
        raise ConfigError(f"tokenizer_mode={mode!r} is not implemented. Pass one of {list(MODES)}.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **MODES[mode])
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{str(folder)!r} has no tokenizer that transformers can read ({error}). Pass "
            "tokenizer= with a folder or hub id that has one, or skip_tokenizer_init=True to "
            "work with token ids."
        ) from error


# -------------------------------------------------------------------- text to tokens


def encode(
    tokenizer: Any,
    text: str,
    kwargs: Mapping[str, Any] | None,
    max_model_len: int,
    room: int = 0,
) -> list[int]:
    """Returns the token ids of a prompt's text, special tokens as the tokenizer adds them.

    Args:
        tokenizer: Any tokenizer of transformers.
        text: The prompt.
        kwargs: vLLM's `tokenization_kwargs`; those that jaxllm does not know are left out,
            with a warning.
        max_model_len: Most tokens of a sequence.
        room: Tokens to leave for the output where a prompt is cut to the model's length.

    Raises:
        RequestError: A value in `kwargs` is wrong, or the text cannot fit whatever its tokens.
    """
    options = _options(kwargs, max_model_len, room)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The prompt's text has half a surrogate pair at character {error.start} "
            f"({text[error.start]!r}), which is no character. Leave it out."
        ) from error
    if options.limit is None and certainly_too_long(tokenizer, text, max_model_len):
        least = -(-len(text) // _lengths(tokenizer).longest)
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains at least {least} input tokens ({len(text)} characters). Shorten the prompt, "
            "or pass tokenization_kwargs={'truncate_prompt_tokens': -1}."
        )
    if options.lower_case:
        text = text.lower()
    specials = {} if options.specials is None else {"add_special_tokens": options.specials}
    return options.cut(list(tokenizer.encode(text, verbose=False, **specials)))


def truncate_tokens(
    token_ids: Sequence[int],
    kwargs: Mapping[str, Any] | None,
    max_model_len: int,
    room: int = 0,
) -> list[int]:
    """Returns a prompt that came as token ids, cut as `kwargs` asks; see `encode`.

    Raises:
        RequestError: A value in `kwargs` is wrong, or there are more than its `max_length`.
    """
    return _options(kwargs, max_model_len, room).cut(list(token_ids))


@dataclass(frozen=True, slots=True)
class _Options:
    """`tokenization_kwargs`, checked."""

    specials: bool | None = None
    lower_case: bool = False
    limit: int | None = None
    """Most tokens to keep; None: all."""
    most: int | None = None
    """Most tokens there may be; None: any number."""
    keeps_end: bool = True

    def cut(self, token_ids: list[int]) -> list[int]:
        """Returns what is to be kept of a prompt."""
        if self.limit is not None and len(token_ids) > self.limit:
            return token_ids[-self.limit :] if self.keeps_end else token_ids[: self.limit]
        if self.most is not None and len(token_ids) > self.most:
            raise RequestError(
                f"The prompt contains {len(token_ids)} input tokens, more than max_length="
                f"{self.most}. Pass truncation=True too, or a shorter prompt."
            )
        return token_ids


CHOICES: dict[str, tuple[Any, ...]] = {
    "truncation": (None, False, True, "longest_first", "do_not_truncate"),
    "truncation_side": (None, "left", "right"),
    "add_special_tokens": (None, False, True),
    "do_lower_case": (None, False, True),
    "needs_detokenization": (None, False, True),
}
"""The keys of `tokenization_kwargs` that name one of a few things."""

LENGTHS = ("max_length", "truncate_prompt_tokens")
"""The keys that count tokens."""


def _options(kwargs: Mapping[str, Any] | None, max_model_len: int, room: int) -> _Options:
    if not kwargs:
        return _Options()
    if not isinstance(kwargs, Mapping):
        raise RequestError(f"tokenization_kwargs must be a dict, got {kwargs!r}.")
    unknown = sorted(str(k) for k in kwargs if k not in CHOICES and k not in LENGTHS)
    if unknown:
        _warn_of_unknown(tuple(unknown))
    for key, choices in CHOICES.items():
        value = kwargs.get(key)
        if not isinstance(value, bool | str | None) or value not in choices:
            raise RequestError(
                f"{key}={value!r} in tokenization_kwargs must be one of {list(choices)}."
            )
    max_length = _length("max_length", kwargs, 1, max_model_len)
    limit = _length("truncate_prompt_tokens", kwargs, -1, max_model_len)
    truncation = kwargs.get("truncation")
    models = max_model_len - room
    if limit == -1:
        limit = models
    if truncation == "do_not_truncate":
        limit = None
    elif truncation:
        limit = min(limit or models, max_length or models)
    return _Options(
        specials=kwargs.get("add_special_tokens"),
        lower_case=bool(kwargs.get("do_lower_case")),
        limit=limit,
        most=max_length,
        keeps_end=kwargs.get("truncation_side") != "right",
    )


def _length(name: str, kwargs: Mapping[str, Any], least: int, most: int) -> int | None:
    value = kwargs.get(name)
    if value is None:
        return None
    length = as_integer(value)
    if length is None or length < least or length == 0:
        also = ", or -1 for the model's maximum" if least == -1 else ""
        raise RequestError(
            f"{name}={value!r} in tokenization_kwargs must be an integer of at least 1{also}."
        )
    if length > most:
        raise RequestError(
            f"{name} value ({length}) is greater than max_model_len ({most}). Please request a "
            "smaller truncation size."
        )
    return length


@functools.cache
def _warn_of_unknown(keys: tuple[str, ...]) -> None:
    """Warns once: one call may tokenize thousands of prompts."""
    logger.warning("tokenization_kwargs %s are not supported and will be ignored", list(keys))


# -------------------------------------------------------------------- too long to look at


@dataclass(frozen=True, slots=True)
class _Lengths:
    """How many characters a tokenizer's tokens stand for."""

    longest: int
    is_bounded: bool
    """Whether no token stands for more characters than it has."""


_lengths_of: "weakref.WeakKeyDictionary[Any, _Lengths]" = weakref.WeakKeyDictionary()

PROBES = ("\ue000", " ", "\n", "\u0301", "q")
"""Characters that some tokenizers fold: unknown ones, spaces, combining ones, long words."""


def certainly_too_long(tokenizer: Any, text: str, max_model_len: int) -> bool:
    """Whether a text has too many characters for `max_model_len` tokens, whatever they are.

    Never true for a tokenizer that makes one token of any number of characters, as those
    do that know whole words only.
    """
    if len(text) <= max_model_len:
        return False
    lengths = _lengths(tokenizer)
    return lengths.is_bounded and len(text) > max_model_len * lengths.longest


def _lengths(tokenizer: Any) -> _Lengths:
    found = _lengths_of.get(tokenizer)
    if found is None:
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        size = 8 * longest
        counts = [
            len(tokenizer.encode(probe * size, add_special_tokens=False, verbose=False))
            for probe in PROBES
        ]
        found = _Lengths(longest, min(counts) * longest >= size)
        _lengths_of[tokenizer] = found
    return found


# -------------------------------------------------------------------- words to avoid


def bad_word_ids(
    tokenizer: Any, words: Sequence[str], vocab_size: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Returns the token sequences that `bad_words` forbid.

    A word stands at the start of a text or behind a space; it is a sequence for each,
    unless both are the same or of different length.

    Args:
        tokenizer: Any tokenizer of transformers.
        words: What is not to be generated.
        vocab_size: Ids that the model has; None: not checked.

    Raises:
        RequestError: A word gives no tokens or one that the model does not have, or there
            are too many.
    """
    found: list[tuple[int, ...]] = []
    for word in dict.fromkeys(words):
        plain, spaced = (
            tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False, verbose=False))
            for space in ("", " ")
        )
        if not plain:
            raise RequestError(f"bad_words contain {word!r}, which gives no tokens. Leave it out.")
        found.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    found = list(dict.fromkeys(found))
    strange = sorted({t for ids in found for t in ids if vocab_size and t >= vocab_size})
    if strange:
        raise RequestError(
            f"bad_words contain out-of-vocab token ids {strange}. Vocabulary size: {vocab_size}. "
            "The tokenizer has more tokens than the model: leave those words out."
        )
    num_tokens = sum(map(len, found))
    most, most_tokens = limit("MAX_NUM_BAD_WORDS"), limit("MAX_BAD_WORDS_TOTAL_TOKENS")
    if (most and len(found) > most) or (most_tokens and num_tokens > most_tokens):
        raise RequestError(
            f"bad_words are {len(found)} sequences of {num_tokens} tokens in all; at most "
            f"{most} sequences and {most_tokens} tokens are possible. "
            "Pass fewer words."
        )
    return tuple(found)


# -------------------------------------------------------------------- single tokens to text


def decoded_token(tokenizer: Any, previous: Sequence[int], token_id: int) -> str:
    """Returns the text of one token, with special tokens shown.

    A token that ends a character has that character, if the last few of `previous` have
    its first bytes; a token of other bytes that are no character has "".
    """
    known = ids_of(tokenizer).known
    if token_id not in known:
        return ""
    text = decode(tokenizer, [token_id], False)
    if INCOMPLETE not in text:
        return text
    last = [token for token in previous[-MAX_PRECEDING:] if token in known]
    for num_before in range(1, len(last) + 1):
        before = decode(tokenizer, last[-num_before:], False).rstrip(INCOMPLETE)
        both = decode(tokenizer, [*last[-num_before:], token_id], False)
        if both.startswith(before) and INCOMPLETE not in both[len(before) :]:
            return both[len(before) :]
    return ""
