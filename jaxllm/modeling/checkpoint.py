"""Sharded checkpoints by Orbax: parameters as they are on the devices, and back.

The one file that knows Orbax, and it imports it when it is needed. Arrays are written in
their bare form (`forms`), so that any layout can read them, and in pieces small enough
that a device reads little more than its shard.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import CheckpointError
from jaxllm.modeling.abstract import AbstractModel, Leaf
from jaxllm.modeling.forms import bare_shape, bare_sharding, to_bare, to_dressed
from jaxllm.modeling.manifest import PARAMS, Manifest

CHUNK = 8 << 20
"""Bytes of a piece in the file, which is read whole or not at all."""

IN_FLIGHT = 1 << 28
"""Bytes that are restored at once, if no parameter is larger."""


def checksum(x: jax.Array) -> int:
    """Returns a number that every change of a value changes, whatever devices hold the array.

    The sum of each element's bits times an odd number of its own, modulo 2^32: exact in any
    order, so that no layout matters.
    """
    return int(_checksum(x))


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Multiplied, so that neighbours have factors far apart (Knuth's, of the golden ratio).
    factor = (place * jnp.uint32(2654435761) << jnp.uint32(1)) | jnp.uint32(1)
    return jnp.sum(bits * factor, dtype=jnp.uint32)


def save(folder: Path, model: AbstractModel, params: Sequence[jax.Array]) -> dict[str, int]:
    """Writes parameters below a folder; nothing else may be there of that name.

    Args:
        folder: Gets a folder of arrays.
        model: The parameters' structure.
        params: One for each leaf, in order.

    Returns:
        The checksum of each parameter by path.
    """
    import orbax.checkpoint as ocp

    pairs = zip(model.leaves, params, strict=True)
    arrays = {leaf.path: to_bare(leaf, param) for leaf, param in pairs}
    how = {path: ocp.SaveArgs(chunk_byte_size=CHUNK) for path in arrays}
    with _checkpointer() as checkpointer:
        checkpointer.save(folder / PARAMS, args=ocp.args.PyTreeSave(arrays, save_args=how))
    return {path: checksum(array) for path, array in arrays.items()}


def restore(
    folder: Path, model: AbstractModel, manifest: Manifest, report: Callable[[int], object]
) -> tuple[jax.Array, ...]:
    """Reads parameters straight to their shards.

    Args:
        folder: That `save` wrote to.
        model: Under any layout.
        manifest: Of the folder.
        report: Called with the bytes of parameters as they are handed over.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    params: list[jax.Array] = []
    with _checkpointer() as checkpointer:
        for leaves in groups(model.leaves):
            try:
                arrays = _read(checkpointer, folder / PARAMS, leaves)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # Orbax raises no narrower one where a file is damaged
                reason = str(error.__cause__ or error).strip().splitlines() or [repr(error)]
                raise CheckpointError(
                    f"The arrays in {str(folder / PARAMS)!r} cannot be read: {reason[0][:300]} "
                    "(from Orbax). Copy or save the folder again."
                ) from error
            for leaf in leaves:
                array = arrays.pop(leaf.path)
                if checksum(array) != manifest.parameters[leaf.path]["checksum"]:
                    raise CheckpointError(
                        f"{leaf.path!r} in {str(folder / PARAMS)!r} is damaged: its values are "
                        "not those that were saved. Copy or save the folder again."
                    )
                params.append(to_dressed(leaf, array).block_until_ready())
                report(leaf.num_bytes)
    return tuple(params)


def groups(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """Divides parameters into groups of few bytes, in order."""
    found: list[list[Leaf]] = [[]]
    for leaf in leaves:
        if found[-1] and sum(x.num_bytes for x in found[-1]) + leaf.num_bytes > IN_FLIGHT:
            found.append([])
        found[-1].append(leaf)
    return found


def _read(checkpointer: Any, folder: Path, leaves: Sequence[Leaf]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    shapes = {
        leaf.path: jax.ShapeDtypeStruct(
            bare_shape(leaf), leaf.shape.dtype, sharding=bare_sharding(leaf)
        )
        for leaf in leaves
    }
    how = ocp.checkpoint_utils.construct_restore_args(shapes)
    args = ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=True)
    return checkpointer.restore(folder, args=args)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Weights hardly shrink, and a device's slice of a compressed piece costs all of it.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=1, use_compression=False)
    )
