"""The two forms of a parameter: as a layout holds it, and bare.

A layout may hold KV heads several times and pad the vocabulary (`fitting.fit`). What is
kept outside of a layout, or goes from one to another, is bare: without copies or padding.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.sharding.transfer import is_at, transfer

if TYPE_CHECKING:
    from jaxllm.modeling.abstract import Leaf


def is_bare(leaf: Leaf) -> bool:
    """Whether the layout holds the parameter as it is."""
    return not leaf.padding and max(leaf.copies, default=1) == 1


def bare_shape(leaf: Leaf) -> tuple[int, ...]:
    """Returns the shape without copies and padding."""
    shape = leaf.shape.shape
    if is_bare(leaf):
        return shape
    times = max(leaf.copies, default=1)
    rows = (shape[0] - leaf.padding) // times
    return (rows, sum(_bare_parts(leaf)), *shape[2:]) if times > 1 else (rows, *shape[1:])


def bare_sharding(leaf: Leaf) -> NamedSharding:
    """Returns where the bare form lies: as the layout says, or evenly over its devices."""
    sharding = leaf.shape.sharding
    if is_bare(leaf):
        return sharding
    shape, mesh = bare_shape(leaf), sharding.mesh
    spec: list[tuple[str, ...] | None] = [None] * len(shape)
    # The last axis that divides: the first is the one that does not.
    for axis in reversed(range(len(shape))):
        if shape[axis] % mesh.size == 0:
            spec[axis] = mesh.axis_names
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def _bare_parts(leaf: Leaf) -> list[int]:
    """Sizes of the parts where the copies do not divide them."""
    times = max(leaf.copies)
    return [size * times // copies for size, copies in zip(leaf.parts, leaf.copies, strict=True)]


def dressed(leaf: Leaf, x: jax.Array) -> jax.Array:
    """Returns the layout's form of a bare parameter; to be traced.

    Args:
        leaf: As the layout holds it.
        x: Of `bare_shape`.
    """
    if leaf.padding:
        x = jnp.pad(x, ((0, leaf.padding), *((0, 0) for _ in x.shape[1:])))
    times = max(leaf.copies, default=1)
    if times == 1:
        return x
    # [K, G+2, D, E]: a row's queries are divided among the copies of its key and value.
    parts = jnp.split(x, np.cumsum(_bare_parts(leaf))[:-1], axis=1)
    parts = [
        jnp.repeat(part, copies, axis=0).reshape(x.shape[0] * times, size, *x.shape[2:])
        for part, copies, size in zip(parts, leaf.copies, leaf.parts, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


def bare(leaf: Leaf, x: jax.Array) -> jax.Array:
    """Returns a parameter without copies and padding, undoing `dressed`; to be traced.

    Args:
        leaf: As the layout holds it.
        x: Of the leaf's shape.
    """
    x = x[: x.shape[0] - leaf.padding]
    times = max(leaf.copies, default=1)
    if times == 1:
        return x
    rows = x.shape[0] // times
    parts = jnp.split(x, np.cumsum(leaf.parts)[:-1], axis=1)
    parts = [
        part.reshape(rows, times, size, *x.shape[2:])[:, ::copies].reshape(rows, -1, *x.shape[2:])
        for part, copies, size in zip(parts, leaf.copies, leaf.parts, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


def to_bare(leaf: Leaf, x: jax.Array) -> jax.Array:
    """Returns the bare form on the devices of the parameter; itself where it is bare."""
    return x if is_bare(leaf) else _program(bare, _kind(leaf), bare_sharding(leaf))(x)


def to_dressed(leaf: Leaf, x: jax.Array) -> jax.Array:
    """Returns the layout's form of an array at `bare_sharding`; itself where they are one."""
    return x if is_bare(leaf) else _program(dressed, _kind(leaf), leaf.shape.sharding)(x)


def move(x: jax.Array, old: Leaf, new: Leaf) -> jax.Array:
    """Returns a parameter under another layout, perhaps on other devices; the old one stays.

    Args:
        x: The parameter; returned itself where nothing changes.
        old: As one layout holds it.
        new: As the other does.
    """
    if old.shape.shape == new.shape.shape:
        return transfer(x, new.shape.sharding)
    return to_dressed(new, transfer(to_bare(old, x), bare_sharding(new)))


def is_placed(x: jax.Array, leaf: Leaf) -> bool:
    """Whether an array is a parameter as the layout holds it."""
    return x.shape == leaf.shape.shape and is_at(x, leaf.shape.sharding)


def _kind(leaf: Leaf) -> Leaf:
    """The leaf without its name: layers are alike, and share a program."""
    return type(leaf)(
        "", leaf.shape, leaf.num_in, leaf.parts, leaf.part_axis, leaf.copies, leaf.padding
    )


@functools.lru_cache(maxsize=64)
def _program(function, leaf: Leaf, sharding: NamedSharding):  # noqa: ANN001, ANN202
    return jax.jit(functools.partial(function, leaf), out_shardings=sharding)
