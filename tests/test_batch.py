import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.batch import pack_plan, slots
from jaxllm.buckets import Bucket, Buckets
from jaxllm.config import EngineConfig
from jaxllm.flags import flags_of
from jaxllm.inputs import FROM_DEVICE, unpack
from jaxllm.scheduler import Scheduler
from jaxllm.sequence import MAX_STOP_IDS, PlannedRow, StepPlan
from tests.fake import FakeDevice, make_sequence

CONFIG = EngineConfig(
    max_model_len=200, max_num_seqs=4, max_num_batched_tokens=32, page_size=4, block_q=4
)
SPARE_ROW = CONFIG.max_num_seqs


def row(num_tokens, *, computed=0, pages=(), row=0, prompt=None, limit=1, output=(), **settings):
    """A planned row of a sequence that runs."""
    seq = make_sequence(prompt=prompt or range(computed + num_tokens - len(output)), **settings)
    seq.output_token_ids += output
    seq.pages = list(pages) or list(range(1, 2 + (computed + num_tokens) // CONFIG.page_size))
    seq.row = row
    return PlannedRow(seq, computed, num_tokens, limit)


def packed(*rows, lookahead=1, config=CONFIG) -> tuple[SimpleNamespace, Bucket]:
    """Packs rows and reads the buffer back: all inputs by name, as NumPy arrays."""
    num_decodes = sum(r.num_tokens == 1 for r in rows)
    plan = StepPlan(rows=rows, num_decodes=num_decodes, lookahead=lookahead)
    bucket = Buckets(config).of(plan)
    flags = flags_of(rows)
    inputs = vars(unpack(bucket, flags, pack_plan(plan, bucket, flags, config)))
    for part in ("sampling", "chunks", "score"):
        inputs |= vars(inputs.pop(part) or SimpleNamespace())
    arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    return SimpleNamespace(**arrays), bucket


# -------------------------------------------------------------------- slots


def test_slots_follow_the_pages_of_a_sequence():
    pages = np.array([7, 2, 5], np.int32)

    assert slots(pages, 0, 12, 4).tolist() == [28, 29, 30, 31, 8, 9, 10, 11, 20, 21, 22, 23]


def test_slots_may_begin_and_end_within_a_page():
    pages = np.array([7, 2, 5], np.int32)

    assert slots(pages, 3, 9, 4).tolist() == [31, 8, 9, 10, 11, 20]


def test_no_positions_have_no_slots():
    assert slots(np.array([7], np.int32), 2, 2, 4).tolist() == []


# -------------------------------------------------------------------- tokens


def test_a_chunk_brings_its_own_tokens_and_their_positions():
    inputs, _ = packed(row(5, computed=4, prompt=[10, 11, 12, 13, 14, 15, 16, 17, 18]))

    assert inputs.tokens[:5].tolist() == [14, 15, 16, 17, 18]
    assert inputs.positions[0, :5].tolist() == [4, 5, 6, 7, 8]


def test_a_decode_brings_the_last_token():
    inputs, bucket = packed(row(1, computed=4, prompt=[1, 2, 3], output=[8, 9]))

    assert bucket.is_decode
    assert inputs.num_tokens == 1
    assert inputs.tokens[0] == 9
    assert inputs.positions[0, 0] == 4
    assert inputs.kv_lens[0] == 5


def test_a_sequence_computed_again_brings_prompt_and_output():
    inputs, _ = packed(row(5, prompt=[1, 2, 3], output=[8, 9]))

    assert inputs.tokens[:5].tolist() == [1, 2, 3, 8, 9]


def test_decodes_come_first_so_that_token_i_is_of_row_i():
    inputs, _ = packed(
        row(1, computed=2, prompt=[1, 2, 31], row=3),
        row(1, computed=1, prompt=[1, 32], row=1),
        row(3, prompt=[41, 42, 43], row=0),
    )

    assert inputs.num_decodes == 2
    assert inputs.num_tokens == 5
    assert inputs.tokens[:5].tolist() == [31, 32, 41, 42, 43]
    assert inputs.rows[:3].tolist() == [3, 1, 0]


def test_each_token_is_written_where_its_sequence_says():
    inputs, _ = packed(
        row(1, computed=5, pages=[9, 3]),
        row(6, computed=2, pages=[8, 6]),
    )

    assert inputs.slot_mapping[0, :7].tolist() == [13, 34, 35, 24, 25, 26, 27]


def test_logits_are_taken_of_the_last_token_of_each_row():
    inputs, _ = packed(row(1, computed=5), row(6), row(3))

    assert inputs.logit_rows[:3].tolist() == [0, 6, 9]


def test_the_page_table_holds_each_rows_pages():
    inputs, _ = packed(row(1, computed=5, pages=[9, 3]), row(1, computed=9, pages=[4, 8, 1]))

    assert inputs.page_table[0, :2, :4].tolist() == [[9, 3, 0, 0], [4, 8, 1, 0]]


def test_pages_of_later_chunks_are_left_out_of_a_narrow_page_table():
    # A sequence is admitted with pages for its whole prompt, and computes a part of it.
    pages = list(range(1, 41))
    inputs, bucket = packed(row(30, pages=pages, prompt=range(160), limit=0))

    assert bucket.width == 8
    assert inputs.page_table[0, 0].tolist() == pages[:8]
    assert inputs.slot_mapping[0, :30].tolist() == list(range(4, 34))


# -------------------------------------------------------------------- padding


@pytest.mark.parametrize("num_tokens", [1, 3], ids=["decode", "mixed"])
def test_padded_rows_are_empty_and_use_the_spare_row(num_tokens):
    inputs, bucket = packed(row(num_tokens, row=2, temperature=1.0, stop_token_ids=[5]))

    assert bucket.rows > 1
    assert inputs.rows.tolist() == [2] + [SPARE_ROW] * (bucket.rows - 1)
    assert not inputs.kv_lens[1:].any()
    assert not inputs.limits[1:].any()
    assert not inputs.temperature[1:].any()
    assert not inputs.page_table[:, 1:].any()
    assert (inputs.stop_ids[1:] == -1).all()


def test_padded_tokens_go_to_the_trash_page():
    inputs, bucket = packed(row(3))

    assert bucket.tokens > 3
    assert (inputs.slot_mapping[0, 3:] < CONFIG.page_size).all()


def test_padded_entries_of_the_page_table_are_the_trash_page():
    inputs, bucket = packed(row(1, computed=5, pages=[9, 3]))

    assert bucket.width > 2
    assert not inputs.page_table[0, 0, 2:].any()


def test_logits_of_padded_rows_are_taken_of_some_token_of_the_step():
    inputs, bucket = packed(row(3))

    assert ((inputs.logit_rows >= 0) & (inputs.logit_rows < bucket.tokens)).all()


# -------------------------------------------------------------------- sampling


def test_a_seed_travels_as_its_low_and_its_high_word():
    inputs, _ = packed(
        row(1, computed=2, seed=0x0123_4567_89AB_CDEF), row(1, computed=2, seed=2**64 - 1)
    )

    assert inputs.seeds[:2].tolist() == [[0x89ABCDEF, 0x01234567], [2**32 - 1, 2**32 - 1]]


def test_a_row_that_samples_brings_its_temperature_and_stop_tokens():
    inputs, _ = packed(row(3, temperature=0.7, eos=(6,), stop_token_ids=[5, 4]))

    assert inputs.temperature[0] == np.float32(0.7)
    assert inputs.stop_ids[0].tolist() == [6, 5, 4, -1, -1, -1, -1, -1]
    assert inputs.limits[0] == 1


def test_a_row_that_does_not_sample_brings_none_of_it():
    inputs, _ = packed(row(3, limit=0, seed=5, temperature=0.7, stop_token_ids=[5]), row(3, row=1))

    assert inputs.limits[:2].tolist() == [0, 1]
    assert inputs.temperature[0] == 0
    assert inputs.seeds[0].tolist() == [0, 0]
    assert (inputs.stop_ids[0] == -1).all()


def test_stop_tokens_beyond_those_that_fit_stay_on_the_host():
    inputs, _ = packed(row(3, stop_token_ids=range(20, 40)))

    assert inputs.stop_ids[0].tolist() == list(range(20, 20 + MAX_STOP_IDS))


def test_a_row_brings_how_many_tokens_it_may_generate():
    inputs, _ = packed(row(1, computed=3, limit=5), row(1, row=1, limit=8), lookahead=8)

    assert inputs.limits[:2].tolist() == [5, 8]


def test_a_token_that_only_the_device_knows_is_taken_from_there():
    ahead = row(1, computed=4, prompt=[1, 2, 3, 4])  # the fifth is being sampled

    inputs, _ = packed(ahead, row(1, row=1))

    assert inputs.tokens[:2].tolist() == [FROM_DEVICE, 0]
    assert (inputs.positions[0, 0], inputs.kv_lens[0]) == (4, 5)


# -------------------------------------------------------------------- query blocks


def tokens_of_blocks(inputs, block_q):
    """The tokens that query blocks cover, as kernels read them: up to the row's last."""
    covered = []
    for i in range(int(inputs.num_blocks)):
        seq, start = int(inputs.q_block_seq[i]), int(inputs.q_block_start[i])
        stop = min(start + block_q, int(inputs.logit_rows[seq]) + 1)
        covered += [(seq, token) for token in range(start, stop)]
    return covered


@pytest.mark.parametrize("block_q", [1, 4, 64])
@pytest.mark.parametrize(
    "sizes",
    [[2], [4], [5], [3, 4, 5], [1, 1, 6], [1, 8, 8], [1, 2, 20, 2]],
    ids=lambda sizes: "+".join(map(str, sizes)),
)
def test_query_blocks_cover_each_token_of_a_chunk_once_and_in_order(sizes, block_q):
    config = dataclasses.replace(CONFIG, block_q=block_q)

    inputs, _ = packed(*(row(size, row=i) for i, size in enumerate(sizes)), config=config)

    num_decodes = sizes.count(1)
    rows = np.repeat(np.arange(len(sizes)), sizes)[num_decodes:]
    expected = list(zip(rows.tolist(), range(num_decodes, sum(sizes)), strict=True))
    assert tokens_of_blocks(inputs, block_q) == expected


def test_unused_query_blocks_start_after_the_last_token():
    inputs, bucket = packed(row(5), row(3, row=1))

    assert inputs.num_blocks == 3
    assert inputs.q_block_start.tolist() == [0, 4, 5] + [bucket.tokens] * (bucket.query_blocks - 3)


def test_decodes_take_no_query_blocks():
    inputs, _ = packed(row(1, computed=4), row(1, computed=4, row=1), row(2, row=2))

    assert inputs.num_blocks == 1
    assert (inputs.q_block_seq[0], inputs.q_block_start[0]) == (2, 2)


# -------------------------------------------------------------------- all together


@pytest.mark.parametrize("seed", range(3))
def test_every_plan_of_a_random_load_packs(seed):
    rng = np.random.default_rng(seed)
    config = EngineConfig(
        max_model_len=100, max_num_seqs=8, max_num_batched_tokens=24, page_size=4, block_q=4
    )
    scheduler, device = Scheduler(config, num_pages=60), FakeDevice(config.page_size)
    for i in range(12):
        prompt = rng.integers(0, 11, rng.integers(1, 70)).tolist()
        scheduler.add(make_sequence(f"{i}", prompt, arrival=i, max_tokens=20))

    while scheduler.has_work:
        plan = scheduler.schedule()
        inputs, bucket = packed(*plan.rows, config=config)
        written = [device.slot(r.seq, p) for r in plan.rows for p in range(r.start, r.stop)]
        if not bucket.is_decode:
            assert inputs.slot_mapping[0, : plan.num_tokens].tolist() == written
        for i, r in enumerate(plan.rows):
            used = -(-int(inputs.kv_lens[i]) // config.page_size)
            assert inputs.page_table[0, i, :used].tolist() == r.seq.pages[:used]
        scheduler.update(plan, device.run(plan))

    assert scheduler.num_preemptions > 0


@pytest.mark.parametrize("penalty", [1e39, 1e-50])
def test_a_penalty_that_float32_cannot_hold_makes_no_nan(penalty):
    inputs, _ = packed(row(1, repetition_penalty=penalty, output=[1]))

    assert np.isfinite(inputs.repetition_penalty[0])
    assert inputs.repetition_penalty[0] > 0
