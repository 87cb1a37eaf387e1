"""The one place that makes a mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

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
    names = tuple(name for name, _ in layout.mesh_shape)
    shape = tuple(size for _, size in layout.mesh_shape)
    needed = layout.num_devices
    if len(devices) < needed:
        raise ConfigError(
            f"World size ({needed}) is larger than the number of available devices "
            f"({len(devices)}). Use tensor_parallel_size={len(devices)} or less."
        )
    grid = np.array(devices[:needed]).reshape(shape)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
