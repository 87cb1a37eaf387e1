"""The text of one sequence: whole characters as its tokens come, cut at a stop string.

It knows tokenizers by their `decode` and their vocabulary, and neither requests
nor steps. Text is only ever added at its end, except that a
stop string cuts it, once.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.sampling_params import SamplingParams

CONTEXT = 6
"""Prompt tokens decoded along with the output, so that a leading space survives."""

UNFINISHED = 3
"""Most tokens that one unfinished character can have: UTF-8 writes at most 4 bytes."""

INCOMPLETE = "\ufffd"
"""What tokenizers put where the bytes so far are no whole character."""


class Detokenizer:
    """The text of one sequence as its tokens come, before stop strings.

    Text is what the tokens add to a few tokens before them, because many
    tokenizers drop the space of a first token. What could still be the beginning
    of a character is held back; if the sequence ends with it, it is dropped. The
    work for a token does not grow with the sequence: one or two short decodes,
    and two more where bytes are no text at all.

    Args:
        tokenizer: Any tokenizer of transformers.
        prompt: Token ids in front of the sequence.
        skip_special_tokens: Whether special tokens have no text.
        spaces_between_special_tokens: Whether special tokens that are shown keep the
            space that a tokenizer puts between them.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = ids_of(tokenizer).special
        self._skip = skip_special_tokens
        # Decoding leaves out the others too; but they must not take the context's places, or
        # the first token with text behind them would lose its space.
        self._shown = ids_of(tokenizer).ordinary if self._skip else ids_of(tokenizer).known
        self._tight = not (skip_special_tokens or spaces_between_special_tokens)
        self._behind_special = False
        self._pieces: list[str] = []
        self._context = self._end_of(prompt)
        self._before = self._decode(self._context)  # text of the context alone
        self._pending: list[int] = []  # tokens behind the context, not all of their text is out
        self._num_out = 0  # characters of the pending tokens' text that are out

    @property
    def text(self) -> str:
        """All text so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def extend(self, tokens: Sequence[int]) -> str:
        """Adds tokens, and returns the text they complete."""
        new = "".join([self._add(token) for token in tokens])
        self._pieces.append(new)
        return new

    def whole(self, tokens: Sequence[int]) -> str | None:
        """Returns the text of a whole sequence in one decode; None if it takes `extend`."""
        shown = [token for token in tokens if token in self._shown]
        text = self._decode(self._context + shown)
        plain = text.startswith(self._before) and not self._tight
        # Where bytes are broken, each tokenizer shows it its own way: only `extend` agrees
        # with itself.
        return text[len(self._before) :] if plain and INCOMPLETE not in text else None

    def _add(self, token: int) -> str:
        if token not in self._shown:
            return ""
        special = token in self._special
        tight, self._behind_special = self._tight and special and self._behind_special, special
        self._pending.append(token)
        text = self._text(self._pending)
        sure = max(len(text.rstrip(INCOMPLETE)), self._num_out)
        new, is_clean = text[self._num_out : sure], sure == len(text)
        if is_clean:
            self._settle(text)
        else:
            self._num_out = sure
            if len(self._pending) > UNFINISHED:
                new += self._drop_oldest(text)
        return new.lstrip() if tight else new

    def _settle(self, text: str) -> None:
        """Makes the pending tokens the next ones' context, when their text is all out."""
        if text:
            self._context, self._before = self._pending, self._decode(self._pending)
            self._pending, self._num_out = [], 0
        elif len(self._pending) > UNFINISHED:
            # Fewer may yet get a text: a first space that comes back with the next token, or
            # bytes that this tokenizer does not show until they are a character. The oldest stays
            # between those before it and those behind it: they are not one character.
            oldest, self._pending = self._pending[:1], self._pending[1:]
            self._context = [*self._context, *oldest][-(CONTEXT + UNFINISHED) :]
            self._before = self._decode(self._context)

    def _drop_oldest(self, text: str) -> str:
        """Forgets the oldest pending token, which the unfinished character has no part of."""
        oldest, self._pending = self._pending[:1], self._pending[1:]
        rest = self._text(self._pending)
        if not rest.endswith(INCOMPLETE):
            # Byte tokens behind a broken one: a run of them is all text or none of it.
            new = self._text(oldest)[self._num_out :] + rest
            self._settle(rest)
            return new
        num_dropped = len(text) - len(rest)
        new = text[self._num_out : max(num_dropped, 0)]
        self._num_out = max(self._num_out - num_dropped, 0)
        return new

    def _text(self, tokens: list[int]) -> str:
        text = self._decode(self._context + tokens)
        if text.startswith(self._before):
            return text[len(self._before) :]
        return self._decode(tokens)  # a broken byte would spoil the context's bytes

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """Returns the last few tokens of a prompt, from the beginning of a character on."""
        shown = (token for token in reversed(prompt) if token in self._shown)
        last = list(itertools.islice(shown, CONTEXT + UNFINISHED))[::-1]
        cuts = [last[-n:] for n in range(CONTEXT, CONTEXT + UNFINISHED + 1)]
        return next((cut for cut in cuts if INCOMPLETE not in self._decode(cut)), cuts[0])

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode(self._tokenizer, tokens, self._skip)


