"""Reads safetensors checkpoints straight into sharded parameters.

Each shard of each parameter is filled from memory-mapped files by the slices it
needs, cast on the way, and given to its device. The host never holds more than
the shards in flight. A family says only which tensors make which parameter
(`Weight`); shapes and places come from the parameter itself (`abstract.Leaf`).
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.hub import JSON_ERRORS

if TYPE_CHECKING:
    from jaxllm.modeling.abstract import AbstractModel, Leaf

# safetensors' names of element types: https://huggingface.co/docs/safetensors
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100 << 20
"""Bytes; a longer header is a corrupt file (the format's own limit)."""

IN_FLIGHT = 1 << 28
"""Bytes of parameters that may be on their way to the devices at once."""


class Weight:
    """One line of a family's table: the tensors that make one parameter."""

    def __init__(
        self,
        names: str | Sequence[str],
        path: str,
        transform: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        interleaved: bool = False,
    ) -> None:
        """Declares the line.

        Args:
            names: In the checkpoint; `{i}` is the layer. Several are the parts of
                a fused parameter, in its order; one that is fused itself holds all
                parts, one after the other along its outputs.
            path: Of the parameter, with the same `{i}`.
            transform: Applied to each tensor before its shape is checked; must
                return a view, so that slices stay cheap, and undo itself: a
                transpose, say.
            interleaved: The one tensor holds the parts in the parameter's own order:
                queries, key and value of a KV head, then those of the next.
        """
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.path = path
        self.transform = transform
        self.interleaved = interleaved

    def stored(self, leaf: Leaf) -> Leaf:
        """Returns the parameter as the tensors divide it: not, if they are interleaved."""
        return replace(leaf, parts=(), part_axis=0) if self.interleaved else leaf


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor of a checkpoint lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    def view(self) -> np.ndarray:
        """Returns the tensor, mapped and not read."""
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape)


