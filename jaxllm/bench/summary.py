"""Many measurements in a few numbers. No JAX here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTAGES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True, repr=False)
class Summary:
    """Mean and percentiles of measurements, in their order and unit."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean; NaN of nothing."""
        return float(np.mean(self.values)) if self.values else float("nan")

    def percentile(self, percentage: float) -> float:
        """Returns the value below which a share lies, linear between neighbours."""
        return float(np.percentile(self.values, percentage)) if self.values else float("nan")

    @property
    def percentiles(self) -> dict[str, float]:
        """By percentage, as `vllm bench` writes them."""
        return {str(p): self.percentile(p) for p in PERCENTAGES if self.values}

    def scaled(self, factor: float) -> "Summary":
        """Returns the same in another unit."""
        return Summary(tuple(value * factor for value in self.values))

    def to_json(self) -> dict[str, Any]:
        """Returns mean, percentiles and every value."""
        mean = self.mean if self.values else None
        return {"mean": mean, "percentiles": self.percentiles, "values": list(self.values)}

    def __str__(self) -> str:
        """Three digits or so of each of the usual percentiles."""
        if not self.values:
            return "-"
        shown = (f"p{p} {number(self.percentile(p))}" for p in (50, 90, 99))
        return f"{number(self.mean)}   ({', '.join(shown)})"

    def __repr__(self) -> str:
        """How many, and where the middle lies."""
        middle = number(self.percentile(50)) if self.values else "none"
        return f"Summary({len(self.values)} values, p50 {middle})"


def summary(values: Sequence[float]) -> Summary:
    """Returns the summary of measurements."""
    return Summary(tuple(map(float, values)))


def number(value: float) -> str:
    """Returns a number with as many decimals as say something."""
    size = abs(value)
    decimals = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{decimals}f}"
