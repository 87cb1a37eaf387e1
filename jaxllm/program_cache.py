"""The table of compiled programs: each compiled once, counted, and guarded.

A background thread may fill it beside the engine's own. It holds the builder and the
programs, and no arrays, so a thread that still compiles keeps no memory of a closed
model. Interrupts may fall on any line here: a program is in the table whole or not.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxllm import compile_cache
from jaxllm.devices import release_freed_memory
from jaxllm.errors import ConfigError, RecompileError
from jaxllm.programs import Key, ProgramBuilder, ProgramKey
from jaxllm.progress import compiling

logger = logging.getLogger("jaxllm")

Guard = Literal["allow", "warn", "error"]

GUARD_VARIABLE = "JAXLLM_RECOMPILE"
"""Environment variable: what is done about a compilation after warm-up; "warn" by default."""

MOST_LARGER = 4
"""A program may stand in for one with so many times fewer tokens, and pages in a row. A larger
one would make a step slower by more than a compilation takes."""


def asked_guard() -> Guard:
    """Returns what the environment says about compilations after warm-up.

    Raises:
        ConfigError: It says something else.
    """
    asked = os.environ.get(GUARD_VARIABLE) or "warn"
    if asked not in ("allow", "warn", "error"):
        raise ConfigError(
            f"{GUARD_VARIABLE}={asked!r} is not one of {list(get_args(Guard))}. Set one of them, "
            "or leave it unset for 'warn'."
        )
    return asked


@dataclass(slots=True)
class Counts:
    """How the table was used."""

    num_hits: int = 0
    """Steps whose program was there."""

    num_misses: int = 0
    """Steps that waited for theirs to be compiled."""

    num_stand_ins: int = 0
    """Steps that a larger program served while theirs was being compiled; hits too."""

    num_disk_hits: int = 0
    """Programs that came out of the persistent cache."""

    num_disk_misses: int = 0
    """Programs that were not in it."""


class ProgramCache:
    """Compiled programs by key; compiles on first use."""

    def __init__(self, builder: ProgramBuilder) -> None:
        self.builder = builder
        self.counts = Counts()
        self.seconds: dict[Key, float] = {}
        """How long each program took to trace and compile."""

        self.guard: Guard = "allow"
        """What is done about a program that the table has not."""

        self.prefer: Callable[[Key], None] | None = None
        """Asks the background for a program first; None where nothing compiles there."""

        self._programs: dict[Key, Callable[..., Any]] = {}
        self._compiling: dict[Key, tuple[int, threading.Event]] = {}
        """By thread. What an interrupt left here is the same thread's to take over."""

    def __contains__(self, key: Key) -> bool:
        return key in self._programs

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, key: Key) -> Callable[..., Any]:
        """Returns the compiled program; it accepts exactly the shapes it was built for.

        Raises:
            RecompileError: It must be compiled, and the guard forbids that.
        """
        program = self._programs.get(key)
        if program is not None:
            self.counts.num_hits += 1
            return program
        self.counts.num_misses += 1
        self._check(key)
        with compiling(str(key)):
            return self.compile(key)

    def serving(self, key: ProgramKey) -> ProgramKey:
        """Returns the program to run now: a larger one that is ready, while `key` is not.

        Only where a background thread compiles meanwhile. Rounding may differ between
        programs in the last bit, so without one each step has its own program, and the
        same calls give the same bits.
        """
        if self.prefer is None or key in self._programs:
            return key
        ready = [k for k in list(self._programs) if isinstance(k, ProgramKey) and stands_in(k, key)]
        if not ready:
            return key
        self.prefer(key)
        self.counts.num_stand_ins += 1
        return min(ready, key=lambda k: (k.bucket.tokens, k.bucket.width, k.bucket.rows))

    def compile(self, key: Key) -> Callable[..., Any]:
        """Returns the program, compiled here or by the thread that is at it."""
        me, done = threading.get_ident(), threading.Event()
        owner, others = self._compiling.setdefault(key, (me, done))
        if owner != me:
            others.wait()
        try:
            # Not there although waited for: it failed, and will here, where it is seen.
            if key not in self._programs:
                self._compile(key)
            return self._programs[key]
        finally:
            if owner == me:
                self._compiling.pop(key, None)
                others.set()

    def _compile(self, key: Key) -> None:
        start = time.perf_counter()
        with compile_cache.watch():  # constants that tracing may compute are no programs
            lowered = self.builder.lower(key)
        with compile_cache.watch() as seen:
            program = lowered.compile()
        seconds = time.perf_counter() - start
        logger.debug("compiled %s in %.2f s", key, seconds)
        self.counts.num_disk_hits += seen.num_hits
        self.counts.num_disk_misses += seen.num_misses
        # In this order: an interrupt between the two must not leave a program without a time.
        self.seconds[key] = seconds
        self._programs[key] = program
        release_freed_memory()

    def clear(self) -> None:
        """Drops every program."""
        self._programs.clear()

    # ---------------------------------------------------------------- the guard

    def _check(self, key: Key) -> None:
        """Says what is new about a program that warm-up did not compile."""
        if self.guard == "allow":
            return
        alike: list[Any] = [known for known in list(self.seconds) if type(known) is type(key)]
        alike = [k for k in alike if _kind(k) == _kind(key)] or alike
        near = min((known.changes(key) for known in alike), key=len, default=None)
        changed = f": {', '.join(near)}" if near else ""
        self._object(f"{key} is compiled after warm-up{changed}.")

    def _object(self, what: str) -> None:
        if self.guard == "error":
            raise RecompileError(
                f"{what} {GUARD_VARIABLE}=error forbids it: send only what warm-up covers, or set "
                f"{GUARD_VARIABLE}=warn."
            )
        logger.warning("%s The request waits for it.", what)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A stretch of steps in which the guard looks for what is compiled past the table.

        Raises:
            RecompileError: JAX compiled something, and the guard forbids that.
        """
        if self.guard == "allow":
            yield
            return
        with compile_cache.watch() as seen:
            yield
        if seen.compiled:
            names = ", ".join(dict.fromkeys(seen.compiled))
            self._object(f"{names} was compiled in a step, past the table of programs.")


def _kind(key: Key) -> str:
    """Returns the first word of its name: "decode", "mixed" or "count_tokens"."""
    return str(key).partition("[")[0]


def stands_in(ready: ProgramKey, wanted: ProgramKey) -> bool:
    """Whether a program may serve while another is compiled: it can, and is not much larger."""
    mine, its = ready.bucket, wanted.bucket
    return (
        ready.serves(wanted)
        and mine.tokens <= MOST_LARGER * its.tokens
        and mine.width <= MOST_LARGER * its.width
    )
