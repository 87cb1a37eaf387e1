"""Where the parameters of a model are: what `LLM.layout()` returns."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import ConfigError, nearest
from jaxllm.modeling.abstract import Leaf
from jaxllm.programs import ProgramBuilder
from jaxllm.sharding.layouts import Layout
from jaxllm.sharding.picture import Picture, picture_of, ranges

COLUMNS = ("parameter", "times", "shape", "split", "a device has", "bytes a device", "where")


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """Where one parameter is."""

    path: str
    axes: tuple[str | None, ...]
    """Names of its axes."""

    shape: tuple[int, ...]
    dtype: str
    sharding: NamedSharding

    @property
    def spec(self) -> PartitionSpec:
        """Mesh axis of each axis."""
        return self.sharding.spec

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of what a device has."""
        return self.sharding.shard_shape(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on each of its devices."""
        shard = jax.ShapeDtypeStruct(self.shard_shape, self.dtype)
        return shard.size * shard.dtype.itemsize

    @property
    def is_replicated(self) -> bool:
        """Whether each device has all of it."""
        return self.shard_shape == self.shape

    @property
    def picture(self) -> Picture:
        """How it is divided; draws itself in a notebook, and `.text()` elsewhere."""
        return picture_of(self.shape, self.axes, self.sharding)

    def __repr__(self) -> str:
        """The facts, then the picture."""
        name, times, *facts = _row(self, 1)
        del times
        return "\n".join([f"{name}: {'; '.join(facts)}", self.picture.text()])

    def _repr_html_(self) -> str:
        name, times, *facts = _row(self, 1)
        del times
        about = html.escape(f"{name}: {'; '.join(facts)}")
        return f"<div>{about}</div>{self.picture._repr_html_()}"


@dataclass(frozen=True, slots=True)
class LayoutReport:
    """Where every parameter is, and what each device has of them and of the cache.

    It iterates over the parameters, and finds one by its path.
    """

    layout: Layout
    parameters: tuple[ParameterLayout, ...]
    weight_bytes: dict[int, int]
    """Bytes of parameters by id of the device."""

    cache_bytes: dict[int, int]
    """Bytes of keys and values by id of the device."""

    def __iter__(self) -> Iterator[ParameterLayout]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, path: str) -> ParameterLayout:
        """Returns one parameter.

        Raises:
            ConfigError: There is none of that path.
        """
        found = {parameter.path: parameter for parameter in self.parameters}
        if path not in found:
            raise ConfigError(
                f"The model has no parameter {path!r}{nearest(path, found)}. Iterate over "
                "llm.layout() for all of them."
            )
        return found[path]

    def alike(self) -> list[tuple[ParameterLayout, int]]:
        """Returns one parameter of each kind, with `*` for its layer, and how many there are."""
        found: dict[tuple, tuple[ParameterLayout, int]] = {}
        for one in self.parameters:
            path = re.sub(r"\.\d+\.", ".*.", one.path)
            key = (path, one.axes, one.shape, one.dtype, one.sharding)
            found[key] = (ParameterLayout(*key), found.get(key, (one, 0))[1] + 1)
        return list(found.values())

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table, without its head: a row a kind of parameter."""
        return [_row(*kind) for kind in self.alike()]

    def device_lines(self) -> list[str]:
        """Returns a line for each group of devices that have equally much."""
        groups: dict[tuple[int, int], list[int]] = {}
        for device, weights in self.weight_bytes.items():
            groups.setdefault((weights, self.cache_bytes[device]), []).append(device)
        return [
            f"device {ranges(ids)}: {weights:,} bytes of parameters and {cache:,} of cache"
            + (" each" if len(ids) > 1 else "")
            for (weights, cache), ids in groups.items()
        ]

    def __repr__(self) -> str:
        """The layout, the table, a picture of each kind, the devices."""
        table = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in table]
        pictures = [f"{', '.join(names)}\n{picture.text()}" for names, picture in self._pictures()]
        return "\n\n".join(
            [
                str(self.layout),
                "\n".join(line.rstrip() for line in lines),
                *pictures,
                "\n".join(self.device_lines()),
            ]
        )

    def _pictures(self) -> list[tuple[list[str], Picture]]:
        """Pictures that look different, and the names of what looks so."""
        found: dict[str, tuple[list[str], Picture]] = {}
        for one, _ in self.alike():
            picture = one.picture
            found.setdefault(picture.text(), ([], picture))[0].append(one.path)
        return list(found.values())

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

        body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.rows())
        pictures = "".join(
            f"<h4>{html.escape(', '.join(names))}</h4>{picture._repr_html_()}"
            for names, picture in self._pictures()
        )
        return (
            f"<pre>{html.escape(str(self.layout))}</pre>"
            f"<table><tr>{row(COLUMNS, 'th')}</tr>{body}</table>{pictures}"
            f"<pre>{html.escape(chr(10).join(self.device_lines()))}</pre>"
        )


def layout_report(builders: Sequence[ProgramBuilder]) -> LayoutReport:
    """Returns where parameters and caches are; no array is needed.

    Args:
        builders: One an engine, of the same layout; the parameters shown are the first's.
    """
    first = builders[0]
    return LayoutReport(
        first.sharder.layout,
        tuple(_of(leaf) for leaf in first.model.leaves),
        _by_device([shape for builder in builders for shape in builder.model.shapes]),
        _by_device([c for b in builders for c in jax.tree.leaves(b.state_shapes().caches)]),
    )


def _of(leaf: Leaf) -> ParameterLayout:
    shape = leaf.shape
    return ParameterLayout(leaf.path, leaf.axes, shape.shape, shape.dtype.name, shape.sharding)


def _by_device(shapes: Sequence[jax.ShapeDtypeStruct]) -> dict[int, int]:
    held: dict[int, int] = {}
    for shape in shapes:
        shard = jax.ShapeDtypeStruct(shape.sharding.shard_shape(shape.shape), shape.dtype)
        for device in sorted(shape.sharding.device_set, key=lambda device: device.id):
            held[device.id] = held.get(device.id, 0) + shard.size * shard.dtype.itemsize
    return held


def _row(one: ParameterLayout, times: int) -> tuple[str, ...]:
    over = [*one.spec, *(None for _ in one.shape)]
    split = ", ".join(
        f"{axis or '-'}@{'+'.join((names,) if isinstance(names, str) else names)}"
        if names
        else axis or "-"
        for axis, names in zip(one.axes, over, strict=False)
    )
    num_devices, num_pieces = one.sharding.mesh.size, len(one.picture.pieces)
    where = (
        "on one device"
        if num_devices == 1
        else f"replicated on {num_devices}"
        if one.is_replicated
        else f"split in {num_pieces}"
        + (f", each on {num_devices // num_pieces}" if num_pieces < num_devices else "")
    )
    shard = "x".join(map(str, one.shard_shape))
    shape = f"{one.dtype} {'x'.join(map(str, one.shape))}"
    return (one.path, str(times), shape, split, shard, f"{one.num_bytes:,}", where)
