"""Data parallelism: several engines of one model, each on devices of its own, as one.

Each engine has a thread for its steps, as a step waits for its device. Everything else
happens in the caller's thread and only while no step runs: requests are queued when a
call begins, and a call that ends, however it does, first lets the steps in progress end.

Threads and caller meet in queues and locks that are written in C. The futures of the
standard library are not: an interrupt within one can leave its lock held for good.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

import jax

from jaxllm import interrupts
from jaxllm.engine import Engine
from jaxllm.programs import ProgramBuilder
from jaxllm.runner import ModelRunner
from jaxllm.sequence import Request
from jaxllm.sharding.apply import Sharder


@dataclass(slots=True, eq=False)
class Step:
    """A step that a thread is asked for, and what came of it."""

    turn: object
    """Of the call that asked."""

    finished: list[Request] = field(default_factory=list)
    error: BaseException | None = None
    is_done: bool = False


@dataclass(slots=True, eq=False)
class Replica:
    """One engine and the step that its thread runs."""

    engine: Engine
    turn: object = None
    """Of the call in progress; a step that was asked for in an earlier one does nothing."""

    step: Step | None = None
    inbox: "SimpleQueue[Step | None]" = field(default_factory=SimpleQueue)
    """Steps that are asked for; None ends the thread."""

    def work(self, done: "SimpleQueue[None]") -> None:
        """Runs the steps that are asked for; the replica's thread."""
        while (step := self.inbox.get()) is not None:
            try:
                with self.engine.lock:
                    if step.turn is self.turn:
                        step.finished = self.engine.step()
            except BaseException as error:
                step.error = error
            step.is_done = True
            done.put(None)

    def take(self) -> Step | None:
        """Returns the step asked for, if there is one, and forgets it."""
        step, self.step = self.step, None
        return step

    def load(self) -> int:
        """Returns the tokens still to be computed, at most."""
        return sum(cost(request, self.engine) for request in self.engine.requests.values())


class Replicas:
    """Engines that share the requests of each call; to `LLM` they are one engine."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._replicas = tuple(Replica(engine) for engine in engines)
        self._done: SimpleQueue[None] = SimpleQueue()
        """Has an entry for each step that is done, and some for those that nobody waits for."""

        for replica in self._replicas:
            arguments = {"target": replica.work, "args": (self._done,), "daemon": True}
            threading.Thread(name="jaxllm-replica", **arguments).start()

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines, in the order of their devices."""
        return tuple(replica.engine for replica in self._replicas)

    @contextmanager
    def call(self, requests: Sequence[Request]) -> Iterator[None]:
        """A stretch of steps on behalf of some requests, as `Engine.call`.

        Those that no engine has yet are dealt out in order, each to the engine with the
        fewest tokens to compute.
        """
        self._settle()  # an interrupt may have cut off the settling of the last call
        with ExitStack() as stack:
            for replica, share in zip(self._replicas, self._dealt(requests), strict=True):
                stack.enter_context(replica.engine.call(share))
            turn = object()
            for replica in self._replicas:
                replica.turn = turn
            try:
                yield
            except GeneratorExit:  # as in `Engine.call`: there may be nothing to settle any more
                raise
            except BaseException:
                self._settle()
                raise
            failure = self._settle()
            if failure is not None:
                raise failure

    def _dealt(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Returns the requests of each engine."""
        shares: list[list[Request]] = [[] for _ in self._replicas]
        loads = [replica.load() for replica in self._replicas]
        for request in requests:
            homes = (i for i, e in enumerate(self.engines) if request.request_id in e.requests)
            home = next(homes, None)
            if home is None:
                home = loads.index(min(loads))
                loads[home] += cost(request, self._replicas[home].engine)
            shares[home].append(request)
        return shares

    def _settle(self) -> BaseException | None:
        """Waits for the steps in progress, which cannot be cut off; returns what one raised."""
        interrupt = failure = None
        waiting = list(self._replicas)
        while waiting:
            try:
                waiting[-1].turn = None
                with waiting[-1].engine.lock:
                    waiting.pop()
            except KeyboardInterrupt as error:  # raised when no thread uses an engine any more
                interrupt = error
        for replica in self._replicas:
            step = replica.take()
            failure = failure or (step.error if step else None)
        if interrupt is not None:
            raise interrupt
        return failure

    def step(self) -> list[Request]:
        """Runs steps of all engines that have work until one has ended.

        Returns:
            The requests that it finished; others may be finished later by steps in progress.
        """
        interrupts.check()
        for replica in self._replicas:
            if replica.step is None and replica.engine.requests:
                replica.step = Step(replica.turn)
                replica.inbox.put(replica.step)
        if all(replica.step is None for replica in self._replicas):
            return []
        self._done.get()
        finished = []
        for replica in self._replicas:
            if replica.step is not None and replica.step.is_done:
                step = replica.take()
                if step is not None and step.error is not None:
                    raise step.error
                finished += step.finished if step else []
        return finished

    def abort_later(self, request_ids: Iterable[str]) -> None:
        """Ends requests before the next step, as `Engine.abort_later`."""
        request_ids = list(request_ids)
        for engine in self.engines:
            engine.abort_later(request_ids)

    def close(self) -> None:
        """Ends the threads, which are idle."""
        for replica in self._replicas:
            replica.inbox.put(None)


def cost(request: Request, engine: Engine) -> int:
    """Returns the tokens that a request may still need computed."""
    longest = engine.config.max_model_len
    return sum(
        seq.num_tokens - seq.num_computed + seq.remaining(longest) for seq in request.sequences
    )


def make_engines(
    builder: ProgramBuilder, params: Sequence[jax.Array], others: Sequence[Sharder]
) -> list[Engine]:
    """Returns an engine for the builder's devices and for those of each other sharder.

    Args:
        builder: Of the first engine's programs.
        params: On its devices; the others copy them from there, and not from the disk.
        others: One an engine, of the same layout.
    """
    engines = [Engine(ModelRunner(builder, params))]
    for sharder in others:
        model = builder.model.on(sharder)
        copies = jax.device_put(tuple(params), tuple(shape.sharding for shape in model.shapes))
        there = replace(builder, model=model, sharder=sharder)
        engines.append(Engine(ModelRunner(there, copies)))
    return engines


def as_one(engines: Sequence[Engine]) -> "Engine | Replicas":
    """Returns what runs the requests of an `LLM`; a single engine needs no thread."""
    return engines[0] if len(engines) == 1 else Replicas(engines)


def engines_of(engine: "Engine | Replicas") -> tuple[Engine, ...]:
    """Returns the engines behind `as_one`."""
    return engine.engines if isinstance(engine, Replicas) else (engine,)
