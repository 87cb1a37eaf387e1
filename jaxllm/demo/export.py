"""Writes parameters as a Hugging Face checkpoint: the inverse of `modeling.weights`."""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxllm.errors import CheckpointError
from jaxllm.modeling.abstract import AbstractModel, Leaf
from jaxllm.modeling.weights import Weight, copies_of, part_shapes, stored_shape


def to_checkpoint(
    model: AbstractModel, params: Sequence[jax.Array], table: Sequence[Weight]
) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint by name, in the parameters' dtype.

    Args:
        model: Its leaves say how fused parameters divide.
        params: One for each leaf, in order.
        table: The family's `WEIGHTS`.

    Raises:
        CheckpointError: A leaf has no line in the table.
    """
    lines = {line.path: line for line in table}
    tensors: dict[str, np.ndarray] = {}
    for leaf, param in zip(model.leaves, params, strict=True):
        layer = re.search(r"\.(\d+)\.", leaf.path)
        line = lines.get(re.sub(r"\.\d+\.", ".{i}.", leaf.path))
        if line is None:
            raise CheckpointError(
                f"{leaf.path!r} cannot be written: the weight table has no line for it. "
                "Give the table of the model's own family."
            )
        names = [name.format(i=layer[1] if layer else "") for name in line.names]
        parts = _split(line.stored(leaf), np.asarray(param))
        if len(names) == 1:
            parts = [np.concatenate(parts)]
        undo = line.transform or (lambda part: part)
        tensors |= zip(names, map(undo, parts), strict=True)
    return tensors


def _split(leaf: Leaf, value: np.ndarray) -> list[np.ndarray]:
    """Returns the parts as a checkpoint has them: one of the copies, no padding."""
    axis = leaf.part_axis
    ends = np.cumsum([part[axis] for part in part_shapes(leaf)])
    parts = np.split(value, ends[:-1], axis=axis)
    parts = [part[: len(part) - leaf.padding] if leaf.padding else part for part in parts]
    parts = [part[::copies] for part, copies in zip(parts, copies_of(leaf), strict=True)]
    return [part.reshape(stored_shape(part.shape, leaf.num_in)) for part in parts]


def save_weights(tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Writes model.safetensors in bfloat16; readers see the old file or the new one, whole."""
    rounded = {
        name: np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16))
        for name, tensor in tensors.items()
    }
    unfinished = folder / "model.safetensors.tmp"
    save_file(rounded, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors makes files that only their owner can read
    unfinished.replace(folder / "model.safetensors")
