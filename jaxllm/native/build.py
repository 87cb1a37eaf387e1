"""Compiles a kernel for this processor, once, and gives XLA its name.

The library lies under the cache root, named after all that it depends on: sources, flags,
compiler, jaxlib's headers and the processor. A target is named after the sources, so that no
compiled program of JAX's cache can call a kernel it was not made for.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.compile_cache import cache_root
from jaxllm.errors import ConfigError, NativeBuildError

SWITCH = "JAXLLM_NATIVE"
"""Environment variable: `0` for no compiled kernels, `1` for an error where one that would serve
cannot be compiled."""

COMPILERS = ("c++", "g++", "clang++")
"""Looked for in this order, after the command in `CXX`; then ziglang, a compiler from PyPI."""

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-Wno-psabi")

ELEMENTS = {"float32": "float", "bfloat16": "BFloat16", "float16": "Float16"}
"""Types of JAX that kernels are compiled for, and what the sources call them."""

SOURCES = Path(__file__).parent

logger = logging.getLogger("jaxllm")


def why_not_compiled(platform: str, devices: int, dtype: str) -> str | None:
    """Returns why a program has no compiled kernels; None if it has them.

    Args:
        platform: Of JAX.
        devices: Over which the model is split; a compiled kernel has all on one.
        dtype: Of the model.

    Raises:
        ConfigError, NativeBuildError: As `unavailable`.
    """
    return _not_here(platform, devices) or unavailable(dtype)


def are_expected(platform: str, devices: int, dtype: str) -> bool:
    """Returns whether a program will have compiled kernels, should none fail to compile.

    Compiles nothing; arguments are those of `why_not_compiled`.
    """
    refused = _not_here(platform, devices) or _unsupported(dtype)
    return not refused and os.environ.get(SWITCH) != "0" and compiler() is not None


def _not_here(platform: str, devices: int) -> str | None:
    if platform != "cpu":
        return "compiled kernels are for CPU"
    return "the model is split over devices" if devices > 1 else None


def _unsupported(dtype: str) -> str | None:
    if sys.platform == "win32":
        return "kernels are for Linux and macOS, and not for Windows."
    if dtype not in ELEMENTS:
        return f"kernels are for {', '.join(ELEMENTS)}, and not for {dtype}."
    return None


def unavailable(dtype: str) -> str | None:
    """Returns why kernels of a type are not compiled here; None if they are.

    Raises:
        ConfigError: `JAXLLM_NATIVE` is neither 0 nor 1.
        NativeBuildError: `JAXLLM_NATIVE=1`, and they can't be compiled.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1"):
        raise ConfigError(
            f"{SWITCH}={wanted} is neither 0 (no compiled kernels) nor 1 (an error where one "
            "cannot be compiled). Unset it to use them where there is a compiler."
        )
    if wanted == "0":
        return f"{SWITCH}=0"
    problem = _problem(dtype)
    if problem and wanted == "1":
        raise NativeBuildError(f"{SWITCH}=1, but {problem} Unset it to run without.")
    return problem


@functools.cache
def _problem(dtype: str) -> str | None:
    """Builds all kernels of a type; returns what went wrong, a sentence."""
    if refused := _unsupported(dtype):
        return refused
    try:
        kernels = sorted(source.stem for source in SOURCES.glob("*.cc"))
        _compile([_library(kernel, dtype) for kernel in kernels])
        for kernel in kernels:
            target(kernel, dtype)
    except NativeBuildError as error:
        logger.warning("no kernel is compiled for this processor, and XLA's is slower: %s", error)
        return str(error)
    return None


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """Returns the command of a C++ compiler; None if there is none."""
    if asked := os.environ.get("CXX"):
        return tuple(shlex.split(asked))
    for name in COMPILERS:
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def target_for(kernel: str, platform: str, devices: int, dtype: DTypeLike) -> str:
    """Returns XLA's name of a kernel; empty where there is none.

    Arguments and errors are those of `target` and of `why_not_compiled`.
    """
    name = jnp.dtype(dtype).name
    return "" if why_not_compiled(platform, devices, name) else target(kernel, name)


