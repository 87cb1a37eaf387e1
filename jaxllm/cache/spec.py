"""What one layer keeps between steps, declared by the model and not assumed.

The axis order of the arrays is not here: it belongs to the attention op, which
says it for a platform (`pallas_kernels.attention.tuning_for`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """One layer's cache."""

    kind: Literal["paged"]
    """How it is addressed. `paged`: a key and a value for each token, in pages."""

    num_kv_heads: int
    head_dim: int
    group: int = 0
    """Page tables are one for each group; layers of a group share theirs."""

    def elements_per_token(self) -> int:
        """Numbers that one token takes, K and V together."""
        return 2 * self.num_kv_heads * self.head_dim
