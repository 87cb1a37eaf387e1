"""Sharded checkpoints: parameters as they are on the devices, and back.

The one file that knows Orbax, which writes them, and TensorStore, in whose format it does;
both are imported when they are needed. Arrays are written in their bare form (`forms`), so
that any layout can read them, and in pieces small enough that a device reads little more
than its shard.

Orbax reads them too, but all at once: pieces, shards on the host and shards on the devices
of a parameter together, and when one read fails it leaves the others running.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxllm.errors import CheckpointError
from jaxllm.modeling.abstract import AbstractModel, Leaf
from jaxllm.modeling.forms import bare_shape, bare_sharding, to_bare, to_dressed
from jaxllm.modeling.manifest import PARAMS, Manifest
from jaxllm.modeling.weights import shards_of
from jaxllm.peers import Peers

CHUNK = 8 << 20
"""Bytes of a piece in the file, which is read whole or not at all."""

CONTEXT = {
    "cache_pool": {"total_bytes_limit": 32 << 20},
    "file_io_concurrency": {"limit": 2},
    "data_copy_concurrency": {"limit": 2},
}
"""Of TensorStore: room for the index of the pieces, which is read again and again without; and
few threads, as the allocator keeps for each what it has read."""

SUMMED_AT_ONCE = 1 << 20
"""Elements of a shard whose checksum is computed together."""

MODULUS = 1 << 32
"""Of checksums."""


def checksum(x: jax.Array) -> int:
    """Returns this process's part of a number that every change of a value changes.

    The sum of each element's bits times an odd number of its own, modulo 2^32: exact in any
    order, so that no layout matters, and the parts of several processes are just added.

    Args:
        x: With a `NamedSharding`.
    """
    sums = _sums(x.sharding, x.shape)(x)
    firsts = {shard.device for shard in x.addressable_shards if shard.replica_id == 0}
    parts = [np.asarray(shard.data) for shard in sums.addressable_shards if shard.device in firsts]
    return int(sum(int(part[0]) for part in parts) % MODULUS)


@functools.lru_cache(maxsize=64)
def _sums(sharding: NamedSharding, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Returns the program that sums up each device's shard."""
    mesh, spec = sharding.mesh, (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))

    def add_up(x: jax.Array) -> jax.Array:
        begins = [
            jax.lax.axis_index(names).astype(jnp.uint32) * size if names else 0
            for names, size in zip(spec, x.shape, strict=True)
        ]
        lead, width = x.shape[:-1], x.shape[-1]
        rows = x.reshape(-1, width)
        # XLA:CPU writes down what it sums, so that is a few rows at a time.
        at_once = min(max(1, SUMMED_AT_ONCE // width), rows.shape[0])
        trips, rest = divmod(rows.shape[0], at_once)

        def sum_of(first: jax.Array | int, count: int) -> jax.Array:
            some = jax.lax.dynamic_slice_in_dim(rows, first, count)
            bits = jax.lax.bitcast_convert_type(some, f"uint{8 * x.dtype.itemsize}")
            local = jnp.unravel_index(first + jnp.arange(count), lead) if lead else []
            place = jnp.zeros(count, jnp.uint32)
            for index, begin, size in zip(local, begins, shape, strict=False):
                place = place * jnp.uint32(size) + begin + index.astype(jnp.uint32)
            across = begins[-1] + jnp.arange(width, dtype=jnp.uint32)
            place = place[:, None] * jnp.uint32(shape[-1]) + across[None, :]
            # Multiplied, so that neighbours have factors far apart (Knuth's, of the golden ratio).
            factor = (place * jnp.uint32(2654435761) << jnp.uint32(1)) | jnp.uint32(1)
            return jnp.sum(bits.astype(jnp.uint32) * factor, dtype=jnp.uint32)

        last = sum_of(trips * at_once, rest) if rest else jnp.zeros((), jnp.uint32)
        total = jax.lax.fori_loop(0, trips, lambda i, t: t + sum_of(i * at_once, at_once), last)
        return total[None]

    each = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        add_up, mesh=mesh, in_specs=sharding.spec, out_specs=each, check_vma=False
    )
    return jax.jit(mapped)


def _whole(peers: Peers, parts: Sequence[int]) -> list[int]:
    """Returns the checksums that the processes' parts add up to."""
    told = [json.loads(text) for text in peers.gather("add up checksums", json.dumps(parts))]
    return [sum(column) % MODULUS for column in zip(*told, strict=True)]


def save(
    folder: Path, model: AbstractModel, params: Sequence[jax.Array], peers: Peers
) -> dict[str, int]:
    """Writes parameters below a folder; nothing else may be there of that name.

    Args:
        folder: Gets a folder of arrays.
        model: The parameters' structure.
        params: One for each leaf, in order.
        peers: The processes that hold them, all of which call this.

    Returns:
        The checksum of each parameter by path.
    """
    import orbax.checkpoint as ocp

    pairs = zip(model.leaves, params, strict=True)
    arrays = {leaf.path: to_bare(leaf, param) for leaf, param in pairs}
    how = {path: ocp.SaveArgs(chunk_byte_size=CHUNK) for path in arrays}
    with _checkpointer(params[0].sharding) as checkpointer:
        checkpointer.save(folder / PARAMS, args=ocp.args.PyTreeSave(arrays, save_args=how))
    sums = _whole(peers, [checksum(array) for array in arrays.values()])
    return dict(zip(arrays, sums, strict=True))


def restore(
    folder: Path,
    model: AbstractModel,
    manifest: Manifest,
    report: Callable[[int], object],
    peers: Peers,
    move: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """Reads parameters straight to their shards, one after the other.

    Args:
        folder: That `save` wrote to.
        model: Under any layout.
        manifest: Of the folder.
        report: Called with the bytes of each parameter as it is handed over.
        peers: The processes that have the model's devices, all of which call this.
        move: Where each parameter shall lie; None: where JAX puts it.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    import tensorstore as ts

    context = ts.Context(CONTEXT)
    params: list[jax.Array] = []
    parts: list[int] = []
    for leaf in model.leaves:
        try:
            array = _read(folder / PARAMS, leaf, context)
        except ValueError as error:
            reason = str(error).strip().splitlines() or [repr(error)]
            raise CheckpointError(
                f"The arrays in {str(folder / PARAMS)!r} cannot be read: {reason[0][:300]} "
                "(from TensorStore). Copy or save the folder again."
            ) from error
        parts.append(checksum(array))
        value = to_dressed(leaf, array).block_until_ready()
        params.append(value if move is None else move(value))
        report(leaf.num_bytes)
    for leaf, found in zip(model.leaves, _whole(peers, parts), strict=True):
        if found != manifest.parameters[leaf.path]["checksum"]:
            raise CheckpointError(
                f"{leaf.path!r} in {str(folder / PARAMS)!r} is damaged: its values are "
                "not those that were saved. Copy or save the folder again."
            )
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


def _checkpointer(sharding: Sharding) -> Any:
    """Returns what writes arrays of this sharding: the processes of its devices, together."""
    import orbax.checkpoint as ocp

    processes = sorted({device.process_index for device in sharding.device_set})
    among = ocp.options.MultiprocessingOptions(
        primary_host=processes[0],
        active_processes=set(processes) if jax.process_count() > 1 else None,
    )
    # Weights hardly shrink, and a device's slice of a compressed piece costs all of it.
    handler = ocp.PyTreeCheckpointHandler(
        save_device_host_concurrent_gb=1, use_compression=False, multiprocessing_options=among
    )
    return ocp.Checkpointer(handler, multiprocessing_options=among)
