"""Layouts: which mesh axis each named array axis is split over.

A layout is a value: frozen, hashable, printable. It holds no devices; those come
with the mesh (`mesh.make_mesh`).
"""

from dataclasses import dataclass

from jax.sharding import PartitionSpec

from jaxllm.errors import ConfigError

MESH_AXES = ("data", "tensor", "expert")

# Presets: axis name -> mesh axis. An axis that is not named is replicated.
LAYOUTS: dict[str, dict[str, str]] = {
    "replicated": {},
    "tensor": {"vocab": "tensor", "q_heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"},
}


@dataclass(frozen=True, slots=True)
class Layout:
    """A mesh shape, and a table from axis names to mesh axes."""

    name: str
    mesh_shape: tuple[tuple[str, int], ...]
    """Size of each mesh axis by name, in the order of `MESH_AXES`."""

    rules: tuple[tuple[str, str], ...]
    """Pairs of an axis name and the mesh axis it is split over."""

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Returns the partition of an array whose axes have these names.

        Raises:
            ConfigError: Two of its axes would be split over one mesh axis.
        """
        rules = dict(self.rules)
        split = [rules.get(axis) if axis else None for axis in axes]
        used = [axis for axis in split if axis]
        if len(set(used)) != len(used):
            raise ConfigError(
                f"Layout {self.name!r} splits two axes of {axes} over one mesh axis. "
                "Give one of them no rule, or another mesh axis."
            )
        return PartitionSpec(*split)

    @property
    def num_devices(self) -> int:
        """Devices that the mesh needs."""
        total = 1
        for _, size in self.mesh_shape:
            total *= size
        return total


def preset(name: str, *, tensor: int = 1, data: int = 1, expert: int = 1) -> Layout:
    """Returns a named layout over a mesh of the given sizes."""
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r} is not a preset. Use one of {sorted(LAYOUTS)}.")
    sizes = {"data": data, "tensor": tensor, "expert": expert}
    return Layout(
        name=name,
        mesh_shape=tuple((axis, sizes[axis]) for axis in MESH_AXES),
        rules=tuple(LAYOUTS[name].items()),
    )
