import dataclasses
import re

import numpy as np
import pytest

from jaxllm.buckets import Bucket, Buckets
from jaxllm.cache.memory import FIXED_TEMP, GIB, MemoryPlan, plan_memory, temp_bound
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.modeling.config import ModelConfig, RopeConfig
from jaxllm.sharding.layouts import Layout

ENGINE = EngineConfig(max_model_len=100, max_num_seqs=4, max_num_batched_tokens=64, page_size=16)

MODEL = ModelConfig(
    family="llama",
    vocab_size=1000,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=128,
    norm_eps=1e-6,
    activation="silu",
    rope=RopeConfig(),
    tie_embeddings=True,
)


def plan(engine=ENGINE, **given):
    """A page takes 16 * 10 bytes; of 5000 bytes, 2000 are left for them."""
    defaults = {"limit": 5000, "weights": 2000, "temp": 1000, "token_bytes": 10}
    defaults |= {"cache_bytes": None, "fit_length": False}
    return plan_memory(engine=engine, **{**defaults, **given})


def advised(error, name):
    """The number that a message tells to type."""
    return int(re.search(rf"{name}=(\d+)", str(error.value)).group(1))


# -------------------------------------------------------------------- plan_memory


def test_pages_fill_what_weights_and_temporaries_leave():
    memory = plan()

    assert memory == MemoryPlan(
        limit=5000,
        weights=2000,
        temp=1000,
        page_bytes=160,
        num_pages=2000 // 160,
        page_size=16,
        max_model_len=100,
    )


def test_the_trash_page_holds_no_tokens_and_takes_bytes():
    memory = plan()

    assert memory.num_tokens == (12 - 1) * 16
    assert memory.cache_bytes == 12 * 160


def test_bytes_that_the_caller_fixed_are_used_as_they_are():
    assert plan(cache_bytes=160 * 20 + 159).num_pages == 20


def test_one_sequence_of_full_length_and_the_trash_page_are_enough():
    memory = plan(cache_bytes=(7 + 1) * 160)

    assert memory.num_tokens >= ENGINE.max_model_len


def test_a_cache_for_less_than_one_sequence_is_refused_with_what_would_fit():
    with pytest.raises(
        ConfigError,
        match=r"To serve at least one request with the model's max seq len \(100\).*"
        r"The estimated maximum model length is 48: pass max_model_len=48 \(or 'auto'\), "
        r"or kv_cache_memory_bytes=1280, or raise gpu_memory_utilization",
    ):
        plan(cache_bytes=4 * 160)


def test_no_room_for_any_page_is_refused_with_the_numbers():
    with pytest.raises(
        ConfigError,
        match=r"No available memory for the cache blocks: weights take 2\.000 GiB and temporaries "
        r"1\.000 GiB of the 3\.000 GiB that may be used\. Try increasing "
        r"`gpu_memory_utilization`.*kv_cache_memory_bytes=1280\.",
    ):
        plan(limit=3 * GIB, weights=2 * GIB, temp=GIB)


def test_weights_that_do_not_fit_are_refused_with_what_would_help():
    with pytest.raises(
        ConfigError,
        match=r"The model does not fit: weights take 4\.000 GiB.*Use dtype='bfloat16'",
    ):
        plan(limit=3 * GIB, weights=4 * GIB, temp=GIB)


@pytest.mark.parametrize("num_pages", [0, 1])
def test_length_auto_does_not_help_where_no_token_fits(num_pages):
    with pytest.raises(ConfigError, match="No available memory for the cache blocks"):
        plan(cache_bytes=num_pages * 160, fit_length=True)


def test_length_auto_is_shortened_to_what_fits():
    memory = plan(cache_bytes=4 * 160, fit_length=True)

    assert memory.max_model_len == memory.num_tokens == 48


def test_length_auto_is_left_alone_where_it_fits():
    assert plan(fit_length=True).max_model_len == 100


