"""Sharded checkpoints: parameters as they are on the devices, and back.

The one file that knows Orbax, which writes them, and TensorStore, in whose format it does;
both are imported when they are needed. Arrays are written in their bare form (`forms`), so
that any layout can read them, and in pieces small enough that a device reads little more
than its shard.

Orbax reads them too, but all at once: pieces, shards on the host and shards on the devices
of a parameter together, and when one read fails it leaves the others running.
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
from jaxllm.modeling.weights import shards_of

CHUNK = 8 << 20
"""Bytes of a piece in the file, which is read whole or not at all."""

CONTEXT = {"cache_pool": {"total_bytes_limit": 32 << 20}}
"""Of TensorStore: room for the index of the pieces, which is read again and again without."""


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
    """Reads parameters straight to their shards, one after the other.

    Args:
        folder: That `save` wrote to.
        model: Under any layout.
        manifest: Of the folder.
        report: Called with the bytes of each parameter as it is handed over.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    import tensorstore as ts

    context = ts.Context(CONTEXT)
    params: list[jax.Array] = []
    for leaf in model.leaves:
        try:
            array = _read(folder / PARAMS, leaf, context)
        except ValueError as error:
            reason = str(error).strip().splitlines() or [repr(error)]
            raise CheckpointError(
                f"The arrays in {str(folder / PARAMS)!r} cannot be read: {reason[0][:300]} "
                "(from TensorStore). Copy or save the folder again."
            ) from error
        if checksum(array) != manifest.parameters[leaf.path]["checksum"]:
            raise CheckpointError(
                f"{leaf.path!r} in {str(folder / PARAMS)!r} is damaged: its values are "
                "not those that were saved. Copy or save the folder again."
            )
        params.append(to_dressed(leaf, array).block_until_ready())
        report(leaf.num_bytes)
    return tuple(params)


def _read(folder: Path, leaf: Leaf, context: Any) -> jax.Array:
    """Returns the bare form; the host holds no more than two of its shards at once."""
    import tensorstore as ts

    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    files = {"driver": "ocdbt", "base": base, "path": f"{leaf.path}/"}
    # A piece that is missing is an error, and not zeros.
    spec = {"driver": "zarr", "kvstore": files, "fill_missing_data_reads": False}
    stored = ts.open(spec, read=True, open=True, context=context).result()
    shape, sharding = bare_shape(leaf), bare_sharding(leaf)
    placed: list[jax.Array] = []
    for index, devices in shards_of(shape, sharding):
        value = stored[index].read().result()
        jax.block_until_ready(placed)
        placed += [jax.device_put(value, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Weights hardly shrink, and a device's slice of a compressed piece costs all of it.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=1, use_compression=False)
    )
