"""What the machine is: platform, memory, element types. The one place that asks."""

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
from jax._src import xla_bridge

from jaxllm.errors import ConfigError

DTYPES = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}

BFLOAT16_FROM = (8, 0)
"""First compute capability with bfloat16 units; XLA upcasts it to float32 on older ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """The memory of a device, which is here or only planned for; in bytes."""

    name: str
    platform: str
    most: int
    """All that there is."""

    limit: int
    """What an engine may use."""

    in_use: int = 0
    """What arrays of this process hold already."""


def room_on(
    devices: list[jax.Device], fraction: float, own: Mapping[int, int] | None = None
) -> Room:
    """Returns the memory that each of some devices has, which are alike, as the fullest has it.

    Args:
        devices: Of all engines; those of one CPU share its memory.
        fraction: As for `memory_limit`.
        own: Bytes in use that will be given back, by id of the device.
    """
    own = own or {}

    def taken(device: jax.Device) -> int:
        return max(0, memory_in_use(device) - own.get(device.id, 0))

    device = max(devices, key=taken)
    sharing = len(devices) if device.platform == "cpu" else 1
    return Room(
        name=str(device),
        platform=device.platform,
        most=memory_limit(device, 1.0) // sharing,
        limit=memory_limit(device, fraction) // sharing,
        in_use=taken(device),
    )


def memory_limit(device: jax.Device, fraction: float) -> int:
    """Returns the bytes that one device may use.

    Args:
        device: On a GPU, `fraction` bounds what JAX's allocator holds, which is
            itself a share of the card fixed when the backend starts. On CPU it is
            a share of the machine's memory.
        fraction: More than 0, at most 1.
    """
    if device.platform == "cpu":
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * fraction)
    limit = device.memory_stats()["bytes_limit"]
    set_to = [os.environ[name] for name in MEMORY_VARIABLES if os.environ.get(name)]
    started_with = float(set_to[0] if set_to else DEFAULT_FRACTION)
    return int(min(limit, limit / started_with * fraction))


def memory_in_use(device: jax.Device) -> int:
    """Returns the bytes that arrays of this process hold on a device; 0 on CPU."""
    return 0 if device.platform == "cpu" else device.memory_stats()["bytes_in_use"]


def release_freed_memory() -> None:
    """Gives the system what the C library keeps of this process's freed memory.

    For a call after a compilation: of each program of a small model 60 MB stayed that nobody had
    (glibc, which keeps them for each thread). Elsewhere it does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
        if trim is not None:
            trim(0)


MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Share of a GPU that JAX's allocator takes when the backend starts; the second is the old name,
and jaxlib refuses to have both."""

SetBy = Literal["user", "jaxllm", "too late", "JAX"]
"""Who has the last word. "too late": jaxllm would have, but the backend had started."""

_memory_set_by: SetBy | None = None


def reserve_memory(fraction: float) -> None:
    """Sets the share of a GPU that JAX's allocator takes, where the user has set none.

    It has an effect only before the backend starts; later, what JAX has is used.
    """
    global _memory_set_by  # the first model decides for the whole process
    if _memory_set_by is not None:
        return
    if any(name in os.environ for name in MEMORY_VARIABLES):
        _memory_set_by = "user"
    elif has_started():
        _memory_set_by = "too late"
    else:
        os.environ[MEMORY_VARIABLES[0]] = f"{fraction:.3f}"
        _memory_set_by = "jaxllm"


def memory_setting() -> tuple[str, str, SetBy]:
    """Returns the variable of the memory's share, its value, and who set it."""
    for name in MEMORY_VARIABLES:
        if name in os.environ:
            return name, os.environ[name], _memory_set_by or "user"
    return MEMORY_VARIABLES[0], DEFAULT_FRACTION, _memory_set_by or "JAX"


DEFAULT_FRACTION = "0.75"
"""Of JAX."""


def has_started() -> bool:
    """Whether JAX has started its backends, which read their settings then and never again."""
    # JAX has no public way to ask; where this one is gone, settings are reported as in time.
    asked = getattr(xla_bridge, "backends_are_initialized", None)
    return bool(asked and asked())


def resolve_dtype(asked: str, stored: str, device: jax.Device, *, overflows: bool = False) -> str:
    """Returns the element type to compute in.

    `auto` is float32 on CPU, where it is both exact and fast; on a GPU the
    checkpoint's own 16-bit type, another where the card or the model cannot.

    Args:
        asked: What the caller gave.
        stored: The checkpoint's type, such as "bfloat16".
        device: One of those that will compute.
        overflows: Whether the model's activations leave the range of float16.

    Raises:
        ConfigError: No such type, or one that the card lacks or the model overflows.
    """
    has_bfloat16 = _has_bfloat16(device)
    if asked == "auto":
        if device.platform == "cpu":
            return "float32"
        if overflows:
            return "bfloat16" if has_bfloat16 else "float32"
        return "bfloat16" if has_bfloat16 and stored != "float16" else "float16"
    if asked not in DTYPES:
        raise ConfigError(f"Unknown dtype {asked!r}. Use 'auto' or one of {sorted(DTYPES)}.")
    dtype = DTYPES[asked]
    if dtype == "bfloat16" and not has_bfloat16:
        raise ConfigError(
            f"dtype={asked!r} needs compute capability 8.0, and {device.device_kind} has "
            f"{device.compute_capability}. Use dtype={'float32' if overflows else 'half'!r}."
        )
    if dtype == "float16" and overflows:
        raise ConfigError(
            f"dtype={asked!r} is not for this model: its activations are larger than the 65504 "
            "that float16 ends at, and the text would be nonsense. Use "
            f"dtype={'bfloat16' if has_bfloat16 else 'float32'!r}."
        )
    return dtype


def _has_bfloat16(device: jax.Device) -> bool:
    if device.platform == "cpu":
        return True
    major, minor = str(device.compute_capability).split(".")
    return (int(major), int(minor)) >= BFLOAT16_FROM
