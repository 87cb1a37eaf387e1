"""What the machine is: platform, memory, element types. The one place that asks."""

import os

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


def reserve_memory(fraction: float) -> None:
    """Sets the share of a GPU that JAX's allocator takes, where the user has set none.

    It has an effect only before the backend starts; later, what JAX has is used.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in names):
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.3f}"


def resolve_dtype(asked: str, stored: str, device: jax.Device) -> str:
    """Returns the element type to compute in.

    `auto` is float32 on CPU, where it is both exact and fast; on a GPU the
    checkpoint's own 16-bit type, float16 where the card has no bfloat16.

    Args:
        asked: What the caller gave.
        stored: safetensors' name of the checkpoint's type, such as BF16.
        device: One of those that will compute.

    Raises:
        ConfigError: No such type, or one that the card lacks.
    """
    if asked != "auto":
        if asked not in DTYPES:
            raise ConfigError(f"Unknown dtype {asked!r}. Use 'auto' or one of {sorted(DTYPES)}.")
        dtype = DTYPES[asked]
        if dtype == "bfloat16" and not _has_bfloat16(device):
            raise ConfigError(
                f"dtype='bfloat16' needs compute capability 8.0, and {device.device_kind} has "
                f"{device.compute_capability}. Use dtype='half'."
            )
        return dtype
    if device.platform == "cpu":
        return "float32"
    if not _has_bfloat16(device) or stored == "F16":
        return "float16"
    return "bfloat16"


def _has_bfloat16(device: jax.Device) -> bool:
    if device.platform == "cpu":
        return True
    major, minor = str(device.compute_capability).split(".")
    return (int(major), int(minor)) >= BFLOAT16_FROM
