"""Memory for weights in huge pages, where a CPU has them.

A core that reads a gigabyte in pages of 4 KiB asks for the place of a quarter of a million of them,
in huge pages of 2 MiB for that of 512; and what it reads ahead ends with a page. Linux gives them
to memory that asks (`madvise(MADV_HUGEPAGE)`, the setting of most distributions), and only there.
"""

import mmap
from typing import Self

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxllm.modeling.abstract import AbstractModel

ALIGNMENT = 64
"""Bytes. JAX takes memory that lies so as it is; other memory it copies."""


class HugePages:
    """Room for the parameters of a model, given out from front to back.

    It is freed with the last array in it.
    """

    def __init__(self, num_bytes: int) -> None:
        """Asks for memory; it is taken when it is written."""
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._taken = 0

    @classmethod
    def of_model(cls, model: AbstractModel) -> Self | None:
        """Returns room for all parameters; None where there is none: not one CPU, not Linux."""
        sharding = model.leaves[0].shape.sharding
        devices = sharding.device_set if sharding else set()
        if [device.platform for device in devices] != ["cpu"] or not hasattr(mmap, "MADV_HUGEPAGE"):
            return None
        return cls(sum(leaf.num_bytes + ALIGNMENT for leaf in model.leaves))

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Returns an array of zeros that `jax.device_put` does not copy.

        Raises:
            MemoryError: There is no room for it.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        start = self._taken
        if start + size > len(self._memory):
            raise MemoryError(f"{size} bytes do not fit in {len(self._memory) - start}.")
        self._taken = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return np.frombuffer(self._memory, np.uint8, size, start).view(dtype).reshape(shape)

    def moved(self, array: jax.Array) -> jax.Array:
        """Returns a copy of an array that lies here, with its sharding."""
        copy = self.zeros(array.shape, array.dtype)
        copy[...] = np.asarray(array)
        return jax.device_put(copy, array.sharding)
