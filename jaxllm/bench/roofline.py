"""The least time that a machine needs for a piece of work: bytes to read, products to make.

The machine is measured and not looked up: a container has not what its processor
has, and a figure from a data sheet is none that a program reaches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.bench.workload import Workload
from jaxllm.cache.kv_cache import bytes_per_token
from jaxllm.loading import Plan

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
    seconds: float = 0.5,
    read_bytes: int | None = None,
    side: int | None = None,
) -> Machine:
    """Returns the best rates of the first device.

    Args:
        dtype: Of the model; products are summed in float32, as the model's are.
        num_devices: That share the work.
        seconds: Time for each of three measurements, compilation apart.
        read_bytes: Size of the array that is read, by default `READ_BYTES`.
        side: Of the square matrices, by default `MATMUL_SIDE`.
    """
    device = jax.devices()[0]
    platform = "cpu" if device.platform == "cpu" else "gpu"
    read_bytes = read_bytes or READ_BYTES[platform]
    columns = 4096
    table = jnp.ones((read_bytes // 4 // columns, columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    # Either may be the one that XLA spreads over all cores.
    reads: list[Callable[..., jax.Array]] = [lambda x, v: x @ v, lambda x, v: x.sum(axis=1)]
    bandwidth = max(table.nbytes / _best(jax.jit(f), table, vector, seconds) for f in reads)
    table.delete()

    side = side or MATMUL_SIDE[platform]
    a = jnp.ones((side, side), dtype)
    exact = "highest" if dtype == "float32" else None  # no TF32

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=exact, preferred_element_type=jnp.float32)

    flops = 2 * side**3 / _best(jax.jit(product), a, a, seconds)
    return Machine(device.device_kind, dtype, bandwidth, flops, num_devices)


def _best(f: Callable[..., jax.Array], a: jax.Array, b: jax.Array, seconds: float) -> float:
    """Returns the seconds of the quickest of the calls that fit in a time."""
    f(a, b).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        f(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model costs: bytes that a step reads, operations of a token."""

    weight_bytes: int
    """Read by every step: all parameters but tables of which a token reads one row."""

    kv_bytes: int
    """Keys and values of one token, over all layers."""

    token_flops: int
    """Of a token through the layers, attention apart."""

    logit_flops: int
    """Of a token that is sampled, through the output head."""

    attention_flops: int
    """Of a token, for each token that it attends to."""

    max_num_seqs: int

    def floor_seconds(self, workload: Workload, machine: Machine) -> float:
        """Returns the least time for a workload: prompts first, then as few decode steps as can be.

        Each part takes at least its operations at the measured rate, and at least its
        bytes: prompts read the weights once, a decode step reads them once and the keys
        and values of each of its rows. Windows that leave keys out are not counted.
        """
        pairs = list(zip(workload.input_lens, workload.output_lens, strict=True))
        flops = sum(n * self.token_flops + self.logit_flops for n, _ in pairs)
        flops += sum(n * (n + 1) // 2 for n, _ in pairs) * self.attention_flops
        prompts = self._seconds(flops, self.weight_bytes, machine)

        new = [out - 1 for _, out in pairs]  # the first comes of the prompt
        # The i-th of them attends to the prompt, to those before it and to itself.
        seen = sum(out * n + out * (out + 1) // 2 for (n, _), out in zip(pairs, new, strict=True))
        steps = max(max(new), -(-sum(new) // self.max_num_seqs))
        flops = sum(new) * (self.token_flops + self.logit_flops) + seen * self.attention_flops
        read = steps * self.weight_bytes + seen * self.kv_bytes
        return prompts + self._seconds(flops, read, machine)

    def _seconds(self, flops: int, num_bytes: int, machine: Machine) -> float:
        slowest = max(flops / machine.flops_per_s, num_bytes / machine.read_bytes_per_s)
        return slowest / machine.num_devices


LOOKED_UP = ("embed.weight", "positions.weight")
"""Tables: a token reads one row, unless the first is the output head as well."""


def model_work(plan: Plan) -> ModelWork:
    """Returns what a loaded model costs."""
    leaves = {leaf.path: leaf for leaf in plan.model.leaves}
    head = leaves.get("head.weight", leaves["embed.weight"])
    layers = [leaf for path, leaf in leaves.items() if path not in LOOKED_UP and leaf is not head]
    config = plan.config
    return ModelWork(
        weight_bytes=sum(leaf.num_bytes for leaf in (*layers, head)),
        kv_bytes=bytes_per_token(plan.model.cache_specs, plan.engine.dtype),
        token_flops=2 * sum(leaf.shape.size for leaf in layers if leaf.num_in),
        logit_flops=2 * head.shape.size,
        attention_flops=4 * config.num_layers * config.num_heads * config.head_dim,
        max_num_seqs=plan.engine.max_num_seqs,
    )
