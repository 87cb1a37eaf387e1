"""What an engine counts of itself, between two moments."""

from dataclasses import dataclass, fields
from typing import Any

from jaxllm.llm import LLM


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of a stretch of steps."""

    num_steps: int = 0
    num_tokens: int = 0
    """Tokens computed, prefill and decode."""

    num_padded_tokens: int = 0
    """Tokens of the programs' shapes that were padding."""

    num_ahead: int = 0
    """Steps that were launched before the results of the step before were known."""

    host_seconds: float = 0.0
    """Spent outside the programs: planning, packing, applying."""

    step_seconds: float = 0.0
    """Spent on launching programs, and on waiting for their results."""

    num_preemptions: int = 0
    num_compiled: int = 0
    """Programs that were used for the first time."""

    compile_seconds: float = 0.0
    """Of those programs."""

    def __sub__(self, earlier: "Counts") -> "Counts":
        """What came between two readings."""
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    @property
    def host_ms_per_step(self) -> float:
        """Milliseconds of the host in a step."""
        return 1e3 * self.host_seconds / max(1, self.num_steps)

    @property
    def padding_waste(self) -> float:
        """Share of the computed tokens that were padding."""
        return self.num_padded_tokens / max(1, self.num_tokens + self.num_padded_tokens)

    def to_json(self) -> dict[str, Any]:
        """Returns every count, and what is worked out of them."""
        counted = {field.name: getattr(self, field.name) for field in fields(self)}
        derived = {"host_ms_per_step": self.host_ms_per_step, "padding_waste": self.padding_waste}
        return counted | derived


def read_counts(llm: LLM) -> Counts:
    """Returns the counts since the engine was made."""
    stats = llm.stats()
    own = {field.name for field in fields(Counts)} - {"num_compiled", "compile_seconds"}
    return Counts(
        **{name: stats[name] for name in own},
        num_compiled=len(stats.compile_seconds),
        compile_seconds=sum(stats.compile_seconds.values()),
    )
