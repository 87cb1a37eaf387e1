"""What `LLM` methods return; the names and fields are vLLM's. No JAX here."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1 for the most likely token: how many tokens are at least as likely."""

    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str
    token_ids: Sequence[int]
    """All generated tokens, the one that stopped it included."""

    cumulative_logprob: float | None = None
    """Sum of the tokens' log-probabilities; None unless `logprobs` was asked for."""

    logprobs: list[dict[int, Logprob]] | None = None
    """For each token, the token itself first and then the likeliest ones."""

    finish_reason: str | None = None
    """`stop`, `length` or `abort`; None while running."""

    stop_reason: int | str | None = None
    """The stop token that ended it; None for the end-of-sequence token."""

    seed: int | None = None
    """Of its random numbers; with it as `SamplingParams.seed` the tokens come again."""

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions."""

    request_id: str
    prompt: str | None
    """The text, if the prompt was text."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache."""
