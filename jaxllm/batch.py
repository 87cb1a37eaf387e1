"""From a plan to the packed inputs of a program: the host's half of a step.

NumPy only. Padding is chosen so that the device needs no special case: a padded
token writes into the trash page (slot 0 and on), a padded row has length 0 and
the spare row of the device state.
"""

import numpy as np

from jaxllm.buckets import Bucket
from jaxllm.config import EngineConfig
from jaxllm.inputs import MAX_STOP_IDS, fields, pack
from jaxllm.sequence import PlannedRow, StepPlan

MASK32 = 0xFFFFFFFF


def slots(pages: np.ndarray, start: int, stop: int, page_size: int) -> np.ndarray:
    """Returns the cache slots of positions [start, stop) of one sequence.

    Args:
        pages: int32 [M], the sequence's pages in order.
        start: Position of the first token that this step computes.
        stop: One past the last.
        page_size: Tokens in a page.

    Returns:
        int32 [stop - start].
    """
    positions = np.arange(start, stop, dtype=np.int32)
    return pages[positions // page_size] * page_size + positions % page_size


def pack_plan(plan: StepPlan, bucket: Bucket, config: EngineConfig) -> np.ndarray:
    """Returns the packed inputs of one step; `inputs.fields` says what is in them."""
    values = {name: np.zeros(shape, dtype) for name, (shape, dtype) in fields(bucket).items()}
    values["rows"][:] = config.max_num_seqs
    values["stop_ids"][:] = -1
    values["num_decodes"] += plan.num_decodes
    at = 0
    for i, row in enumerate(plan.rows):
        _fill_row(values, i, row, plan, config)
        at = _fill_tokens(values, i, row, at, config)
    if not bucket.is_decode:
        _fill_blocks(values, plan, config.block_q, bucket.tokens)
    return pack(bucket, values)


def _fill_row(
    values: dict[str, np.ndarray], i: int, row: PlannedRow, plan: StepPlan, config: EngineConfig
) -> None:
    """What there is once a row."""
    seq = row.seq
    values["rows"][i] = seq.row
    # A prompt that comes in chunks holds pages for all of it: the later ones wait.
    pages = seq.pages[: values["page_table"].shape[2]]
    values["page_table"][0, i, : len(pages)] = pages
    values["kv_lens"][i] = seq.num_computed + row.num_tokens
    if row.samples:
        values["temperature"][i] = seq.params.temperature
        values["seeds"][i] = (seq.seed & MASK32, seq.seed >> 32 & MASK32)
        values["limits"][i] = min(plan.lookahead, seq.remaining(config.max_model_len))
        stop_ids = seq.stop_ids()[:MAX_STOP_IDS]
        values["stop_ids"][i, : len(stop_ids)] = stop_ids


def _fill_tokens(
    values: dict[str, np.ndarray], i: int, row: PlannedRow, at: int, config: EngineConfig
) -> int:
    """What there is once a token; returns where the next row's tokens begin."""
    start, end = row.seq.num_computed, at + row.num_tokens
    stop = start + row.num_tokens
    values["tokens"][at:end] = row.seq.tokens(start, stop)
    values["positions"][0, at:end] = np.arange(start, stop)
    if "slot_mapping" in values:
        pages = values["page_table"][0, i]
        values["slot_mapping"][0, at:end] = slots(pages, start, stop, config.page_size)
        values["logit_rows"][i] = end - 1
    return end


def _fill_blocks(
    values: dict[str, np.ndarray], plan: StepPlan, block_q: int, num_tokens: int
) -> None:
    """Cuts the chunks, which follow the decodes, into query blocks."""
    values["q_block_start"][:] = num_tokens
    at, block = plan.num_decodes, 0
    for i, row in enumerate(plan.chunks, start=plan.num_decodes):
        starts = np.arange(at, at + row.num_tokens, block_q)
        values["q_block_seq"][block : block + len(starts)] = i
        values["q_block_start"][block : block + len(starts)] = starts
        block += len(starts)
        at += row.num_tokens
    values["num_blocks"] += block
