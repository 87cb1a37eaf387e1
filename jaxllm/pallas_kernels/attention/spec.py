"""What one layer's attention is, and in which order its cache is stored."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

LayerCache = tuple[jax.Array, ...] | None
"""What one layer keeps: (K pages, V pages); None in a cacheless forward."""

MASKED = -1e30
"""Score of a key that must not be seen; finite, so that an empty row has no NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """The constants of one layer's attention."""

    scale: float
    """Factor of the scores."""

    window: int | None = None
    """Keys a query sees, its own included; None: all before it."""

    softcap: float | None = None
    """`cap * tanh(score / cap)` before the mask."""


class Attend(Protocol):
    """Attention of one step's tokens."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: LayerCache,
        spec: AttentionSpec,
    ) -> tuple[jax.Array, LayerCache]:
        """q [T, H, D], k and v [T, K, D], a layer's cache -> [T, H, D], the cache."""
        ...


def cache_order(platform: str) -> str:
    """Returns the axis order of a layer's K and V arrays on a platform.

    On a GPU `PSKD`: a token's heads are one contiguous row, written at once. On
    CPU `KPSD`: gathered pages are then the operand of a batched matrix product
    as they lie; the other order made XLA:CPU transpose them, at 4x the time.
    """
    return "KPSD" if platform == "cpu" else "PSKD"


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Applies the soft cap, if there is one."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """Returns the precision of a product: float32 is never TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
