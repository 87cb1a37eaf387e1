"""How many pages fit. Arithmetic only; what it needs to know is passed in.

    pages = (memory that may be used - weights - temp_bound) / bytes of a page

`temp_bound` is a closed form, as the number of pages is itself in the shapes of
the programs: compiling them first to measure would go in a circle. A test proves
that it is at least what the compiler reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.buckets import Bucket
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.modeling.config import ModelConfig
from jaxllm.pallas_kernels.attention.spec import TUNING
from jaxllm.sharding.layouts import Layout

GIB = 1 << 30
ONE_DEVICE = Layout("one device", {}, {})
FIXED_TEMP = 40 << 20
"""cuBLAS workspaces and the like, which do not grow with the shapes."""


AUTOTUNE_TEMP = 512 << 20
"""Activations and results of the candidates."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one device's memory is used for, in bytes."""

    limit: int
    """What weights, temporaries and cache may take together."""

    weights: int
    temp: int
    page_bytes: int
    num_pages: int
    """The trash page included."""

    page_size: int
    max_model_len: int
    """As asked for, or what fits where "auto" was asked for."""

    @property
    def num_tokens(self) -> int:
        """Tokens the cache holds."""
        return (self.num_pages - 1) * self.page_size

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    def summary(self) -> str:
        """Returns the one line that is shown at start."""
        share = self.num_tokens / self.max_model_len
        return (
            f"KV cache size: {self.num_tokens:,} tokens ({self.cache_bytes / GIB:.2f} GiB), "
            f"Maximum concurrency for {self.max_model_len:,} tokens per request: {share:.2f}x"
        )


def temp_bound(
    config: ModelConfig,
    engine: EngineConfig,
    buckets: Sequence[Bucket],
    layout: Layout = ONE_DEVICE,
) -> int:
    """Returns at least the temporary bytes of every program up to these buckets, on a device.

    Per token: the residual stream, the widest of qkv and gate/up, in the model's
    dtype and in float32. Per row that samples: copies of its logits. For attention,
    which does chunks and decodes one after the other: gathered keys and values and
    their masked copy, and scores in float32, of one group of query blocks or of rows.
    Each has of heads, mlp and vocabulary what the layout gives to one device.
    """
    size = 2 if engine.dtype in ("bfloat16", "float16") else 4
    num_heads = config.num_heads // layout.split("q_heads")
    head_width = num_heads * config.head_dim
    kv_width = config.num_kv_heads // layout.split("kv_heads") * config.head_dim
    mlp_dim = config.mlp_dim // layout.split("mlp")
    widest = max(2 * mlp_dim, 3 * head_width + 2 * kv_width)
    gathered = max(tuning.gather_bytes for tuning in TUNING.values())
    most = 0
    for bucket in buckets:
        keys = bucket.width * engine.page_size
        group = max(1, min(bucket.rows, gathered // (keys * kv_width * size)))
        key_bytes = keys * kv_width * (size + 4)
        scores = keys * num_heads * 4
        tokens = bucket.tokens * (4 * config.embed_dim + 2 * widest + 2 * head_width) * (size + 4)
        logits = 4 * bucket.rows * config.num_logits // layout.split("vocab") * 4
        at_once = max(
            tuning.blocks_at_once(engine.block_q, num_heads, keys) for tuning in TUNING.values()
        )
        block = at_once * (2 * key_bytes + 3 * engine.block_q * scores)
        rows = 3 * group * (key_bytes + scores)
        most = max(most, tokens + logits + max(block, rows))
    return most + FIXED_TEMP


def counts_bytes(config: ModelConfig, engine: EngineConfig) -> int:
    """Returns the bytes of `DeviceState.token_counts`, over all devices."""
    return (engine.max_num_seqs + 1) * config.num_logits * 4


def autotune_bytes(largest_weight: int) -> int:
    """Returns what XLA takes on a GPU while it times candidates for a matrix product.

    It makes operands and a result of its own, beside everything that is held: seen to
    fail on an H100 where 40 MiB were free.

    Args:
        largest_weight: Bytes of the largest parameter on a device.
    """
    return largest_weight + AUTOTUNE_TEMP


def plan_memory(
    *,
    engine: EngineConfig,
    limit: int,
    weights: int,
    temp: int,
    token_bytes: int,
    cache_bytes: int | None,
    fit_length: bool,
) -> MemoryPlan:
    """Returns the number of pages, or says which numbers would fit.

    Args:
        engine: How the engine runs; `max_model_len` is what was asked for.
        limit: Bytes that may be used on each device.
        weights: Bytes of parameters on each device.
        temp: Of `temp_bound`.
        token_bytes: Bytes of one token in the cache, on each device.
        cache_bytes: Bytes for the cache, if the caller fixed them.
        fit_length: Whether to shorten `max_model_len` to what fits.

    Raises:
        ConfigError: Not even one sequence of `max_model_len` fits.
    """
    page_bytes = token_bytes * engine.page_size
    available = limit - weights - temp if cache_bytes is None else cache_bytes
    num_pages = max(0, available) // page_bytes
    num_tokens = max(0, num_pages - 1) * engine.page_size
    length = engine.max_model_len
    if num_tokens < length and fit_length and num_tokens > 0:
        length = num_tokens
    elif num_tokens < length:
        raise ConfigError(_too_small(engine, limit, weights, temp, page_bytes, available))
    return MemoryPlan(limit, weights, temp, page_bytes, num_pages, engine.page_size, length)


def _too_small(
    engine: EngineConfig, limit: int, weights: int, temp: int, page_bytes: int, available: int
) -> str:
    needed = (engine.pages_per_seq + 1) * page_bytes
    fits = max(0, available // page_bytes - 1) * engine.page_size
    numbers = (
        f"weights take {weights / GIB:.3f} GiB and temporaries {temp / GIB:.3f} GiB of the "
        f"{limit / GIB:.3f} GiB that may be used"
    )
    if weights > limit:
        return (
            f"The model does not fit: {numbers}. Use dtype='bfloat16' if it is float32, a smaller "
            "model, or raise gpu_memory_utilization."
        )
    if fits == 0:
        return (
            f"No available memory for the cache blocks: {numbers}. Try increasing "
            "`gpu_memory_utilization`, lower max_num_batched_tokens or max_num_seqs, or pass "
            f"kv_cache_memory_bytes={needed}."
        )
    return (
        f"To serve at least one request with the model's max seq len ({engine.max_model_len}), "
        f"{needed / GIB:.3f} GiB KV cache is needed, which is larger than the available "
        f"{max(0, available) / GIB:.3f} GiB ({numbers}). The estimated maximum model length is "
        f"{fits}: pass max_model_len={fits} (or 'auto'), or kv_cache_memory_bytes={needed}, or "
        "raise gpu_memory_utilization."
    )
