"""The processes that share one engine: that they do the same, and that all are there.

Every process plans its own steps. What it plans follows from its requests and from the tokens
sampled, which all processes read, so the plans are the same, unless somebody passed other
prompts, pressed Ctrl-C in one process, or died. A collective that one process does not join
hangs, or gives nonsense. So each process says what it does, event by event, and reads what the
next one says, in a ring, while the devices compute.

A difference is final: what is on the devices cannot be called back.
"""

import functools
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.distributed import LEFT, Store, beat_key, first_line, patience
from jaxllm.errors import ConfigError, DistributedError

LOOK = 1.0
"""Seconds of waiting between two looks at how the others are."""

CHUNK = 1 << 10
"""Events that are deleted from the store together, when they are twice as old."""


class Peers:
    """One process by itself, which agrees with itself."""

    problem: DistributedError | None = None
    """Why these processes can do nothing together any more."""

    is_first: bool = True
    """Whether this process does what one does for all, such as writing a file."""

    def say(self, what: Any, *data: Any) -> None:
        """Says what this process does next, and does not wait for the others.

        Args:
            what: Its text, of a few words, is sent.
            data: What must be the same; of which a checksum is sent.
        """

    def agree(self) -> None:
        """Waits until the next process has said the same as this one.

        Raises:
            DistributedError: It said something else, or is gone.
        """

    def wait(self, tree: Any) -> None:
        """Waits until arrays are computed.

        Raises:
            DistributedError: They never will be.
        """

    def gather(self, what: str, value: str) -> list[str]:
        """Returns what each of the processes has; they agree on `what` first.

        Raises:
            DistributedError: One does something else, or is gone.
        """
        return [value]

    def least(self, what: str, value: int) -> int:
        """Returns the smallest of what the processes have; see `gather`."""
        return min(map(int, self.gather(what, str(value))))

    def explain(self, error: Exception) -> Exception:
        """Returns what to raise for an error of the devices."""
        return error

    def refuse(self, what: str, instead: str) -> None:
        """Refuses what is for a model in one process.

        Args:
            what: As the caller wrote it.
            instead: A sentence that says what to do.

        Raises:
            ConfigError: There are several processes.
        """


