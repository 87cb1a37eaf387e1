"""Log-probabilities on the host: of sampled tokens, and of given ones. No JAX here."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, eq=False)
class SampledLogprob:
    """What is returned of one generated token's distribution."""

    chosen: float
    """Log-probability of the token itself (a logit, where `logprobs_mode` says so)."""

    rank: int
    """Tokens at least as likely as it."""

    ids: list[int]
    """The likeliest tokens, or those the caller named."""

    values: list[float]
    ranks: list[int]


@dataclass(slots=True, eq=False)
class Scoring:
    """Log-probabilities of given tokens, filled in as their positions are computed."""

    targets: np.ndarray
    """int32 [N], the token that follows each position, from position 0 on."""

    start: int
    """First position whose target is scored."""

    num_top: int
    """Likeliest alternatives to return beside each (k)."""

    logprobs: np.ndarray = field(init=False)
    """float32 [N - start]."""

    ranks: np.ndarray = field(init=False)
    """int32 [N - start], tokens at least as likely as the target."""

    top_ids: np.ndarray = field(init=False)
    """int32 [N - start, k]."""

    top: np.ndarray = field(init=False)
    """float32 [N - start, k]."""

    def __post_init__(self) -> None:
        """Allocates the results."""
        count = len(self.targets) - self.start
        self.logprobs = np.zeros(count, np.float32)
        self.ranks = np.zeros(count, np.int32)
        self.top_ids = np.zeros((count, self.num_top), np.int32)
        self.top = np.zeros((count, self.num_top), np.float32)

    def put(
        self,
        positions: range,
        logprobs: np.ndarray,
        ranks: np.ndarray,
        top_ids: np.ndarray,
        top: np.ndarray,
    ) -> None:
        """Takes the results of these positions; alternatives beyond `num_top` are dropped."""
        at = slice(positions.start - self.start, positions.stop - self.start)
        self.logprobs[at], self.ranks[at] = logprobs, ranks
        self.top_ids[at], self.top[at] = top_ids[:, : self.num_top], top[:, : self.num_top]
