"""Layouts: which mesh axis each named array axis is split over.

A layout is a value: frozen, hashable, printable, and the same from a dict or a JSON
file. It holds no devices; those come with the mesh (`mesh.make_mesh`).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import PartitionSpec

from jaxllm.errors import ConfigError, nearest

ARRAY_AXES = {
    "vocab": "rows of the embedding and of the output head, and logits",
    "embed": "width of the residual stream",
    "token_embed": "width of embeddings that are narrower than the stream (OPT)",
    "q_heads": "query heads",
    "kv_heads": "key and value heads, with their query heads; the cache too",
    "head_dim": "numbers of a head",
    "mlp": "width of the feed-forward",
    "experts": "experts of a layer",
    "positions": "rows of a table of learned positions",
    "tokens": "tokens of a step, in the residual stream between two branches",
    "pages": "pages of the cache",
}
"""Names that a rule may give a place to."""

REPLICAS = "data"
"""The mesh axis over which whole engines are repeated; no array is split over it."""

_HEADS = {"q_heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
_TENSOR = {"vocab": "tensor", **_HEADS}

LAYOUTS: dict[str, dict[str, str]] = {
    "replicated": {},
    "tensor": _TENSOR,
    "tensor_replicated_vocab": _HEADS,
    "data": {},
    "data_tensor": _TENSOR,
    # Weights split both ways: a device multiplies a tile, and sums go along either axis.
    "tensor_2d": {**_TENSOR, "embed": "tensor_2"},
    # Each sum over devices is left split over tokens, and gathered where the next branch reads.
    "sequence": {**_TENSOR, "tokens": "tensor"},
}
"""Presets: axis name -> mesh axis. An axis that is not named is replicated."""

Rule = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A mesh shape, and a table from axis names to mesh axes.

    Example:
        >>> Layout("mine", {"tensor": 4}, {"mlp": "tensor", "q_heads": "tensor"})
    """

    name: str
    mesh_shape: Any
    """Size of each mesh axis by name, in order: pairs, or a dict, which becomes pairs."""

    rules: Any
    """Pairs of an axis name and the mesh axis, or axes, it is split over; or a dict."""

    def __post_init__(self) -> None:
        """Makes tuples of dicts and lists, and checks names.

        Raises:
            ConfigError: A size is no size, or a name is not known.
        """
        shape, rules = dict(self.mesh_shape) or {REPLICAS: 1}, dict(self.rules)
        for axis, size in shape.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(
                    f"Layout {self.name!r} gives the mesh axis {axis!r} the size {size!r}. "
                    "Use a whole number of at least 1."
                )
        for axis, place in rules.items():
            self._check_rule(axis, place, shape)
        as_tuple = {k: p if isinstance(p, str) else tuple(p) for k, p in rules.items()}
        object.__setattr__(self, "mesh_shape", tuple(shape.items()))
        object.__setattr__(self, "rules", tuple(as_tuple.items()))

    def _check_rule(self, axis: str, place: Any, shape: Mapping[str, int]) -> None:
        if axis not in ARRAY_AXES:
            raise ConfigError(
                f"Layout {self.name!r} has a rule for {axis!r}, which is no axis of an array"
                f"{nearest(axis, ARRAY_AXES) or '.'} Use one of {sorted(ARRAY_AXES)}."
            )
        for name in _names(place):
            if name == REPLICAS:
                raise ConfigError(
                    f"Layout {self.name!r} splits {axis!r} over {REPLICAS!r}, the axis of whole "
                    "engines side by side. Give it another mesh axis, such as 'tensor'."
                )
            if name not in shape:
                raise ConfigError(
                    f"Layout {self.name!r} splits {axis!r} over {name!r}, and its mesh has "
                    f"{list(shape)}. Add {name!r} to the mesh with its size."
                )

    @property
    def mesh(self) -> dict[str, int]:
        """Size of each mesh axis by name, in order."""
        return dict(self.mesh_shape)

    @property
    def num_devices(self) -> int:
        """Devices that the mesh needs."""
        return math.prod(self.mesh.values())

    @property
    def num_replicas(self) -> int:
        """Engines side by side."""
        return self.mesh.get(REPLICAS, 1)

    def replica(self) -> "Layout":
        """Returns the layout of one engine of several."""
        if self.num_replicas == 1:
            return self
        return replace(self, mesh_shape={**self.mesh, REPLICAS: 1})

    def over(self, axis: str | None) -> tuple[str, ...]:
        """Returns the mesh axes that an array axis is split over."""
        return _names(dict(self.rules).get(axis, ()))

    def split(self, axis: str | None) -> int:
        """Returns how many shards an array axis has."""
        sizes = self.mesh
        return math.prod(sizes[name] for name in self.over(axis))

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Returns the partition of an array whose axes have these names.

        Raises:
            ConfigError: Two of its axes would be split over one mesh axis.
        """
        split = [self.over(axis) for axis in axes]
        used = [name for names in split for name in names]
        if len(set(used)) != len(used):
            raise ConfigError(
                f"Layout {self.name!r} splits two axes of {axes} over one mesh axis. "
                "Give one of them no rule, or another mesh axis."
            )
        return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))

    def __str__(self) -> str:
        """The name and the mesh, then a line a rule."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh_shape) or "one device"
        lines = [f"{axis} over {' x '.join(_names(place))}" for axis, place in self.rules]
        return "\n  ".join([f"{self.name}: {mesh}", *(lines or ["nothing is split"])])

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` takes; JSON can hold it."""
        rules = {axis: p if isinstance(p, str) else list(p) for axis, p in self.rules}
        return {"name": self.name, "mesh": self.mesh, "rules": rules}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Layout":
        """Returns a layout of a dict with `mesh`, `rules` and, if it has one, `name`.

        Raises:
            ConfigError: The dict is another, or names what there is not.
        """
        known = ("name", "mesh", "rules")
        strange = [key for key in given if key not in known]
        if strange:
            raise ConfigError(
                f"A layout has no {strange[0]!r}{nearest(str(strange[0]), known) or '.'} "
                'Write {"mesh": {"tensor": 2}, "rules": {"mlp": "tensor"}}.'
            )
        mesh, rules = given.get("mesh", {}), given.get("rules", {})
        for key, value in (("mesh", mesh), ("rules", rules)):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"The {key} of a layout must be a dict, got {value!r}. "
                    'Write {"mesh": {"tensor": 2}, "rules": {"mlp": "tensor"}}.'
                )
        return cls(str(given.get("name", "custom")), mesh, rules)

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns the layout as JSON, and writes it to a file if one is named."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | Path) -> "Layout":
        """Returns the layout of a JSON file.

        Raises:
            ConfigError: There is no such file, or it holds no layout.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"layout={str(path)!r} is not a readable JSON file ({error}). "
                "`Layout.to_json(path)` writes one."
            ) from error
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"layout={str(path)!r} holds {type(given).__name__}, and a layout is an object. "
                "`Layout.to_json(path)` writes one."
            )
        return cls.from_dict(given)


def _names(place: Rule | Iterable[str]) -> tuple[str, ...]:
    return (place,) if isinstance(place, str) else tuple(place)


def preset(name: str, *, tensor: int = 1, data: int = 1, expert: int = 1) -> Layout:
    """Returns a named layout.

    Args:
        name: Key of `LAYOUTS`.
        tensor: Devices that share one model; a layout with two such axes divides them as
            evenly as it can, 8 as 4 x 2.
        data: Engines side by side.
        expert: Devices that share the experts of a layer.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in LAYOUTS:
        raise ConfigError(
            f"layout={name!r} is not a preset{nearest(name, LAYOUTS) or '.'} Use one of "
            f"{sorted(LAYOUTS)}, the name of a JSON file, or a Layout."
        )
    rules = LAYOUTS[name]
    sizes = {"data": data, "tensor": tensor}
    if "tensor_2" in rules.values():
        second = max(n for n in range(1, math.isqrt(tensor) + 1) if tensor % n == 0)
        sizes |= {"tensor": tensor // second, "tensor_2": second}
    return Layout(name, {**sizes, "expert": expert}, rules)
