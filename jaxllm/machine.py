"""What a device does at its best, measured: bytes it reads a second, products it makes.

The machine is measured and not looked up: a container has not what its processor
has, and a figure from a data sheet is none that a program reaches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

READ_BYTES = {"cpu": 256 << 20, "gpu": 2 << 30}
"""By platform: several times the caches of a processor."""

MATMUL_SIDE = {"cpu": 1536, "gpu": 8192}


@dataclass(frozen=True, slots=True)
class Machine:
    """What one device does at its best, as measured here."""

    device: str
    dtype: str
    """Of the products."""

    read_bytes_per_s: float
    flops_per_s: float
    num_devices: int = 1

    def __str__(self) -> str:
        """Both rates, in the usual units."""
        rates = f"{self.read_bytes_per_s / 1e9:,.1f} GB/s, {self.flops_per_s / 1e12:,.3g} TFLOP/s"
        return f"{rates} of {self.dtype} ({self.num_devices} x {self.device})"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields."""
        return {name: getattr(self, name) for name in self.__slots__}


def measure_machine(
    dtype: str,
    *,
    num_devices: int = 1,
    device: jax.Device | None = None,
    seconds: float = 0.5,
    read_bytes: int | None = None,
    side: int | None = None,
) -> Machine:
    """Returns the best rates of one device.

    Args:
        dtype: Of the model; products are summed in float32, as the model's are.
        num_devices: That share the work.
        device: By default the first.
        seconds: Time for each of three measurements, compilation apart.
        read_bytes: Size of the array that is read, by default `READ_BYTES`.
        side: Of the square matrices, by default `MATMUL_SIDE`.
    """
    where: jax.Device = jax.devices()[0] if device is None else device
    platform = "cpu" if where.platform == "cpu" else "gpu"
    read_bytes = read_bytes or READ_BYTES[platform]
    side = side or MATMUL_SIDE[platform]
    columns = 4096
    with jax.default_device(where):
        table = jnp.ones((read_bytes // 4 // columns, columns), jnp.float32)
        vector = jnp.ones((columns,), jnp.float32)
        a = jnp.ones((side, side), dtype)
    # Either may be the one that XLA spreads over all cores.
    reads: list[Callable[..., jax.Array]] = [lambda x, v: x @ v, lambda x, v: x.sum(axis=1)]
    bandwidth = max(table.nbytes / _best(jax.jit(f), table, vector, seconds) for f in reads)
    table.delete()
    exact = "highest" if dtype == "float32" else None  # no TF32

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=exact, preferred_element_type=jnp.float32)

    flops = 2 * side**3 / _best(jax.jit(product), a, a, seconds)
    return Machine(where.device_kind, dtype, bandwidth, flops, num_devices)


def _best(f: Callable[..., jax.Array], a: jax.Array, b: jax.Array, seconds: float) -> float:
    """Returns the seconds of the quickest of the calls that fit in a time."""
    f(a, b).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        f(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best