class Checkpoint:
    """The tensors of a folder of safetensors files, by name; nothing is read yet."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers.

        Raises:
            CheckpointError: There are no such files, or one is damaged.
        """
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        for file in weight_files(folder):
            for name, tensor in read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{name!r} is both in {self.tensors[name].file.name} and in {file.name} of "
                        f"{str(folder)!r}. Delete the file that does not belong to the model."
                    )
                self.tensors[name] = tensor

    def find(self, name: str) -> str | None:
        """Returns the name that a tensor has here, if it is here.

        A checkpoint saved without the output head lacks the first part of most names:
        `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`.
        """
        short = name.partition(".")[2]
        return next((n for n in (name, short) if n in self.tensors), None)

    def dtype(self) -> str:
        """Returns safetensors' name of the element type that most bytes have."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in FLOATS:
                size = math.prod(tensor.shape) * np.dtype(DTYPES[tensor.dtype]).itemsize
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + size
        return max(sizes, key=lambda name: sizes[name], default="F32")


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint, as its index says if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = folder.glob("*.safetensors")
    files = sorted(p for p in found if p.is_file() and not p.name.startswith("adapter"))
    if files:
        return files
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    reason = (
        f"It has {pickles[:3]}, which are pickles: opening one can run any code, so jaxllm "
        "does not. Save the model again with `model.save_pretrained(path)`."
        if pickles
        else "Give a folder with *.safetensors beside its config.json."
    )
    raise CheckpointError(f"Cannot find any model weights with `{folder}`. {reason}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        strangers = [name for name in names if Path(name).name != name or name == ".."]
    except (KeyError, AttributeError, TypeError, *JSON_ERRORS) as error:
        raise CheckpointError(
            f"{str(index)!r} is not a weight index ({error!r}). Download the file again."
        ) from error
    if strangers:
        raise CheckpointError(
            f"{str(index)!r} points outside its folder: {strangers}. "
            "A weight index names files beside it; do not use this checkpoint."
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{str(index.parent)!r} lacks {missing}, which its index names. Download them."
        )
    return [index.parent / name for name in names]


def read_header(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of one safetensors file.

    The format is 8 bytes of header length (little endian), that many bytes of
    JSON, then the data; https://huggingface.co/docs/safetensors#format.

    Raises:
        CheckpointError: The file is cut off or its header makes no sense.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
        if length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{str(file)!r} is no safetensors file, or is cut off: it has {size:,} bytes and "
                "its header does not fit in them. Download it again."
            )
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        return {name: _tensor(file, name, e, 8 + length, size) for name, e in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"The header of {str(file)!r} is damaged ({error!r}). Download the file again."
        ) from error


def _tensor(file: Path, name: str, entry: Mapping[str, Any], base: int, size: int) -> Tensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"{name!r} has the shape {list(shape)}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{name!r} in {str(file)!r} has the element type {dtype}, which jaxllm does not read. "
            f"It reads {sorted(DTYPES)}."
        )
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize or begin < 0:
        raise CheckpointError(
            f"The header of {str(file)!r} is damaged: {name!r} is {dtype}{list(shape)} and has "
            f"{end - begin} bytes. Download the file again."
        )
    if base + end > size:
        raise CheckpointError(
            f"{str(file)!r} is cut off: {name!r} ends at byte {base + end:,} and the file has "
            f"{size:,}. Download it again."
        )
    return Tensor(file, dtype, shape, base + begin)


@dataclass(frozen=True, slots=True)
class Source:
    """A parameter and the tensors it is filled from."""

    leaf: Leaf
    tensors: tuple[Tensor, ...]
    transform: Callable[[np.ndarray], np.ndarray] | None

    def parts(self) -> list[np.ndarray]:
        """Returns views of the tensors, each in the shape of its part, copies and padding apart."""
        views = [tensor.view() for tensor in self.tensors]
        if self.transform:
            views = [self.transform(view) for view in views]
        shapes = held_shapes(self.leaf)
        if len(views) == 1:
            sizes = [stored_shape(shape, self.leaf.num_in)[0] for shape in shapes]
            views = np.split(views[0], np.cumsum(sizes)[:-1])
        return [v.reshape(s) for v, s in zip(views, shapes, strict=True)]

    def read(
        self, index: tuple[slice, ...] | None, zeros: Callable[..., np.ndarray] = np.zeros
    ) -> np.ndarray:
        """Returns one shard of the parameter, in its dtype; all of it for None.

        `zeros` is where it shall lie: of a shape and dtype, as `np.zeros`.
        """
        full = self.leaf.shape.shape
        bounds = [
            s.indices(n)[:2] for s, n in zip(index or (slice(None),) * len(full), full, strict=True)
        ]
        shard = zeros(tuple(stop - start for start, stop in bounds), self.leaf.shape.dtype)
        axis, at = self.leaf.part_axis, 0
        for part, copies in zip(self.parts(), copies_of(self.leaf), strict=True):
            size = part.shape[axis] if part.ndim else 1
            start, stop = max(bounds[axis][0], at), min(bounds[axis][1], at + size)
            if start < stop:
                take: list[Any] = [slice(*b) for b in bounds]
                put = [slice(None)] * len(bounds)
                if copies > 1:
                    take[0] = np.arange(*bounds[0]) // copies
                take[axis] = slice(start - at, stop - at)
                put[axis] = slice(start - bounds[axis][0], stop - bounds[axis][0])
                shard[tuple(put)] = part[tuple(take)]
            at += size
        return shard


def part_shapes(leaf: Leaf) -> list[tuple[int, ...]]:
    """Returns the shape of each part within the parameter."""
    shape, axis = leaf.shape.shape, leaf.part_axis
    if not leaf.parts:
        return [shape]
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in leaf.parts]


def copies_of(leaf: Leaf) -> tuple[int, ...]:
    """Returns for each part how often a tensor's row comes in the parameter."""
    return leaf.copies or (1,) * max(1, len(leaf.parts))