@functools.cache
def target(kernel: str, dtype: str) -> str:
    """Returns the name under which XLA finds a kernel, which is compiled if it has to be.

    Args:
        kernel: Its source's name and its symbol, such as `paged_attention`.
        dtype: Of its operands.

    Raises:
        NativeBuildError: There is no compiler, or it failed.
    """
    library = _library(kernel, dtype)
    _compile([library])
    name = f"jaxllm_{kernel}_{dtype}_{_digest(*_sources())[:12]}"
    if name not in _registered:  # XLA takes a name once in a process
        try:
            symbol = getattr(ctypes.CDLL(str(library.path)), kernel)
        except (OSError, AttributeError) as error:
            raise NativeBuildError(
                f"{library.path} could not be loaded: {error}. Delete it, or set "
                "JAXLLM_CACHE_ROOT to a folder from which programs may be run, or "
                f"{SWITCH}=0 to run without."
            ) from error
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(symbol), platform="cpu")
        _registered.add(name)
    return name


_registered: set[str] = set()


@dataclass(frozen=True, slots=True)
class _Library:
    """The shared library of a kernel, and what makes it."""

    path: Path
    command: tuple[str, ...]

    @property
    def kernel(self) -> str:
        """Its name."""
        return self.path.stem.split("-")[0]


def _library(kernel: str, dtype: str) -> _Library:
    """Returns the library of a kernel, whether there is one yet or not."""
    command = compiler()
    if command is None:
        raise NativeBuildError(
            f"there is no C++ compiler: neither CXX nor {', '.join(COMPILERS)}. Install one, such "
            "as with pip install 'jaxllm[cpu]'."
        )
    flags = [*FLAGS, f"-DJAXLLM_ELEMENT={ELEMENTS[dtype]}", f"-I{jax.ffi.include_dir()}"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags.append("-march=native")  # elsewhere, the least that there is has what is used
    key = _digest(
        *_sources(), *map(str.encode, (*flags, *command, _version(command), _processor()))
    )
    path = cache_root() / "native" / f"{kernel}-{dtype}-{key[:24]}.so"
    return _Library(path, (*command, *flags, str(SOURCES / f"{kernel}.cc")))


def _compile(libraries: Sequence[_Library]) -> None:
    """Makes those that are not there yet, all at once; each appears whole or not at all."""
    missing = [library for library in libraries if not library.path.exists()]
    if not missing:
        return
    start = time.perf_counter()
    names = ", ".join(library.kernel for library in missing)
    logger.info("Compiling %s for this processor, which happens once", names)
    with ExitStack() as stack:  # which ends what still runs after an error or an interrupt
        running = [(library, *_start(library, stack)) for library in missing]
        for library, process, made in running:
            said = process.communicate()[1]
            if process.returncode:
                last = "\n".join(said.strip().splitlines()[-20:])
                raise NativeBuildError(
                    f"{' '.join(library.command)} failed (exit status {process.returncode}). Set "
                    f"CXX to another compiler, or {SWITCH}=0 to run without. It said:\n{last}"
                )
            with _said(library):
                made.replace(library.path)
    logger.info("Compiled in %.1f seconds", time.perf_counter() - start)


def _start(library: _Library, stack: ExitStack) -> tuple["subprocess.Popen[str]", Path]:
    """Starts a compiler; returns its process, and what it makes in a folder of its own."""
    path = library.path
    with _said(library):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent))) / path.name
        process = subprocess.Popen(
            [*library.command, "-o", str(made)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that what it starts itself is ended with it
        )
    stack.enter_context(process)
    stack.callback(_end, process)
    return process, made


@contextmanager
def _said(library: _Library) -> Iterator[None]:
    """A stretch in which what the system refuses is an error of the compiler's."""
    try:
        yield
    except OSError as error:
        raise NativeBuildError(
            f"{library.command[0]} could not make {library.path}: {error}."
        ) from error


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends a compiler and all that it has started, if it has not ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):  # it ends at this moment
            os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def _sources() -> tuple[bytes, ...]:
    """Returns what is in all source files: a kernel may include any of them."""
    files = sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])
    return tuple(file.read_bytes() for file in files)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """Returns what identifies a compiler, and the headers of XLA that it reads."""
    try:
        ran = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(
            f"{' '.join(command)} is no C++ compiler that can be run ({error}). Set CXX to one, "
            f"or {SWITCH}=0 to run without."
        ) from error
    return f"{ran.stdout} jaxlib {metadata.version('jaxlib')}"


def _processor() -> str:
    """Returns what the processor can do, as `-march=native` depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
