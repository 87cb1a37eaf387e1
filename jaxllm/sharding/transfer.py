"""Moves an array from one sharding to another, device to device.

JAX's own `device_put` goes by way of the host where a shard's slice is on no device yet:
a whole copy of the array, and the slow way between GPUs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

Box = tuple[tuple[int, int], ...]
"""Start and end along each axis."""


def is_at(x: jax.Array, sharding: NamedSharding) -> bool:
    """Whether an array is where a sharding says."""
    return x.sharding.is_equivalent_to(sharding, x.ndim)


def transfer(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns the same values under another sharding; `x` itself where they are there.

    On the same devices this is a program, whose collectives cross processes too; between
    different ones each new shard is put together of pieces of the old.

    Args:
        x: Stays as it is.
        sharding: Of the result.
    """
    if is_at(x, sharding):
        return x
    if isinstance(x.sharding, NamedSharding) and list(
        x.sharding.devices_indices_map(x.shape)
    ) == list(sharding.devices_indices_map(x.shape)):
        return _spread(sharding)(x)
    have = {box_of(shard.index, x.shape): shard.data for shard in x.addressable_shards}
    shards = [
        _assemble(box_of(index, x.shape), have, device)
        for device, index in sharding.addressable_devices_indices_map(x.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


def box_of(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    """Returns the bounds of a shard; of the whole array for None."""
    index = (slice(None),) * len(shape) if index is None else index
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _same(x: jax.Array) -> jax.Array:
    return x


@functools.lru_cache(maxsize=64)
def _spread(sharding: NamedSharding):  # noqa: ANN202
    return jax.jit(_same, out_shardings=sharding)


def _assemble(box: Box, have: dict[Box, jax.Array], device: jax.Device, axis: int = 0) -> jax.Array:
    """Returns the values within bounds on one device.

    Args:
        box: The bounds.
        have: Shards, which form a grid, by their bounds.
        device: Where the values go.
        axis: The first along which the bounds may be of several shards.
    """
    if axis == len(box):
        source = next(b for b in have if all(_within(i, o) for i, o in zip(box, b, strict=True)))
        at = tuple(slice(i[0] - o[0], i[1] - o[0]) for i, o in zip(box, source, strict=True))
        return jax.device_put(have[source][at], device)
    start, stop = box[axis]
    cuts = {n for b in have for n in b[axis] if start < n < stop}
    pieces = [
        _assemble((*box[:axis], part, *box[axis + 1 :]), have, device, axis + 1)
        for part in itertools.pairwise(sorted({start, stop} | cuts))
    ]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
