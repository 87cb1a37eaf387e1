"""What `LLM` methods return; the names and fields are vLLM's. No JAX here."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

SHOWN = 60
"""Characters of a text that a `repr` shows."""


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1 for the most likely token: how many tokens are at least as likely."""

    decoded_token: str | None = None


@dataclass(slots=True, repr=False)
class FlatLogprobs(Sequence):
    """Log-probabilities of many positions in a few flat lists.

    Reads like a list of dicts, which are made as they are asked for; there are no more
    objects for a long completion than for a short one. Entries of position i are those
    from `start_indices[i]` up to and without `end_indices[i]`.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, position: Mapping[int, Logprob] | None) -> None:
        """Adds a position while the container is being filled; None has no entries."""
        self.start_indices.append(len(self.token_ids))
        for token, found in (position or {}).items():
            self.token_ids.append(token)
            self.logprobs.append(found.logprob)
            self.ranks.append(found.rank)
            self.decoded_tokens.append(found.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        """Positions."""
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...

    @overload
    def __getitem__(self, index: slice) -> "FlatLogprobs": ...

    def __getitem__(self, index: int | slice) -> "dict[int, Logprob] | FlatLogprobs":
        """One position as a dict, which is empty for None; or several as `FlatLogprobs`."""
        if isinstance(index, slice):
            part = FlatLogprobs()
            for i in range(*index.indices(len(self))):
                part.append(self[i])
            return part
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i])
            for i in range(self.start_indices[index], self.end_indices[index])
        }

    def __repr__(self) -> str:
        """How much it holds."""
        return f"FlatLogprobs({len(self)} positions, {len(self.token_ids)} entries)"


SampleLogprobs = list[dict[int, Logprob]] | FlatLogprobs
PromptLogprobs = list[dict[int, Logprob] | None] | FlatLogprobs


@dataclass(slots=True, repr=False)
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str
    token_ids: Sequence[int]
    """All generated tokens, the one that stopped it included."""

    cumulative_logprob: float | None = None
    """Sum of the tokens' log-probabilities; None unless `logprobs` was asked for."""

    logprobs: SampleLogprobs | None = None
    """For each token, the token itself first and then the likeliest ones."""

    finish_reason: str | None = None
    """`stop`, `length`, `abort`, `error` or `repetition`; None while running."""

    stop_reason: int | str | None = None
    """The stop token or string that ended it; None for the end-of-sequence token."""

    seed: int | None = None
    """Of its random numbers; with it as `SamplingParams.seed` the tokens come again."""

    lora_request: Any = None
    """As in vLLM; always None, as adapters are not implemented."""

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        """The text, shortened, and how it ended."""
        shown = [
            f"index={self.index}",
            f"text={_short(self.text)}",
            _count(len(self.token_ids), "token"),
        ]
        if self.cumulative_logprob is not None:
            shown.append(f"cumulative_logprob={self.cumulative_logprob:.4g}")
        shown.append(f"finish_reason={self.finish_reason!r}")
        if self.stop_reason is not None:
            shown.append(f"stop_reason={self.stop_reason!r}")
        return f"CompletionOutput({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """The whole text, for notebooks."""
        return _box(self._html())

    def _html(self) -> str:
        notes = [_count(len(self.token_ids), "token"), self.finish_reason or "running"]
        if self.stop_reason is not None:
            notes[-1] += f" at {self.stop_reason!r}"
        return f"{_pre(self.text)}{_note(', '.join(notes))}"


@dataclass(slots=True)
class RequestStateStats:
    """How a request went. Times are seconds: of the day where it is said, else monotonic."""

    arrival_time: float = 0.0
    """When it was handed in, in seconds since 1970."""

    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    """When its first tokens were computed."""

    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    """Seconds from its arrival to its first token."""

    num_generation_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True, repr=False)
class RequestOutput:
    """A request and its completions."""

    request_id: str
    prompt: str | None
    """The text, if the prompt was text."""

    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None = None
    """For each token of the prompt but the first, as for a completion's; None for the first."""

    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestStateStats | None = None
    lora_request: Any = None
    """As in vLLM; always None, as adapters are not implemented."""

    num_cached_tokens: int | None = 0
    """Tokens of the prompt that were found in the prefix cache."""

    error: Exception | None = None
    """Why it could not be run, where the call returns errors; there are no outputs then."""

    def __repr__(self) -> str:
        """The prompt, shortened, and its completions."""
        shown = [f"request_id={self.request_id!r}"]
        if self.prompt is not None:
            shown.append(f"prompt={_short(self.prompt)}")
        if self.prompt_token_ids is not None:
            shown.append(_count(len(self.prompt_token_ids), "prompt token"))
        shown.append(f"outputs={self.outputs!r}" if self.error is None else f"error={self.error!r}")
        shown.append(f"finished={self.finished}")
        return f"RequestOutput({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """Prompt and completions in full, for notebooks."""
        parts = [] if self.prompt is None else [_pre(self.prompt, color="#888")]
        if self.prompt_token_ids is not None:
            cached = f", {self.num_cached_tokens} cached" if self.num_cached_tokens else ""
            count = _count(len(self.prompt_token_ids), "prompt token")
            parts.append(_note(f"request {self.request_id}: {count}{cached}"))
        if self.error is not None:
            parts.append(_pre(f"{type(self.error).__name__}: {self.error}", color="#b00"))
        parts += [output._html() for output in self.outputs]
        return _box("".join(parts))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CompletionScore:
    """How likely a given completion is behind its context, token by token."""

    token_ids: np.ndarray
    """int32 [N], the completion."""

    logprobs: np.ndarray
    """float32 [N], of each token behind all before it."""

    ranks: np.ndarray
    """int32 [N], how many tokens are at least as likely; 1 for the likeliest."""

    @property
    def is_greedy(self) -> bool:
        """Whether greedy generation gives this completion."""
        return bool((self.ranks == 1).all())

    @property
    def total(self) -> float:
        """Log-probability of the whole: the sum, in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    def __len__(self) -> int:
        """Tokens of the completion."""
        return len(self.token_ids)

    def __repr__(self) -> str:
        """The sum and not each."""
        count = _count(len(self), "token")
        return f"CompletionScore({count}, total={self.total:.4g}, is_greedy={self.is_greedy})"


# -------------------------------------------------------------------- how things look


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _pre(text: str, color: str = "inherit") -> str:
    style = f"white-space: pre-wrap; margin: 0; color: {color}"
    return f'<pre style="{style}">{html.escape(text)}</pre>'


def _note(text: str) -> str:
    return f'<div style="font-size: 80%; opacity: 0.7">{html.escape(text)}</div>'


def _box(inner: str) -> str:
    style = "border-left: 3px solid #ccc; padding-left: 8px; text-align: left"
    return f'<div style="{style}">{inner}</div>'
