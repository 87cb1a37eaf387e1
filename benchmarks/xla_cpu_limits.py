"""What bounds attention on CPU: operations of its loops alone, as XLA:CPU runs them.

    JAX_PLATFORMS=cpu python benchmarks/xla_cpu_limits.py

Each is run many times in a loop inside of one program, as attention does it, on arrays that stay
in the caches unless it says otherwise. Prints the median of several calls: microseconds, the rate,
and how many cores were at work. Shapes are SmolLM2-135M's: 3 KV heads of 64, 3 query heads each;
64 queries are a block of a prompt, and 16 rows a group of a decode step, both over 64 keys.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.pallas_kernels.attention import xla
from jaxllm.pallas_kernels.attention.spec import product

TRIPS, CALLS = 200, 7
BLOCK, GROUP = (3, 192, 64), (48, 3, 64)
"""Queries: [KV heads, heads x queries, D] of a block, [KV heads x rows, heads, D] of a group."""


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape) * 0.1, dtype) for shape in shapes]


def show(name, step, carry, *rest, work=0.0, unit="GFLOP/s"):
    """Times `carry = step(carry, *rest, i)`; `work` is what one step does."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, *rest):
        return jax.lax.fori_loop(0, TRIPS, lambda i, carry: step(carry, *rest, i), carry)

    carry = jax.block_until_ready(run(carry, *rest))
    wall, cpu = [], []
    for _ in range(CALLS):
        start, used = time.perf_counter(), time.process_time()
        carry = jax.block_until_ready(run(carry, *rest))
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    each = statistics.median(wall) / TRIPS
    rate = f"{work / each / 1e9:.3g} {unit}" if work else ""
    print(f"| {name} | {each * 1e6:.1f} | {rate} | {sum(cpu) / sum(wall):.1f} |", flush=True)


def products():
    for name, shape in (("a block", BLOCK), ("four blocks", (12, *BLOCK[1:])), ("a group", GROUP)):
        # As they are stored, a page's slots side by side, and the other way round.
        for keys_are, letters in (("D, S", "bdc"), ("S, D", "bcd")):
            queries, keys = arrays(shape, (shape[0], 64, 64))

            def multiply(q, k, _, letters=letters):
                return product(f"bmd,{letters}->bmc", q, k, upcast=False)

            work = 2 * queries.size * 64
            show(f"product of {name}, keys [{keys_are}]", multiply, queries, keys, work=work)
    for dtype in (jnp.float32, jnp.bfloat16):
        size = 1536
        x, weight = arrays((size, size), (size, size), dtype=dtype)

        def multiply(x, weight, _):
            return product("md,cd->mc", x, weight, upcast=False).astype(x.dtype)

        name = f"product of two matrices of {size}, {jnp.dtype(dtype)}"
        show(name, multiply, x, weight, work=2 * size**3)
    first, second, keys = arrays(BLOCK, BLOCK, (3, 64, 64))
    work = 2 * 2 * first.size * 64

    def both(pair, keys, _):
        return tuple(product("bmd,bdc->bmc", q, keys, upcast=False) for q in pair)

    show("two blocks, neither needs the other", both, (first, second), keys, work=work)


def softmax():
    ones = jnp.ones((64, 1))
    for name, shape in (("a block", BLOCK), ("a group", GROUP)):
        for what, found in {
            "largest": lambda x: jnp.max(x, axis=-1, keepdims=True),
            "largest, by halves": xla.largest,
            "sum": lambda x: jnp.sum(x, axis=-1, keepdims=True),
            "sum, by a product": lambda x: product("bmc,cd->bmd", x, ones, upcast=False),
            "exponentials": lambda x: jnp.exp(x - 1),
        }.items():
            (scores,) = arrays(shape)
            show(f"{what} of {name}", lambda x, _, found=found: x - found(x), scores)


def copies():
    """Keys of a group out of pages of 64, and their writing, in a cache beyond the processor's."""
    num_pages, rng = 16384, np.random.default_rng(0)
    tables = jnp.asarray(rng.integers(1, num_pages, (TRIPS, 16)), jnp.int32)
    pages = jnp.ones((3, num_pages, 64 * 64))
    work = 3 * 16 * 64 * 64 * 4

    def gather(_, pages, tables, i):
        return jnp.take(pages, tables[i], axis=1, mode="clip")

    out = jnp.zeros((3, 16, 64 * 64))
    show("gather of a group's keys", gather, out, pages, tables, work=work, unit="GB/s")

    slots = jnp.asarray(rng.integers(1, num_pages, (TRIPS, 64)), jnp.int32) * 64
    new = jnp.ones((64, 3, 64))
    for order in ("KPDS", "KPSD"):

        def write(pages, new, slots, i, order=order):
            return xla.write(pages, new, slots[i], order)

        held = jnp.zeros((3, num_pages, 64, 64))
        show(f"64 tokens written into pages {order}", write, held, new, slots)


if __name__ == "__main__":
    print("| operation | us | rate | cores |\n|---|---|---|---|")
    products()
    softmax()
    copies()
