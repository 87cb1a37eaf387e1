"""Which tokens may be sampled: min-p, top-k and top-p, as thresholds on the logits.

A threshold is found by bisection over the bits of a float32, 32 passes over the
row, and not by sorting: XLA sorts a whole vocabulary in many more. Tokens that tie
with the threshold stay.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

FLIP = 0x7FFFFFFF


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 with the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ (jnp.right_shift(bits, 31) & FLIP)


def _unordered(key: jax.Array) -> jax.Array:
    """The inverse of `_ordered`."""
    bits = key ^ (jnp.right_shift(key, 31) & FLIP)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _largest(holds: Callable[[jax.Array], jax.Array], lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Returns the largest float32 for which a falling claim holds, for each row.

    Args:
        holds: float32 [B, 1] -> bool [B, 1], true below some number and false above.
        lo: float32 [B, 1], where it holds.
        hi: float32 [B, 1], the largest to try.
    """

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        lo, hi = ends  # it holds at lo, and not above hi
        gap = lo ^ hi
        middle = (lo & hi) + jnp.right_shift(gap, 1) + (gap & 1)  # rounded up, never overflows
        held = holds(_unordered(middle))
        return jnp.where(held, middle, lo), jnp.where(held, hi, middle - 1)

    lo, _ = jax.lax.fori_loop(0, 32, halve, (_ordered(lo), _ordered(hi)))
    return _unordered(lo)


def _keep(logits: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Drops tokens less than `p` times as likely as the likeliest.

    Args:
        logits: float32 [B, V], divided by the temperature.
        p: float32 [B]; 0 drops none.

    Returns:
        float32 [B, V], minus infinity where dropped.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    return _keep(logits, best + jnp.log(p)[:, None])


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Drops tokens below the k-th largest logit; ties with it stay.

    Args:
        logits: float32 [B, V].
        k: int32 [B], at least 1; V or more drops none.

    Returns:
        float32 [B, V], minus infinity where dropped.
    """
    lo = jnp.min(logits, axis=-1, keepdims=True)
    hi = jnp.max(logits, axis=-1, keepdims=True)
    wanted = jnp.minimum(k, logits.shape[-1])[:, None]

    def holds(threshold: jax.Array) -> jax.Array:
        above = jnp.sum(logits >= threshold, axis=-1, keepdims=True, dtype=jnp.int32)
        return above >= wanted

    return _keep(logits, _largest(holds, lo, hi))


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the likeliest tokens whose probabilities reach `p`, the crossing one included.

    A token stays if the tokens likelier than it have less than `p` together, so that
    ties stay together; the likeliest always stays.

    Args:
        logits: float32 [B, V]; minus infinity where dropped already.
        p: float32 [B], above 0; 1 drops none.

    Returns:
        float32 [B, V], minus infinity where dropped.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - best)
    wanted = jnp.sum(weights, axis=-1, keepdims=True) * p[:, None]

    def holds(threshold: jax.Array) -> jax.Array:
        # What lies at or above the threshold has all that is wanted.
        return jnp.sum(jnp.where(logits >= threshold, weights, 0), axis=-1, keepdims=True) >= wanted

    threshold = _largest(holds, jnp.min(logits, axis=-1, keepdims=True), best)
    return _keep(logits, jnp.where(p[:, None] < 1, threshold, -jnp.inf))
