"""What one layer's attention is, and in which order its cache is stored."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.native.build import target_for

LayerCache = tuple[jax.Array, ...] | None
"""What one layer keeps: (K pages, V pages); None in a cacheless forward."""

Rope = tuple[jax.Array, jax.Array]
"""Cosines and sines of the step's positions, float32 [T, N/2] each: of a head's first N numbers, i
is paired with i + N/2 (arXiv:2104.09864)."""

MASKED = -1e30
"""Score of a key that must not be seen; finite, so that an empty row has no NaN."""


MOST_BLOCKS = 8
"""Query blocks computed together, at the most. Eight took half to two thirds of the time that
one after the other does (H100: 32 prompts of 128 tokens, one of 4096); sixteen gained no more."""


AT_ONCE, IN_PARTS, IN_PLACE = ("PSKD", "PSKD"), ("KPDS", "KPSD"), ("PKDS", "PKSD")
"""Axis orders of K and V: where all keys of a row are gathered at once, where some are, and where a
kernel reads them as they lie: all heads of a page one after the other."""


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
        """Takes q [T, H, D], k and v [T, K, D], a layer's cache -> [T, H, D], the cache."""
        ...

    @property
    def takes_fused(self) -> bool:
        """Whether `fused` may be called."""
        ...

    def fused(
        self, qkv: jax.Array, rope: Rope | None, cache: LayerCache, spec: AttentionSpec
    ) -> tuple[jax.Array, LayerCache]:
        """The same of queries, keys and values as one product gives them, not yet rotated.

        Args:
            qkv: [T, K, G + 2, D], of each KV head its queries, its key and its value.
            rope: Cosines and sines; None: no rotation.
            cache: Of the layer.
            spec: The layer's constants.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How the op works on a kind of device. Part of the program, never of the data."""

    orders: tuple[str, str]
    """Axis orders of a layer's K and V arrays, letters of the legend."""

    gather_bytes: int
    """Most bytes of gathered keys of one layer at once; more rows go in groups."""

    dynamic_trips: bool
    """Whether the loop over query blocks stops at the last used one."""

    score_bytes: int
    """Most bytes of the scores of query blocks that are computed together; 0: one at a time."""

    keys_at_once: int
    """Keys in one round of a loop that ends with the last one that a query block or a group of rows
    sees; 0: all, which wants no loop whose end is data."""

    upcast: bool
    """Whether 16-bit operands become float32 before a product."""

    as_bits: bool = False
    """Whether 16-bit floats are stored as uint16, bit for bit."""

    unrolled_groups: int = 0
    """Up to so many groups of rows are written out one by one; more are a loop."""

    target: str = ""
    """XLA's name of the compiled kernel that serves it, where there is one."""

    def __post_init__(self) -> None:
        """Checks what the fields say together."""
        orders = IN_PLACE if self.target else IN_PARTS if self.keys_at_once else AT_ONCE
        if self.orders != orders:
            way = self.target or f"keys_at_once={self.keys_at_once}"
            raise ValueError(f"{way} is for orders {', '.join(orders)}: {', '.join(self.orders)}.")

    def over(self, devices: int) -> Self:
        """Returns how the op works on arrays whose heads are split over so many devices.

        What bounds the work that is done together are bytes of a device.
        """
        return replace(
            self,
            gather_bytes=self.gather_bytes * devices,
            score_bytes=self.score_bytes * devices,
        )

    def blocks_at_once(self, block_q: int, num_heads: int, num_keys: int) -> int:
        """Returns how many query blocks [block_q, H] with so many keys are computed together."""
        return max(1, min(MOST_BLOCKS, self.score_bytes // (block_q * num_heads * num_keys * 4)))

    def stored(self, dtype: DTypeLike) -> jnp.dtype:
        """Returns the type of a cache that holds keys and values of a type."""
        dtype = jnp.dtype(dtype)
        return jnp.dtype(jnp.uint16) if self.as_bits and dtype.itemsize == 2 else dtype


TUNING = {
    # Gathered pages are the operand of a batched matrix product: values as they lie, keys with
    # the slots of a page side by side (the other way round, each gather is a transposition of
    # single numbers: twice the time, and the product with it 1.5x).
    # A group's keys stay near the core, and its longest row is not much longer than the others;
    # twice as many keys took 1.1x the time, four times 1.4x to 1.9x; fewer gained nothing.
    # XLA:CPU has no batched product of bfloat16 into float32 in some shapes.
    # Nor a scatter of 16-bit floats: the cache would become float32 and back in every step.
    "cpu": Tuning(
        orders=IN_PARTS,
        gather_bytes=1 << 20,
        dynamic_trips=True,
        score_bytes=0,
        # Three to four times as fast as all keys at once (64 queries, 9 heads; 512 keys), and
        # whole decode steps 1.1 to 1.3 times (64 rows of 32 to 270 tokens, page tables for 512).
        keys_at_once=64,
        upcast=True,
        as_bits=True,
    ),
    # PSKD: a token's heads are one contiguous row, written at once. A loop whose end is
    # data would make the host wait in each iteration, so unused blocks are run too.
    # A loop cannot be part of a CUDA graph: in each layer it would split that of the step.
    "gpu": Tuning(
        orders=AT_ONCE,
        gather_bytes=64 << 20,
        dynamic_trips=False,
        score_bytes=256 << 20,
        keys_at_once=0,
        upcast=False,
        unrolled_groups=8,
    ),
}


def tuning_for(platform: str) -> Tuning:
    """Returns how the op works on a platform of JAX (`cpu`, `gpu`, `cuda`), in plain XLA."""
    return TUNING["cpu" if platform == "cpu" else "gpu"]


def compiled_tuning_for(platform: str, devices: int, dtype: DTypeLike) -> Tuning:
    """Returns how the op works with a compiled kernel, where there is one.

    Args:
        platform: Of JAX.
        devices: Over which heads or rows are split; a compiled kernel has all on one.
        dtype: Of queries, keys and values.

    Raises:
        ConfigError, NativeBuildError: As `native.build.why_not_compiled`.
    """
    tuning, target = tuning_for(platform), target_for("paged_attention", platform, devices, dtype)
    return replace(tuning, target=target, orders=IN_PLACE) if target else tuning


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Applies the soft cap, if there is one."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def product(subscripts: str, x: jax.Array, y: jax.Array, *, upcast: bool) -> jax.Array:
    """Returns an einsum of two arrays in float32; float32 operands are never TF32."""
    dtype = jnp.float32 if upcast else y.dtype  # so probabilities take that of the values
    x, y = x.astype(dtype), y.astype(dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
