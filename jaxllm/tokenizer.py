"""Text to tokens and back.

transformers' tokenizers do the work; this adds what a stream of tokens needs:
text that never ends in half a character.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jaxllm.errors import CheckpointError

CONTEXT = 6
"""Prompt tokens decoded along with the output, so that a leading space survives."""

INCOMPLETE = "\ufffd"
"""What tokenizers put where the bytes so far are no whole character."""


def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a checkpoint folder; runs none of its code.

    Raises:
        CheckpointError: There is none, or transformers cannot read it.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{str(folder)!r} has no tokenizer that transformers can read ({error}). Pass "
            "tokenizer= with a folder or hub id that has one, or skip_tokenizer_init=True to "
            "work with token ids."
        ) from error


class Detokenizer:
    """The text of one sequence as its tokens come.

    Text is what the tokens add to a few tokens before them, because many
    tokenizers drop the space of a first token. Bytes that are not yet a whole
    character are held back; if the sequence ends with them they are dropped.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        self.text = ""
        """All text so far."""

        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens = list(prompt[-CONTEXT:])
        self._start = 0
        self._emitted = len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> str:
        """Adds tokens, and returns the text they complete."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._start : self._emitted])
        after = self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or after.endswith(INCOMPLETE):
            return ""
        new = after[len(before) :]
        # The next piece is decoded behind this one, as this one was behind the prompt.
        self._start = max(self._start, self._emitted - CONTEXT)
        self._emitted = len(self._tokens)
        self.text += new
        return new

    def finish(self) -> str:
        """Returns the text of whole characters that was held back behind a broken one."""
        before = self._decode(self._tokens[self._start : self._emitted])
        after = self._decode(self._tokens[self._start :])
        new = after[len(before) :].rstrip(INCOMPLETE)
        self._emitted = len(self._tokens)
        self.text += new
        return new

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