def held_shapes(leaf: Leaf) -> list[tuple[int, ...]]:
    """Returns the shape of each part as a checkpoint has it: one of the copies, no padding."""
    shapes = zip(part_shapes(leaf), copies_of(leaf), strict=True)
    return [((s[0] - leaf.padding) // copies, *s[1:]) if s else s for s, copies in shapes]


def stored_shape(part: tuple[int, ...], num_in: int) -> tuple[int, ...]:
    """Returns the shape a part has in a checkpoint: [out, in], or flat for a bias."""
    if num_in == 0:
        return (math.prod(part),)
    split = len(part) - num_in
    return (math.prod(part[:split]), math.prod(part[split:]))


def stored_shapes(leaf: Leaf, num_tensors: int) -> list[tuple[int, ...]]:
    """Returns the shapes of a parameter's tensors in a checkpoint, transforms undone."""
    shapes = [stored_shape(part, leaf.num_in) for part in held_shapes(leaf)]
    if num_tensors == 1:
        return [(sum(shape[0] for shape in shapes), *shapes[0][1:])]
    return shapes


def match(
    model: AbstractModel,
    checkpoint: Checkpoint,
    table: Sequence[Weight],
    ignored: Sequence[str] = (),
) -> list[Source]:
    """Finds the tensors of every parameter; reads none of them.

    Raises:
        CheckpointError: Some parameter has no tensor, some tensor has no parameter,
            or a shape is wrong. All of them are listed.
    """
    lines = {line.path: line for line in table}
    sources, used, absent, problems = [], set(), [], []
    for leaf in model.leaves:
        line = lines.get(re.sub(r"\.\d+\.", ".{i}.", leaf.path))
        layer = re.search(r"\.(\d+)\.", leaf.path)
        names = [n.format(i=layer[1] if layer else "") for n in line.names] if line else []
        found = [name for name in map(checkpoint.find, names) if name]
        missing = [name for name in names if not checkpoint.find(name)]
        used.update(found)
        if line is None:
            problems.append(f"no line of the weight table fills {leaf.path!r}")
        elif missing:
            absent += [f"{name!r} is missing" for name in missing]
        else:
            tensors = tuple(checkpoint.tensors[name] for name in found)
            source = Source(line.stored(leaf), tensors, line.transform)
            problems += _wrong_shapes(source, found)
            sources.append(source)
    extra = [
        name
        for name in checkpoint.tensors
        if name not in used and not any(fnmatch.fnmatch(name, p) for p in ignored)
    ]
    problems += [f"There is no module or parameter named {name!r}" for name in extra]
    if absent:
        absent[0] = f"Following weights were not initialized from checkpoint: {absent[0]}"
    problems = absent + problems
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise CheckpointError(
            f"The checkpoint in {str(checkpoint.folder)!r} does not fit its config.json "
            f"({len(problems)} problems): {shown}. Nothing was loaded."
        )
    return sources


def _wrong_shapes(source: Source, names: Sequence[str]) -> list[str]:
    problems = []
    wanted = stored_shapes(source.leaf, len(names))
    for name, tensor, want in zip(names, source.tensors, wanted, strict=True):
        have = _shape(source, tensor)
        if have != want:
            problems.append(f"{name!r} has shape {list(have)} and the config asks for {list(want)}")
        if tensor.dtype not in FLOATS:
            problems.append(f"{name!r} has element type {tensor.dtype} and must be one of {FLOATS}")
    return problems


def _shape(source: Source, tensor: Tensor) -> tuple[int, ...]:
    """Returns a tensor's shape after the transform; as stored where that needs more axes."""
    if source.transform is None:
        return tensor.shape
    try:
        return source.transform(np.broadcast_to(np.int8(0), tensor.shape)).shape
    except (ValueError, IndexError):  # of which NumPy's AxisError is both
        return tensor.shape


def load(
    sources: Sequence[Source],
    report: Callable[[int], object],
    zeros: Callable[..., np.ndarray] = np.zeros,
) -> tuple[jax.Array, ...]:
    """Fills every parameter, shard by shard.

    Args:
        sources: One for each leaf, of `match`.
        report: Called with the bytes of each parameter as it is handed over.
        zeros: Where shards shall lie on the host, as for `Source.read`.

    Returns:
        The parameters, in the order of `sources`, on their devices.
    """
    params, waiting, in_flight = [], [], 0
    # Never more than the largest parameter, which must fit beside the others anyway.
    most = min(IN_FLIGHT, max(source.leaf.num_bytes for source in sources))
    for source in sources:
        leaf, shards = source.leaf, []
        for index, devices in shards_of(leaf.shape.shape, leaf.shape.sharding):
            value = source.read(index, zeros)
            if in_flight + value.nbytes > most:
                jax.block_until_ready(waiting)
                waiting, in_flight = [], 0
            placed = [jax.device_put(value, device) for device in devices]
            shards += placed
            waiting += placed
            in_flight += value.nbytes
        shape = leaf.shape
        param = jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, shards)
        params.append(param)
        report(leaf.num_bytes)
    jax.block_until_ready(waiting)
    return tuple(params)


def shards_of(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> list[tuple[tuple[slice, ...], list[jax.Device]]]:
    """Returns the shards that this process needs, each with the devices that have it."""
    found: dict[tuple, tuple[tuple[slice, ...], list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or (slice(None),) * len(shape)
        key = tuple((s.start, s.stop) for s in index)
        found.setdefault(key, (index, []))[1].append(device)
    return list(found.values())


def ties_differ(checkpoint: Checkpoint, head: str, embedding: str) -> bool:
    """Whether a checkpoint holds an output head of its own beside the embedding."""
    found = [checkpoint.tensors[n].view() for n in map(checkpoint.find, (head, embedding)) if n]
    if len(found) < 2:
        return False
    one, other = found
    if one.shape != other.shape:
        return True
    rows = max(1, (8 << 20) // max(1, one[0].nbytes))  # compared 8 MB at a time
    return any(
        not np.array_equal(one[i : i + rows], other[i : i + rows])
        for i in range(0, one.shape[0], rows)
    )
