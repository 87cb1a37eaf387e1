"""The one place that makes a mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxllm.errors import ConfigError
from jaxllm.sharding.layouts import Layout


def make_mesh(layout: Layout, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a layout over the first devices it needs.

    Axes are `Auto`: newer versions of JAX default to explicit ones, which would
    ask every layer for its output's sharding.

    Raises:
        ConfigError: There are fewer devices than the layout needs.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, needed = layout.mesh, layout.num_devices
    if len(devices) < needed:
        split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise ConfigError(
            f"World size ({needed}) is larger than the number of available devices "
            f"({len(devices)}): layout {layout.name!r} has {split}. Use sizes whose product is "
            f"{len(devices)} or less."
        )
    grid = np.array(devices[:needed]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def abstract_mesh(layout: Layout) -> AbstractMesh:
    """Returns the mesh of a layout without devices: enough for the shapes of shards."""
    sizes = layout.mesh
    kinds = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
