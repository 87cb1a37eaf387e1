"""Rotary position embeddings (arXiv:2104.09864) and their context scalings.

The frequencies are worked out once on the host, in float32 (their powers exactly,
then rounded) and with the formulas of transformers' `modeling_rope_utils`, because
a difference in the last bit of a frequency grows with the position.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.modeling.config import RopeConfig

F32 = np.float32
Frequencies = tuple[np.ndarray, float]


def _default(rope: RopeConfig, head_dim: int) -> Frequencies:
    return F32(1.0) / _powers(rope.theta, rope.rotary_dim(head_dim)), 1.0


def _powers(theta: float, dim: int) -> np.ndarray:
    """Returns the wavelength of each pair of dimensions, in radians: 1 to `theta`."""
    exponents = np.arange(0, dim, 2, dtype=F32) / F32(dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(F32)


def _linear(rope: RopeConfig, head_dim: int) -> Frequencies:
    inv_freq, scale = _default(rope, head_dim)
    return inv_freq / F32(rope.factor), scale


def _dynamic(rope: RopeConfig, head_dim: int) -> Frequencies:
    """NTK: a larger theta where sequences may be longer than the original context."""
    dim = rope.rotary_dim(head_dim)
    ratio = max(rope.length, rope.original_max_position) / rope.original_max_position
    stretch = (rope.factor * ratio - (rope.factor - 1)) ** (dim / (dim - 2))
    return F32(1.0) / _powers(rope.theta * stretch, dim), 1.0


def _longrope(rope: RopeConfig, head_dim: int) -> Frequencies:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency, of two tables."""
    is_long = rope.length > rope.original_max_position
    divisors = np.asarray(rope.long_factors if is_long else rope.short_factors, F32)
    inv_freq = F32(1.0) / (divisors * _powers(rope.theta, rope.rotary_dim(head_dim)))
    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    growth = math.log(max(rope.factor, 1.0)) / math.log(rope.original_max_position)
    return inv_freq, math.sqrt(1 + growth)


def _proportional(rope: RopeConfig, head_dim: int) -> Frequencies:
    """The fastest part of all a head's frequencies; the other dimensions stand still."""
    inv_freq = F32(1.0) / _powers(rope.theta, head_dim) / F32(rope.factor)
    turning = int(rope.partial * head_dim // 2)
    return np.where(np.arange(head_dim // 2) < turning, inv_freq, F32(0)), 1.0


def _llama3(rope: RopeConfig, head_dim: int) -> Frequencies:
    """Llama 3.1: slow frequencies divided by `factor`, with a smooth step between."""
    inv_freq, scale = _default(rope, head_dim)
    wavelen = F32(2 * math.pi) / inv_freq
    low_wavelen = rope.original_max_position / rope.low_freq_factor
    high_wavelen = rope.original_max_position / rope.high_freq_factor
    smooth = (F32(rope.original_max_position) / wavelen - F32(rope.low_freq_factor)) / F32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * inv_freq / F32(rope.factor) + smooth * inv_freq
    scaled = np.where(wavelen > low_wavelen, inv_freq / F32(rope.factor), inv_freq)
    medium = (wavelen >= high_wavelen) & (wavelen <= low_wavelen)
    return np.where(medium, blended, scaled).astype(F32), scale


def _yarn(rope: RopeConfig, head_dim: int) -> Frequencies:
    """YaRN (arXiv:2309.00071)."""
    dim = rope.rotary_dim(head_dim)

    def dim_of(rotations: float) -> float:
        span = rope.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=F32) - F32(low)) / F32(high - low), 0, 1)

    inv_freq, _ = _default(rope, head_dim)
    keep = F32(1) - ramp  # 1 where a dimension turns fast and is left alone
    mixed = inv_freq / F32(rope.factor) * (F32(1) - keep) + inv_freq * keep
    return mixed.astype(F32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


KINDS: dict[str, Callable[[RopeConfig, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
    "proportional": _proportional,
}


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of every rotation.

    Args:
        rope: Which scaling, with its numbers.
        head_dim: Size of a head (D).
        positions: int32 [T].

    Returns:
        Two float32 [T, D/2]; narrower where a part of each head is rotated.
    """
    inv_freq, scale = KINDS[rope.kind](rope, head_dim)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inv_freq)[None, :]
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    return jax.lax.platform_dependent(cos, sin, cpu=_computed_once, default=lambda *x: x)


def _computed_once(*tables: jax.Array) -> tuple[jax.Array, ...]:
    """[T, N] each -> the same, products with the identity: exact, as all numbers are finite.

    XLA:CPU puts cosines into whatever reads them, and so would compute them in each layer
    for each head: a twentieth of a prompt's time in bfloat16. It does not look through products,
    and takes barriers away before it decides.
    """
    identity = jnp.eye(tables[0].shape[1], dtype=tables[0].dtype)
    precision = jax.lax.Precision.HIGHEST
    return tuple(jax.lax.dot(table, identity, precision=precision) for table in tables)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each head: of its first N dimensions, i is paired with i + N/2.

    Args:
        x: [T, ..., D].
        cos: float32 [T, N/2]; what lies beyond N is left as it is.
        sin: float32 [T, N/2].

    Returns:
        The same shape and dtype as `x`.
    """
    half = cos.shape[1]
    middle = (1,) * (x.ndim - 2)
    cos, sin = (t.reshape(t.shape[0], *middle, half) for t in (cos, sin))
    x32 = x.astype(jnp.float32)
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