class Ring(Peers):
    """Several processes, each of which compares itself with the next."""

    def __init__(self, processes: tuple[int, ...], me: int, store: Store, patience: float) -> None:
        """Begins with no event.

        Args:
            processes: All of them, in order.
            me: This one.
            store: Where they read what the others say.
            patience: Seconds after which a process that says nothing is given up.
        """
        self.processes, self.me = processes, me
        self.is_first = me == processes[0]
        self.next = processes[(processes.index(me) + 1) % len(processes)]
        self._store, self._patience = store, patience
        self._name = f"jaxllm/ring/{'-'.join(map(str, processes))}"
        self._said: deque[tuple[int, str]] = deque()
        """Events that the next process is not known to have had."""

        self._count = 0
        self._beat: tuple[str | None, float] = (None, 0.0)
        """What the next process said last of itself, and since when."""

    def say(self, what: Any, *data: Any) -> None:
        """Posts an event; never raises, as it is used where errors are being cleared up."""
        if self.problem is not None:
            return
        text = " ".join([str(what), *map(_checksum, data)])
        number, self._count = self._count, self._count + 1
        self._said.append((number, text))
        try:
            self._store.put(self._key(self.me, number), text)
            if number % CHUNK == 0 and number >= 2 * CHUNK:
                self._store.delete(f"{self._name}/{self.me}/{number // CHUNK - 2}")
        except jax.errors.JaxRuntimeError as error:
            self.problem = self._lost(error)

    def agree(self) -> None:
        """Compares all that was said; see `Peers`."""
        while self._said or self.problem:
            self._raise_problem()
            number, mine = self._said[0]
            theirs = self._read(self._key(self.next, number))
            if theirs != mine:
                self._fail(
                    f"Processes {self.me} and {self.next} do not do the same: event {number} is "
                    f"{mine!r} here and {theirs!r} there. Run the same script in each process, "
                    "with the same arguments and the same prompts in the same order; then start "
                    "all of them again."
                )
            self._said.popleft()

    def wait(self, tree: Any) -> None:
        """Waits as `Peers` says, and awake: a wait inside of JAX could not be ended."""
        self.agree()
        leaves = jax.tree.leaves(tree)
        start = looked = time.monotonic()
        while not all(leaf.is_ready() for leaf in leaves):
            now = time.monotonic()
            if now - looked > LOOK:
                self._look()
                looked = time.monotonic()
            time.sleep(min(1e-3, (now - start) / 50 + 2e-5))  # a fiftieth late at most

    def gather(self, what: str, value: str) -> list[str]:
        """Returns the values in the order of the processes; see `Peers`."""
        self.say(what)
        self.agree()
        place = f"{self._name}/values/{self._count}"
        self._put(f"{place}/{self.me}", value)
        return [self._read(f"{place}/{process}") for process in self.processes]

    def explain(self, error: Exception) -> Exception:
        """Returns that the processes are at odds, where the device does not say otherwise."""
        if "RESOURCE_EXHAUSTED" in str(error):
            return error
        self.problem = DistributedError(
            f"Process {self.me} could not compute a step together with the others: {error}. "
            "Usually one of them has ended: see their logs, and start all of them again."
        )
        return self.problem

    def refuse(self, what: str, instead: str) -> None:
        """Raises ConfigError; see `Peers`."""
        raise ConfigError(
            f"{what} is for a model in one process, and this one is in processes "
            f"{_listed(self.processes)}. {instead}"
        )

    def _key(self, process: int, number: int) -> str:
        return f"{self._name}/{process}/{number // CHUNK}/{number}"

    def _put(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.put(key, value))

    def _read(self, key: str) -> str:
        """Waits for a value for as long as the next process lives."""
        while (value := self._ask(lambda: self._store.get(key, LOOK))) is None:
            has_left = self._look() == LEFT
            # It may have said it at the last moment.
            if has_left and self._ask(lambda: self._store.get(key)) is None:
                self._fail(
                    f"Process {self.next} has ended its script, and process {self.me} waits for "
                    "it. Make the same calls in each process, and see the log of that one."
                )
        return value

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except jax.errors.JaxRuntimeError as error:
            self.problem = self._lost(error)
            raise self.problem from error

    def _look(self) -> str | None:
        """Returns what the next process says of itself.

        Raises:
            DistributedError: Another process has a problem, or the next one is gone.
        """
        told = self._ask(lambda: self._store.get(f"{self._name}/problem"))
        if told is not None:
            self.problem = DistributedError(told)
        self._raise_problem()
        beat = self._ask(lambda: self._store.get(beat_key(self.next)))
        now = time.monotonic()
        if beat != self._beat[0]:
            self._beat = (beat, now)
        elif now - self._beat[1] > self._patience:
            self._fail(
                f"Process {self.next} has not been heard of for {self._patience:.0f} s: it has "
                "died, or its host has. See its log, and start all processes again."
            )
        return beat

    def _fail(self, text: str) -> None:
        self.problem = DistributedError(text)
        self._ask(lambda: self._store.put(f"{self._name}/problem", text))
        raise self.problem

    def _raise_problem(self) -> None:
        if self.problem is not None:
            raise DistributedError(str(self.problem))

    def _lost(self, error: Exception) -> DistributedError:
        return DistributedError(
            f"Process {self.me} cannot reach process 0, which coordinates the job: it has ended, "
            f"or the network is down ({first_line(error)}). Start all processes again."
        )


def peers_of(*meshes: Mesh) -> Peers:
    """Returns the processes whose devices are in a mesh; the same object for the same ones.

    Args:
        meshes: Of an engine; or of several, which must all be of this process.

    Raises:
        ConfigError: This process has no device in one.
    """
    if jax.process_count() == 1:
        return Peers()
    devices = [device for mesh in meshes for device in mesh.devices.flat]
    processes = tuple(sorted({device.process_index for device in devices}))
    me, total = jax.process_index(), len(jax.devices())
    if me not in processes:
        raise ConfigError(
            f"All {len(devices)} devices of the model are of process {_listed(processes)}, and "
            f"this is process {me} of {jax.process_count()}. Use all {total} devices "
            f"(tensor_parallel_size={total}) for one model over all processes, or this process's "
            f"own (devices=jax.local_devices()[:{len(devices)}]) for a model in each."
        )
    if len(meshes) > 1 and len(processes) > 1:
        raise ConfigError(
            f"data_parallel_size={len(meshes)} would spread engines over processes "
            f"{_listed(processes)}, and each process runs its own. Make an LLM in each process "
            "on its own devices (devices=jax.local_devices()), and give each its share of the "
            "prompts."
        )
    return Peers() if processes == (me,) else _ring(processes, me)


@functools.cache
def _ring(processes: tuple[int, ...], me: int) -> Ring:
    return Ring(processes, me, Store(), patience())


def _checksum(data: Any) -> str:
    if isinstance(data, np.ndarray):
        data = data.tobytes()
    return f"{zlib.crc32(data if isinstance(data, bytes) else repr(data).encode()):08x}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
