"""Applies a layout: shardings of stored arrays, and pins for intermediate ones."""

from dataclasses import dataclass
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from jaxllm.sharding.layouts import Layout

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Sharder:
    """A layout on a mesh."""

    layout: Layout
    mesh: Mesh

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns where an array with these axis names lives."""
        return NamedSharding(self.mesh, self.layout.spec(axes))

    def pin(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrains an intermediate array to the layout.

        Without it on the residual stream the partitioner was seen to emit a
        reduce-scatter, an all-gather and an all-reduce a layer; with it there are
        exactly two all-reduces. Tokens that do not divide stay together: a step may have
        fewer than there are devices.
        """
        if self.mesh.size == 1:
            return x
        placed = (
            None if axis == "tokens" and size % self.layout.split(axis) else axis
            for axis, size in zip(axes, x.shape, strict=True)
        )
        return jax.lax.with_sharding_constraint(x, self.sharding(*placed))

    def everywhere(self, tree: Tree) -> Tree:
        """Returns small arrays that every device has, however what is made of them is split."""
        return jax.tree.map(lambda x: self.pin(x, *(None,) * x.ndim), tree)

    def whole(self, x: jax.Array) -> jax.Array:
        """Returns what a branch reads, [T, E]: each device has every token.

        Only a layout that splits tokens needs to be told: its weights are split over the same
        devices, and the partitioner would gather those instead.
        """
        return self.pin(x, None, "embed") if self.layout.over("tokens") else x
