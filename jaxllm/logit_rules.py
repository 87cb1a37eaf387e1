"""What a request does to its logits before they are sampled, as far as the host knows it.

Three forms reach the device. *Edits* add a number to a token's logit: `logit_bias`,
the ban of stop tokens below `min_tokens`, bad words; a ban adds minus infinity,
which nothing after it can undo. A *mask* says token by token what is allowed at
all: `allowed_token_ids`, and the token that an exhausted thinking budget forces.
Penalties are neither: they follow counts that the device keeps. NumPy only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxllm.sampling_params import SamplingParams

BAN = -np.inf
ALWAYS = np.iinfo(np.int32).max
"""As `until`: the edit never ends."""


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Ends a model's thinking after a number of tokens, by forcing the token that ends it."""

    start: int
    """Token that begins thinking; the last one counts, in the prompt too."""

    end: int
    """Token that ends it."""

    budget: int
    """Most tokens between the two."""

    def forced(self, tokens: Sequence[int]) -> int | None:
        """Returns the token that must come next, if one must."""
        for passed, token in enumerate(reversed(tokens)):
            if token == self.end:
                return None
            if token == self.start:
                return self.end if passed >= self.budget else None
        return None


@dataclass(frozen=True, slots=True)
class LogitRules:
    """The rules of one request; the same for each of its sequences."""

    ids: np.ndarray
    """int32 [K], tokens with an edit; a token may come twice."""

    values: np.ndarray
    """float32 [K], what is added to their logits."""

    until: np.ndarray
    """int32 [K], length of the sequence, prompt included, from which the edit has ended."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    """Words of several tokens: the last is banned where the others have just been generated."""

    allowed: np.ndarray | None = None
    """uint32 [V/32], bit i of word w for token 32 w + i; None allows all."""

    thinking: ThinkingBudget | None = None
    vocab_size: int = 0

    @property
    def num_edits(self) -> int:
        """Most edits at once."""
        return len(self.ids) + len(self.bad_words)

    @property
    def mask_words(self) -> int:
        """uint32 words of a mask; 0 for a request that has none."""
        has_mask = self.allowed is not None or self.thinking is not None
        return -(-self.vocab_size // 32) if has_mask else 0

    @property
    def needs_host(self) -> bool:
        """Whether they change with the tokens generated, so that the host must see each."""
        return bool(self.bad_words or self.thinking)

    def now(self, prompt: Sequence[int], output: Sequence[int]) -> "Ruling":
        """Returns what holds for the token after these.

        A forced token is forced against every other rule.
        """
        forced = self.thinking.forced([*prompt, *output]) if self.thinking else None
        if forced is not None:
            return Ruling(NO_IDS, NO_VALUES, NO_IDS, bitmask([forced], self.vocab_size))
        banned = [word[-1] for word in self.bad_words if _ends_with(output, word[:-1])]
        if not banned:
            return Ruling(self.ids, self.values, self.until, self.allowed)
        return Ruling(
            np.concatenate([self.ids, np.asarray(banned, np.int32)]),
            np.concatenate([self.values, np.full(len(banned), BAN, np.float32)]),
            np.concatenate([self.until, np.full(len(banned), ALWAYS, np.int32)]),
            self.allowed,
        )


class Ruling(NamedTuple):
    """What rules come to at one token."""

    ids: np.ndarray
    """int32 [K], tokens with an edit."""

    values: np.ndarray
    """float32 [K], what is added."""

    until: np.ndarray
    """int32 [K], length of the sequence from which the edit has ended."""

    mask: np.ndarray | None
    """uint32 [V/32], what is allowed; None allows all."""


NO_IDS, NO_VALUES = np.zeros(0, np.int32), np.zeros(0, np.float32)
NO_RULES = LogitRules(NO_IDS, NO_VALUES, NO_IDS)


def _ends_with(output: Sequence[int], tokens: tuple[int, ...]) -> bool:
    return len(output) >= len(tokens) and tuple(output[len(output) - len(tokens) :]) == tokens


def bitmask(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Returns uint32 [ceil(V/32)] with the bits of these tokens set."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


def rules_of(
    params: SamplingParams,
    *,
    prompt_len: int,
    stop_ids: Sequence[int],
    bad_words: Sequence[tuple[int, ...]],
    thinking: ThinkingBudget | None,
    vocab_size: int,
) -> LogitRules:
    """Returns the rules of a request.

    Args:
        params: Its parameters.
        prompt_len: Tokens of its prompt.
        stop_ids: Tokens that may not come below `min_tokens`.
        bad_words: The token ids of each bad word, in each of its spellings.
        thinking: Of `thinking_token_budget`.
        vocab_size: V.
    """
    edits = [(token, value, ALWAYS) for token, value in (params.logit_bias or {}).items()]
    if params.min_tokens:
        until = min(prompt_len + params.min_tokens, ALWAYS)
        edits += [(token, BAN, until) for token in stop_ids]
    edits += [(word[0], BAN, ALWAYS) for word in bad_words if len(word) == 1]
    several = tuple(word for word in bad_words if len(word) > 1)
    allowed = params.allowed_token_ids
    if not (edits or several or allowed or thinking):
        return NO_RULES
    ids, values, until = zip(*edits, strict=True) if edits else ((), (), ())
    return LogitRules(
        ids=np.asarray(ids, np.int32),
        values=np.asarray(values, np.float32),
        until=np.asarray(until, np.int32),
        bad_words=several,
        allowed=bitmask(allowed, vocab_size) if allowed else None,
        thinking=thinking,
        vocab_size=vocab_size,
    )
