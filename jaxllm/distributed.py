"""Several processes: joining a job of `jax.distributed`, and what its processes tell each other.

JAX has the engine for several hosts already: after `initialize`, `jax.devices()` are those of
all processes, and arrays span them. Here are the way in, with sentences for what goes wrong, and
the one adapter to the job's key-value store, which JAX keeps for itself.
"""

import atexit
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxllm import logs
from jaxllm.errors import ConfigError, DistributedError

HEARTBEAT = 20
"""Seconds after which a process that says nothing is taken for dead."""

BEATS = 10
"""Times that a process says that it is alive in that time."""

JAX_HEARTBEAT = 3
"""How many times as long JAX waits before it ends the others at once. Its clock runs from the
last heartbeat, which may be half of that before the death."""

LEFT = "left"
"""What a process says of itself when its script ends."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    cluster_detection_method: str | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout_seconds: int = HEARTBEAT,
) -> None:
    """Joins the job; the first thing that every process of it does.

    A thin layer over `jax.distributed.initialize`. Under SLURM, Open MPI and on Kubernetes JAX
    finds the first three arguments by itself. Log lines and progress bars are shown by process 0;
    `jaxllm.set_verbosity` afterwards changes that.

    Args:
        coordinator_address: "host:port" of process 0; any free port.
        num_processes: Of the whole job.
        process_id: Of this process, from 0.
        local_device_ids: The devices of this host that are this process's; all by default, and
            one under SLURM and Open MPI.
        cluster_detection_method: Where JAX is to look, such as "slurm"; "deactivate": nowhere.
        initialization_timeout: Seconds to wait for the other processes.
        heartbeat_timeout_seconds: Seconds after which a process that says nothing is taken for
            dead, and those that wait for it raise `DistributedError`. After three times as long
            JAX ends them, whatever they do.

    Raises:
        ConfigError: An argument is wrong, or is missing and no cluster tells it.
        DistributedError: It is too late, or the others could not be reached.

    Example:
        >>> jaxllm.distributed.initialize("10.0.0.1:4321", num_processes=2, process_id=0)
    """
    _check_address(coordinator_address)
    _check_count("num_processes", num_processes, 1)
    _check_count("process_id", process_id, 0)
    _check_count("initialization_timeout", initialization_timeout, 1)
    _check_count("heartbeat_timeout_seconds", heartbeat_timeout_seconds, 2)
    if process_id is not None and num_processes is not None and process_id >= num_processes:
        raise ConfigError(
            f"process_id={process_id} must be less than num_processes={num_processes}: ids are "
            f"from 0 to {num_processes - 1}."
        )
    if jax.distributed.is_initialized():
        raise DistributedError(
            "This process has joined a job already. Call jaxllm.distributed.initialize once, at "
            "the top of the script; in a notebook, restart the kernel."
        )
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=local_device_ids,
            cluster_detection_method=cluster_detection_method,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=JAX_HEARTBEAT * heartbeat_timeout_seconds,
        )
    except jax.errors.JaxRuntimeError as error:  # a RuntimeError too
        raise DistributedError(
            f"The {num_processes or 'other'} processes did not meet at "
            f"{coordinator_address or 'the coordinator'} within {initialization_timeout} s "
            f"({first_line(error)}). Start all of them, check that process 0 is at that address "
            "and that its port is open, or raise initialization_timeout."
        ) from error
    except RuntimeError as error:
        raise DistributedError(
            "jaxllm.distributed.initialize came too late: JAX has started on this process's own "
            "devices. Call it before LLM(...) and before any other use of JAX, jax.devices() "
            "included."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"No cluster was found that tells the missing arguments ({first_line(error)}). Pass "
            "coordinator_address='host:port' of process 0, num_processes= and process_id=, or "
            "start the script with srun or mpirun."
        ) from error
    _Pulse.start(heartbeat_timeout_seconds)
    state = _state()
    if state.process_id:
        logs.set_verbosity("quiet")
    logs.configure().info(
        "process %d of %d, coordinator at %s",
        state.process_id,
        state.num_processes,
        state.coordinator_address,
    )


def _check_address(address: str | None) -> None:
    if address is None:
        return
    port = address.rpartition(":")[2] if isinstance(address, str) else ""
    is_port = port.isdecimal() and 0 < int(port) < 1 << 16
    if not is_port or address.startswith(":") or "://" in address:
        raise ConfigError(
            f"coordinator_address={address!r} must be 'host:port' of process 0, such as "
            "'10.0.0.1:4321'."
        )


def _check_count(name: str, value: Any, least: int) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or value < least
    ):
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}.")


def first_line(error: Exception) -> str:
    """Returns the first line of what an error of JAX says, without its last stop."""
    return str(error).partition("\n")[0].rstrip(".")


# -------------------------------------------------------------------- arrays


def local_devices(mesh: Mesh) -> list[jax.Device]:
    """Returns the devices of a mesh that this process can ask; all where none is its own."""
    devices = list(mesh.devices.flat)
    if jax.process_count() == 1:
        return devices
    return [d for d in devices if d.process_index == jax.process_index()] or devices


def put(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """Returns an array of a value that every process has.

    `device_put` would compare the value over all processes first, by a collective.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


# -------------------------------------------------------------------- the store


class Store:
    """The job's key-value store, which process 0 holds; it is for words, not for arrays."""

    def __init__(self) -> None:
        self._client = _state().client

    def put(self, key: str, value: str) -> None:
        """Writes a value, over another if there is one."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str, seconds: float = 0) -> str | None:
        """Returns a value, or None if there is none within these seconds."""
        try:
            if seconds:
                return self._client.blocking_key_value_get(key, int(seconds * 1000))
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith(("NOT_FOUND", "DEADLINE_EXCEEDED")):
                return None
            raise

    def delete(self, folder: str) -> None:
        """Removes the values of all keys below."""
        self._client.key_value_delete(folder)


def _state() -> Any:
    """JAX's record of the job. Not of its public interface, and nothing there has the store."""
    from jax._src import distributed

    return distributed.global_state


class _Pulse:
    """Says in the store that this process is alive, and that it has left when its script ends.

    JAX does the like, and ends a process at once when another is lost; this is to know earlier,
    and to raise something that a script can catch.
    """

    timeout: float = HEARTBEAT  # of the whole process, like the job itself
    running: bool = False

    @classmethod
    def start(cls, timeout: float = HEARTBEAT) -> None:
        """Starts the thread that says so, once a process."""
        if cls.running:
            return
        cls.running, cls.timeout = True, timeout
        store, key, done = Store(), beat_key(_state().process_id), threading.Event()

        def beat() -> None:
            count = 0
            while not done.is_set():
                try:
                    store.put(key, str(count))
                except jax.errors.JaxRuntimeError:  # process 0 is gone, and JAX ends this one
                    return
                count += 1
                done.wait(cls.timeout / BEATS)

        thread = threading.Thread(target=beat, name="jaxllm-pulse", daemon=True)

        def leave() -> None:
            done.set()
            thread.join()
            try:
                store.put(key, LEFT)
            except jax.errors.JaxRuntimeError:
                return  # nobody is there to be told

        thread.start()
        # Before JAX's own leave of the job, in which it waits for the others.
        atexit.register(leave)


def beat_key(process: int) -> str:
    """Returns the key under which a process says that it is alive."""
    return f"jaxllm/beat/{process}"


def patience() -> float:
    """Returns the seconds after which a process that says nothing is given up."""
    _Pulse.start()  # where the script called jax.distributed.initialize itself
    return _Pulse.timeout
