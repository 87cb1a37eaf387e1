"""What the machine is: platform, memory, element types. The one place that asks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax

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
    started_with = float(
        os.environ.get("XLA_CLIENT_MEM_FRACTION")
        or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        or 0.75
    )
    return int(min(limit, limit / started_with * fraction))


def memory_in_use(device: jax.Device) -> int:
    """Returns the bytes that arrays of this process hold on a device; 0 on CPU."""
    return 0 if device.platform == "cpu" else device.memory_stats()["bytes_in_use"]


def reserve_memory(fraction: float) -> None:
    """Sets the share of a GPU that JAX's allocator takes, where the user has set none.

    It has an effect only before the backend starts; later, what JAX has is used.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in names):
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.3f}"


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
