"""What is asked of the engine: prompts of random token ids. No JAX here."""

import math
from dataclasses import dataclass

import numpy as np

from jaxllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many prompts of which lengths; the numbers of one command line."""

    count: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    """Lengths are uniform over `[x * (1 - r), x * (1 + r)]`, of inputs and of outputs."""

    def __post_init__(self) -> None:
        """Checks the numbers."""
        at_least("input-len", self.input_len, 1)
        at_least("output-len", self.output_len, 1)
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(
                f"--random-range-ratio {self.range_ratio} must be at least 0 and less than 1. "
                "Use 0.5 for lengths from half to one and a half."
            )

    def bounds(self, length: int) -> tuple[int, int]:
        """Returns the smallest and the largest length about one of ours."""
        low = max(1, math.floor(length * (1 - self.range_ratio)))
        return low, max(low, math.ceil(length * (1 + self.range_ratio)))

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can have."""
        return self.bounds(self.input_len)[1] + self.bounds(self.output_len)[1]

    def draw(self, vocab_size: int, seed: int) -> "Workload":
        """Returns prompts of these sizes; the same lengths for every seed, other tokens."""
        lengths = np.random.default_rng(0)
        inputs, outputs = (
            lengths.integers(*self.bounds(length), self.count, endpoint=True).tolist()
            for length in (self.input_len, self.output_len)
        )
        tokens = np.random.default_rng(seed)
        prompts = tuple(tuple(tokens.integers(0, vocab_size, n).tolist()) for n in inputs)
        return Workload(prompts, tuple(outputs))


@dataclass(frozen=True, slots=True, repr=False)
class Workload:
    """Prompts, and how many tokens to generate for each."""

    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]

    def __len__(self) -> int:
        """Prompts."""
        return len(self.prompts)

    @property
    def input_lens(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(map(len, self.prompts))

    @property
    def num_input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(self.input_lens)

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate, over all prompts."""
        return sum(self.output_lens)

    def __repr__(self) -> str:
        """How much it is."""
        tokens = f"{self.num_input_tokens} tokens in, {self.num_output_tokens} out"
        return f"Workload({len(self)} prompts, {tokens})"


def at_least(name: str, value: int, least: int) -> int:
    """Returns the value of an option.

    Raises:
        ConfigError: It is less than that.
    """
    if value < least:
        raise ConfigError(f"--{name} {value} must be at least {least}.")
    return value
