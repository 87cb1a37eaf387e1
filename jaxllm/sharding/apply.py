"""Applies a layout: shardings of stored arrays, and pins for intermediate ones."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding

from jaxllm.sharding.layouts import Layout


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
        exactly two all-reduces.
        """
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))
