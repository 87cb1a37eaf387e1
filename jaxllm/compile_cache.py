"""The persistent cache of compiled programs, and what JAX says about compiling.

On by default, so a second start is quick. It lies under `JAXLLM_CACHE_ROOT` (or vLLM's
`VLLM_CACHE_ROOT`), by default the user's cache folder; JAX keeps XLA's autotuning results
beside the programs. A folder that the user has given JAX is left alone. What is wrong
with the folder is said once, and programs are compiled without it.
"""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax._src import compilation_cache as internals  # no public way in; see `_mend`
from jax.experimental.compilation_cache import compilation_cache

SETTING = "jax_compilation_cache_dir"
"""JAX's own name for it; None where nobody has set it."""

REMEDY = "Set JAXLLM_CACHE_ROOT to another folder."

THRESHOLDS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
"""Small programs count too: a model has dozens, and each costs a second or more."""

logger = logging.getLogger("jaxllm")


def cache_root() -> Path:
    """Returns the folder for everything jaxllm keeps between runs."""
    asked = os.environ.get("JAXLLM_CACHE_ROOT") or os.environ.get("VLLM_CACHE_ROOT")
    if asked:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"


def folder() -> str | None:
    """Returns the folder in use, ours or the user's; None where there is none."""
    return getattr(jax.config, SETTING)


def enable() -> str | None:
    """Turns the cache on, unless it is on already; returns its folder.

    None where the folder cannot be written: then a warning has said so.
    """
    _listen()
    if folder() is not None:
        return folder()
    global _is_mine  # JAX's config is of the process too
    mine = cache_root() / "xla"
    problem = _problem_with(mine)
    if problem:
        _warn_once(f"{mine} cannot be written ({problem}), so each start compiles anew. {REMEDY}")
        return None
    _is_mine = True
    jax.config.update(SETTING, str(mine))
    for name, value in THRESHOLDS.items():
        jax.config.update(name, value)
    # JAX decides at its first compilation, which may lie behind us.
    compilation_cache.reset_cache()
    _mend(mine)
    return str(mine)


_is_mine = False
"""Whether the folder in JAX's config is from here."""

AUTOTUNE = "xla_gpu_per_fusion_autotune_cache_dir"
"""JAX gives XLA this folder beside the programs, by default."""


def settings() -> Iterator[tuple[str, str, str, Any, Any]]:
    """Yields (name, value, why, platform, set by) of the cache."""
    by = "jaxllm" if _is_mine else "user"
    yield SETTING, str(folder()), "a second start compiles nothing", "all", by
    for name, wanted in THRESHOLDS.items():
        value = getattr(jax.config, name)
        by = "jaxllm" if _is_mine and value == wanted else "user"
        yield name, str(value), "small programs are kept too", "all", by
    name = "jax_persistent_cache_enable_xla_caches"
    value = getattr(jax.config, name)
    why = "choices of GPU kernels are kept beside the programs"
    yield name, str(value), why, "gpu", "JAX" if AUTOTUNE in (value or "") else "user"


def _problem_with(path: Path) -> str | None:
    """Returns why files cannot be written there; None if they can."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return error.strerror or str(error)


_said: set[str] = set()


def _warn_once(problem: str) -> None:
    if problem not in _said:
        _said.add(problem)
        logger.warning("compile cache: %s", problem)


# ---------------------------------------------------------------- damaged entries


class SoundEntries:
    """JAX's cache in a folder, minus its damaged entries.

    JAX writes entries in place, so a process that is stopped leaves half of one; reading
    it fails in every later process, and nothing writes it anew. Here an entry appears
    whole or not at all, and one that does not unpack is removed and compiled again.
    """

    def __init__(self, entries: Any, unpack: Callable[[bytes], bytes]) -> None:
        self._entries = entries
        self._unpack = unpack
        self._path = entries._path  # JAX asks for it

    def get(self, key: str) -> bytes | None:
        """Returns an entry that unpacks; None if there is none."""
        value = self._entries.get(key)
        if value is None:
            return None
        try:
            self._unpack(value)
        except Exception:  # of zlib, zstandard or another: whatever JAX packs with
            _warn_once(f"damaged entries in {self._path} were removed.")
            self._file(key).unlink(missing_ok=True)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Stores an entry, unless there is one."""
        if self._file(key).exists():
            return
        part = Path(self._path) / f"{key}.{os.getpid()}.{threading.get_ident()}.part"
        try:
            part.write_bytes(value)
            part.replace(self._file(key))
        except OSError as error:
            _warn_once(f"{self._path} cannot be written any more ({error.strerror}). {REMEDY}")
        finally:
            part.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return Path(self._path) / f"{key}-cache"


def _mend(path: Path) -> None:
    """Puts `SoundEntries` in the place of JAX's cache, where JAX is built as expected."""
    needed = ("_cache", "_cache_initialized", "get_file_cache", "decompress_executable")
    if any(not hasattr(internals, name) for name in needed):
        return
    if getattr(jax.config, "jax_compilation_cache_max_size", -1) != -1:
        return  # JAX keeps books of each access beside the entries
    found = internals.get_file_cache(str(path))
    if found is not None and hasattr(found[0], "_path"):
        internals._cache = SoundEntries(found[0], internals.decompress_executable)
        internals._cache_initialized = True


# ---------------------------------------------------------------- what JAX says

REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
HIT = "/jax/compilation_cache/cache_hits"
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(slots=True, eq=False)
class Seen:
    """What JAX compiled in one thread while somebody watched."""

    num_hits: int = 0
    """Programs that came out of the persistent cache."""

    num_misses: int = 0
    """Programs that were looked for there, and were not."""

    compiled: list[str] = field(default_factory=list)
    """Names of all programs, from the cache or not."""


class _Watching(threading.local):
    """The open watches of a thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[Seen] = []


_watching = _Watching()


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    """A stretch whose compilations are counted; what an inner stretch sees, the outer does not."""
    _listen()
    seen = Seen()
    _watching.open.append(seen)
    try:
        yield seen
    finally:
        if seen in _watching.open:  # an interrupt may have left inner ones open
            del _watching.open[_watching.open.index(seen) :]


def _on_event(event: str, **_: Any) -> None:
    if event not in (REQUEST, HIT) or folder() is None:  # JAX asks where there is no folder too
        return
    for seen in _watching.open[-1:]:
        # A request is a miss until a hit is reported.
        seen.num_hits += event == HIT
        seen.num_misses += 1 if event == REQUEST else -1


def _on_duration(event: str, duration_secs: float, **about: Any) -> None:
    del duration_secs
    if event == COMPILED:
        for seen in _watching.open[-1:]:
            seen.compiled.append(str(about.get("fun_name", "a program")))


_listening = False


def _listen() -> None:
    """Asks JAX to report, once a process."""
    global _listening  # JAX's listeners are of the process too
    if not _listening:
        _listening = True
        monitoring.register_event_listener(_on_event)
        monitoring.register_event_duration_secs_listener(_on_duration)