class TextStream:
    """Text of one sequence as its tokens come, with its stop strings.

    Args:
        tokenizer: Any tokenizer of transformers; None: the text stays empty.
        prompt_token_ids: Token ids in front of the sequence.
        params: Reads `stop`, `include_stop_str_in_output`, `min_tokens`, `detokenize`,
            `skip_special_tokens` and `spaces_between_special_tokens`.
    """

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._detokenizer = _detokenizer(tokenizer, prompt_token_ids, params)
        self._stop = tuple(params.stop or ())
        self._longest = max(map(len, self._stop), default=0)
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []
        self._num_chars = 0
        self._tail = ""  # end of the searched text: where a match may have begun
        self._is_done = False

    @property
    def text(self) -> str:
        """All text so far; after a stop string, cut at it."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    @property
    def visible(self) -> str:
        """The part of `text` that no later token can take back."""
        text = self.text
        return text[: len(text) - self._num_held()]

    def append(self, token_id: int, *, is_stop_token: bool = False) -> str | None:
        """Adds a token, and returns the stop string that it completed, if any.

        Only text that came after the `min_tokens`-th token is searched. The match
        that ends first wins, and the earlier in the list of those that end together.

        Args:
            token_id: The token.
            is_stop_token: Whether it ends the sequence itself: then its text is left out,
                unless `include_stop_str_in_output`.
        """
        if self._is_done:
            raise RuntimeError("A token came after the end of its text.")  # a bug of ours
        self._num_tokens += 1
        if self._detokenizer is None or (is_stop_token and not self._includes_stop):
            return None
        return self._take(self._detokenizer.extend([token_id]))

    def finish(self) -> None:
        """Ends the text where no stop string did: all of it may be shown.

        Whole characters came out with their last token, so that part of one is all that
        can be left, and it is dropped.
        """
        self._is_done = True

    def _take(self, new: str) -> str | None:
        self._pieces.append(new)
        self._num_chars += len(new)
        if not self._stop or self._num_tokens <= self._min_tokens:
            return None
        searched = self._tail + new
        found = first_match(searched, self._stop)
        if found is None:
            self._tail = searched[max(len(searched) - self._longest + 1, 0) :]
            return None
        start, end, stop = found
        cut = end if self._includes_stop else start
        self._pieces = [self.text[: self._num_chars - len(searched) + cut]]
        self._is_done = True
        return stop

    def _num_held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self._is_done or self._includes_stop:
            return 0
        lengths = range(len(self._tail), 0, -1)
        return next(
            (n for n in lengths if any(s.startswith(self._tail[-n:]) for s in self._stop)), 0
        )


def text_of(
    tokenizer: Any,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    params: SamplingParams,
    ends_with_stop_token: bool,
) -> str:
    """Returns the text of a whole sequence that no stop string ended, in one decode if it can.

    It is the text that a `TextStream` gives token by token.
    """
    detokenizer = _detokenizer(tokenizer, prompt_token_ids, params)
    if detokenizer is None:
        return ""
    if ends_with_stop_token and not params.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    text = detokenizer.whole(token_ids)
    return detokenizer.extend(token_ids) if text is None else text


def first_match(text: str, stop: Sequence[str]) -> tuple[int, int, str] | None:
    """Returns where the stop string that is complete first begins and ends, and which it is."""
    starts = [(text.find(s), i, s) for i, s in enumerate(stop)]
    found = [(start + len(s), i, start, s) for start, i, s in starts if start >= 0]
    if not found:
        return None
    end, _, start, s = min(found)
    return start, end, s


def decode(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool) -> str:
    """Returns the text of tokens as they are, no space before a full stop taken away.

    Such a clean-up looks at what comes next, so that text would change as tokens come.
    """
    return tokenizer.decode(
        tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True, slots=True)
class _Ids:
    """Token ids of one tokenizer, collected once."""

    known: frozenset[int]
    special: frozenset[int]
    ordinary: frozenset[int]
    """The known ones that are not special."""


_ids: "weakref.WeakKeyDictionary[Any, _Ids]" = weakref.WeakKeyDictionary()


def ids_of(tokenizer: Any) -> _Ids:
    """Returns all ids that have a token (models often have more), by kind."""
    found = _ids.get(tokenizer)
    if found is None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        flagged = {i for i, token in added.items() if token.special}
        special = frozenset(flagged.union(tokenizer.all_special_ids))
        known = frozenset(tokenizer.get_vocab().values()).union(added)
        found = _ids[tokenizer] = _Ids(known, special, known - special)
    return found


def _detokenizer(
    tokenizer: Any, prompt: Sequence[int], params: SamplingParams
) -> Detokenizer | None:
    if tokenizer is None or not params.detokenize:
        return None
    return Detokenizer(
        tokenizer,
        prompt,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
    )
