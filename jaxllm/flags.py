"""The few static choices of a program beside its shapes: what its batch asks of the sampler.

A batch pays for what its rows use and nothing else, so each choice is a branch at
trace time. All but `scored` depend on the parameters of the requests and not on how
far these have come, so that a batch keeps its program. No JAX here.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxllm.sampling_params import SamplingParams
from jaxllm.sequence import PlannedRow

LOGPROBS = (0, 1, 5, 20)
"""Alternatives that a program returns; more: the exact number."""

EDITS = (0, 16, 128, 1024)
"""Logits of a row that a program may edit; more: a power of two."""


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """What a program does between logits and tokens."""

    sampled: bool = False
    """Whether any row draws at random; a greedy program has no random numbers."""

    min_p: bool = False
    top_k: bool = False
    top_p: bool = False
    penalties: bool = False
    """Whether the program keeps and reads counts of the tokens of each row."""

    edits: int = 0
    """Logits of each row that may be edited (K)."""

    mask_words: int = 0
    """uint32 words of a mask over the vocabulary; 0: no row has one."""

    logprobs: int | None = None
    """Alternatives to return for each token; None: no log-probabilities."""

    logprob_ids: int = 0
    """Tokens of the caller's choice to score beside each sampled one."""

    scored: int | None = None
    """Alternatives to return for each given token that is scored; None: none is."""

    def __str__(self) -> str:
        """A short list for progress lines and statistics."""
        words = [n for n in ("sampled", "min_p", "top_k", "top_p", "penalties") if getattr(self, n)]
        words += ["masked"] * bool(self.mask_words)
        words += [f"edits={self.edits}"] * bool(self.edits)
        words += [f"logprobs={self.logprobs}"] * (self.logprobs is not None)
        words += [f"logprob_ids={self.logprob_ids}"] * bool(self.logprob_ids)
        words += [f"scored={self.scored}"] * (self.scored is not None)
        return " ".join(words)

    def join(self, other: "SamplingFlags") -> "SamplingFlags":
        """Returns the flags of a program that can serve both."""

        def most(a: Any, b: Any) -> Any:
            return max((n for n in (a, b) if n is not None), default=None)

        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return SamplingFlags(**{name: most(*pair) for name, pair in pairs.items()})

    def serves(self, other: "SamplingFlags") -> bool:
        """Whether a program of these flags does all that the others ask for."""
        return self.join(other) == self


NO_FLAGS = SamplingFlags()
"""Greedy, and nothing else."""


class FlagSets:
    """The flags that programs are made for: what batches asked for first, then few more.

    Requests of many kinds could otherwise make a program each. Once there are `MAX_SETS`,
    a batch takes the first that serves it; if there is none, one that serves all so far.
    """

    MAX_SETS = 8

    def __init__(self) -> None:
        self.known: list[SamplingFlags] = []

    def serving(self, flags: SamplingFlags) -> SamplingFlags:
        """Returns the flags of the program to use for a batch."""
        if flags in self.known:
            return flags
        if len(self.known) >= self.MAX_SETS:
            found = next((known for known in self.known if known.serves(flags)), None)
            if found is not None:
                return found
            flags = functools.reduce(SamplingFlags.join, self.known, flags)
        self.known.append(flags)
        return flags


def has_penalties(params: SamplingParams) -> bool:
    """Whether a request's logits depend on which tokens it has already."""
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )


def flags_of(rows: Sequence[PlannedRow]) -> SamplingFlags:
    """Returns what these rows ask for; those that do not sample yet count too."""
    rules = [row.seq.rules for row in rows]
    asked = [row.seq.num_logprobs for row in rows]
    scored = [row.seq.scoring.num_top for row in rows if row.seq.scoring and len(row.scored())]
    return replace(
        flags_of_params([row.seq.params for row in rows]),
        edits=edits_bucket(max(r.num_edits for r in rules)),
        mask_words=max(r.mask_words for r in rules),
        logprobs=logprobs_bucket(max((n for n in asked if n is not None), default=None)),
        scored=logprobs_bucket(max(scored, default=None)),
    )


def flags_of_params(params: Sequence[SamplingParams]) -> SamplingFlags:
    """Returns what these parameters ask for by themselves, without rules on single tokens."""
    return SamplingFlags(
        sampled=any(not p.is_greedy for p in params),
        min_p=any(p.min_p > 0 for p in params),
        top_k=any(p.top_k > 0 for p in params),
        top_p=any(p.top_p < 1 for p in params),
        penalties=any(has_penalties(p) for p in params),
        logprob_ids=edits_bucket(max(len(p.logprob_token_ids or ()) for p in params)),
    )


def logprobs_bucket(most: int | None) -> int | None:
    """Returns how many alternatives a program must return for a request that asks `most`."""
    if most is None:
        return None
    return next((size for size in LOGPROBS if size >= most), most)


def edits_bucket(most: int) -> int:
    """Returns how many edits a program must take for a row that has `most`."""
    return next((size for size in EDITS if size >= most), 1 << (most - 1).bit_length())
