import numpy as np
import pytest

from jaxllm.buckets import (
    Buckets,
    at_least,
    powers_of_two,
)
from jaxllm.config import EngineConfig
from jaxllm.sequence import PlannedRow, StepPlan
from tests.fake import make_sequence

CONFIG = EngineConfig(
    max_model_len=1000, max_num_seqs=32, max_num_batched_tokens=300, page_size=8, block_q=16
)


def make_plan(rows, **settings):
    """A plan of (tokens already computed, tokens to compute, whether it samples)."""
    planned = []
    for computed, num_tokens, samples in sorted(rows, key=lambda row: row[1] > 1):
        seq = make_sequence(prompt=[1] * (computed + num_tokens + (not samples)))
        planned.append(PlannedRow(seq, computed, num_tokens, limit=int(samples)))
    num_decodes = sum(row.num_tokens == 1 for row in planned)
    return StepPlan(rows=tuple(planned), num_decodes=num_decodes, **settings)


@pytest.mark.parametrize(
    ("smallest", "largest", "sizes"),
    [
        (2, 1, (2,)),
        (2, 2, (2,)),
        (2, 3, (2, 4)),
        (8, 64, (8, 16, 32, 64)),
        (16, 100, (16, 32, 64, 128)),
    ],
)
def test_powers_of_two_end_with_one_that_holds_the_largest(smallest, largest, sizes):
    assert powers_of_two(smallest, largest) == sizes


@pytest.mark.parametrize(("needed", "size"), [(0, 2), (2, 2), (3, 8), (8, 8)])
def test_at_least_gives_the_smallest_size_that_holds(needed, size):
    assert at_least((2, 8), needed) == size


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 16, 17, 64, 100, 512, 2048, 8192])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 8, 9, 64, 256])
def test_the_largest_sizes_hold_what_the_config_allows(max_num_seqs, max_num_batched_tokens):
    config = EngineConfig(
        max_model_len=1000,
        max_num_seqs=min(max_num_seqs, max_num_batched_tokens),
        max_num_batched_tokens=max_num_batched_tokens,
    )
    buckets = Buckets(config)

    decode, mixed = buckets.largest()

    assert decode.rows >= config.max_num_seqs
    assert mixed.rows >= config.max_num_seqs
    assert mixed.tokens >= config.max_num_batched_tokens
    assert decode.width * config.page_size >= config.max_model_len
    assert mixed.width == decode.width


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 16, 17, 64, 100, 512, 2048, 8192])
def test_sizes_ascend(max_num_batched_tokens):
    config = EngineConfig(
        max_model_len=5000, max_num_seqs=1, max_num_batched_tokens=max_num_batched_tokens
    )
    buckets = Buckets(config)

    for sizes in (buckets.rows, buckets.mixed_rows, buckets.tokens, buckets.widths):
        assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("min_rows", [1, 2])
def test_a_batch_of_one_has_as_many_rows_as_the_engine_says(min_rows):
    config = EngineConfig(max_model_len=100, max_num_seqs=1, min_rows=min_rows)

    decode = Buckets(config).of(make_plan([(5, 1, True)]))

    assert decode.rows == min_rows


def test_the_default_engine_uses_few_sizes():
    buckets = Buckets(EngineConfig(max_model_len=4096))

    assert buckets.rows == (2, 4, 8, 16, 32, 64)
    assert buckets.mixed_rows == (8, 64)
    assert buckets.tokens == (16, 64, 128, 256, 512, 1024, 2048)
    assert buckets.widths == (8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("max_model_len", "widths"),
    [(1000, (63,)), (4096, (256,)), (4097, (256, 512)), (20_000, (256, 512, 1024, 2048))],
)
def test_the_narrowest_table_is_as_wide_as_the_engine_says(max_model_len, widths):
    assert Buckets(EngineConfig(max_model_len=max_model_len, min_width=256)).widths == widths


def test_rows_that_all_decode_make_a_decode_step():
    bucket = Buckets(CONFIG).of(make_plan([(5, 1, True)] * 5))

    assert bucket.is_decode
    assert (bucket.tokens, bucket.rows, bucket.decode_rows) == (8, 8, 8)


def test_a_chunk_makes_a_mixed_step():
    bucket = Buckets(CONFIG).of(make_plan([(5, 1, True), (0, 20, True)]))

    assert not bucket.is_decode
    assert (bucket.tokens, bucket.rows, bucket.decode_rows) == (64, 8, 8)


def test_a_mixed_step_of_chunks_alone_has_no_room_for_decodes():
    bucket = Buckets(CONFIG).of(make_plan([(0, 20, True)]))

    assert bucket.decode_rows == 0


def test_a_mixed_step_with_many_rows_has_room_for_the_most():
    bucket = Buckets(CONFIG).of(make_plan([(0, 2, True)] * 9))

    assert bucket.rows == 32


def test_no_more_rows_may_decode_than_a_step_has_tokens():
    bucket = Buckets(CONFIG).mixed(16, 32, 8, with_decodes=True)

    assert bucket.decode_rows == 16


def test_one_token_that_does_not_sample_makes_a_mixed_step():
    # A chunk that was cut to one token: a decode program would sample from it.
    bucket = Buckets(CONFIG).of(make_plan([(5, 1, True), (0, 1, False)]))

    assert not bucket.is_decode
    assert bucket.decode_rows > 0


@pytest.mark.parametrize(("computed", "width"), [(0, 8), (62, 8), (63, 8), (64, 16), (999, 128)])
def test_the_page_table_is_as_wide_as_the_longest_row_needs(computed, width):
    bucket = Buckets(CONFIG).of(make_plan([(computed, 1, True), (3, 1, True)]))

    assert bucket.width == width


def test_the_page_table_holds_the_tokens_of_a_lookahead_too():
    buckets = Buckets(CONFIG)

    one = buckets.of(make_plan([(63, 1, True)]))
    two = buckets.of(make_plan([(63, 1, True)], lookahead=2))

    assert (one.width, two.width) == (8, 16)


@pytest.mark.parametrize("seed", range(20))
def test_there_are_query_blocks_for_any_cut_of_the_tokens_into_rows(seed):
    rng = np.random.default_rng(seed)
    buckets = Buckets(CONFIG)
    sizes = rng.integers(2, 40, rng.integers(1, 9))
    plan = make_plan([(0, int(size), True) for size in sizes])

    bucket = buckets.of(plan)

    assert sum(-(-size // CONFIG.block_q) for size in sizes) <= bucket.query_blocks


def test_a_bucket_can_key_a_cache_of_programs():
    first, second = (Buckets(CONFIG).of(make_plan([(0, size, True)])) for size in (17, 60))

    assert first == second
    assert hash(first) == hash(second)


def test_a_lookahead_past_the_longest_sequence_needs_no_wider_page_table():
    # Rows that end in a launch go on as padding; 1024 tokens fill the widest table exactly.
    config = EngineConfig(max_model_len=1024, page_size=16, max_decode_steps=8)

    bucket = Buckets(config).of(make_plan([(1020, 1, True)], lookahead=8))

    assert bucket.width == 64