@pytest.mark.parametrize("seed", range(30))
def test_following_the_message_fits_and_not_a_bit_too_far(seed):
    rng = np.random.default_rng(seed)
    engine = EngineConfig(
        max_model_len=int(rng.integers(40, 500)), page_size=int(2 ** rng.integers(0, 6))
    )
    token_bytes = int(rng.integers(1, 50))
    whole = (engine.pages_per_seq + 1) * engine.page_size * token_bytes
    given = {"token_bytes": token_bytes, "weights": 70, "temp": 30}
    given["limit"] = 100 + int(rng.integers(0, whole))

    with pytest.raises(ConfigError) as error:
        plan(engine, **given)

    needed = advised(error, "kv_cache_memory_bytes")
    assert plan(engine, **given, cache_bytes=needed).num_tokens >= engine.max_model_len
    with pytest.raises(ConfigError):
        plan(engine, **given, cache_bytes=needed - 1)
    if "max_model_len=" in str(error.value):
        length = advised(error, "max_model_len")
        shorter = dataclasses.replace(engine, max_model_len=length)
        longer = dataclasses.replace(engine, max_model_len=length + 1)
        assert plan(shorter, **given).max_model_len == length
        assert plan(engine, **given, fit_length=True).max_model_len == length
        with pytest.raises(ConfigError):
            plan(longer, **given)


def test_the_summary_says_what_the_cache_holds():
    memory = MemoryPlan(
        limit=0,
        weights=0,
        temp=0,
        page_bytes=GIB // 100,
        num_pages=151,
        page_size=16,
        max_model_len=1000,
    )

    assert memory.summary() == (
        "KV cache size: 2,400 tokens (1.51 GiB), "
        "Maximum concurrency for 1,000 tokens per request: 2.40x"
    )


# -------------------------------------------------------------------- temp_bound

BUCKET = Bucket(tokens=64, rows=8, width=8, decode_rows=8, query_blocks=9)


@pytest.mark.parametrize(
    "larger", [{"tokens": 65}, {"rows": 9}, {"width": 10**6}], ids=lambda change: next(iter(change))
)
def test_a_larger_bucket_needs_more(larger):
    bucket = dataclasses.replace(BUCKET, **larger)

    assert temp_bound(MODEL, ENGINE, [bucket]) > temp_bound(MODEL, ENGINE, [BUCKET])


def test_the_bound_is_that_of_the_worst_bucket():
    small, large = Bucket(16, 8, 8, 8, 9), Bucket(2048, 64, 8, 64, 100)

    both = temp_bound(MODEL, ENGINE, [large, small])

    assert both == temp_bound(MODEL, ENGINE, [large]) > temp_bound(MODEL, ENGINE, [small])


def test_the_bound_counts_three_copies_of_the_logits_at_least():
    wide = dataclasses.replace(MODEL, vocab_size=MODEL.vocab_size + 1000)

    grown = temp_bound(wide, ENGINE, [BUCKET]) - temp_bound(MODEL, ENGINE, [BUCKET])

    assert grown >= 3 * BUCKET.rows * 1000 * 4


@pytest.mark.parametrize("axis", ["q_heads", "kv_heads", "mlp", "vocab"])
def test_what_is_split_is_counted_for_one_device(axis):
    layout = Layout("halves", {"tensor": 2}, {axis: "tensor"})
    model = dataclasses.replace(MODEL, mlp_dim=10 * MODEL.mlp_dim)  # wider than qkv
    if axis.endswith("heads"):
        model = MODEL

    assert temp_bound(model, ENGINE, [BUCKET], layout) < temp_bound(model, ENGINE, [BUCKET])


def test_the_residual_stream_is_whole_on_every_device():
    layout = Layout("all", {"tensor": 2}, dict.fromkeys(("q_heads", "kv_heads", "mlp"), "tensor"))
    wide = dataclasses.replace(MODEL, embed_dim=MODEL.embed_dim + 1000)

    grown = temp_bound(wide, ENGINE, [BUCKET], layout) - temp_bound(MODEL, ENGINE, [BUCKET], layout)

    assert grown >= 4 * BUCKET.tokens * 1000 * 4


def test_numbers_of_16_bits_need_less():
    half = dataclasses.replace(ENGINE, dtype="bfloat16")

    assert temp_bound(MODEL, half, [BUCKET]) < temp_bound(MODEL, ENGINE, [BUCKET])


def test_no_bucket_needs_less_than_the_fixed_part():
    assert temp_bound(MODEL, ENGINE, []) == FIXED_TEMP


def test_the_largest_buckets_bound_all_smaller_ones():
    buckets = Buckets(ENGINE)
    every = [buckets.decode(rows, width) for rows in buckets.rows for width in buckets.widths]
    every += [
        buckets.mixed(tokens, rows, width, with_decodes=decodes)
        for tokens in buckets.tokens
        for rows in buckets.mixed_rows
        for width in buckets.widths
        for decodes in (False, True)
    ]

    assert temp_bound(MODEL, ENGINE, every) == temp_bound(MODEL, ENGINE, buckets.largest())
