"""From a plan to the packed inputs of a program: the host's half of a step.

NumPy only. Padding is chosen so that the device needs no special case: a padded
token writes into the trash page (slot 0 and on), a padded row has length 0 and
the spare row of the device state.
"""

import numpy as np

from jaxllm.buckets import Bucket
from jaxllm.config import EngineConfig
from jaxllm.flags import SamplingFlags
from jaxllm.inputs import FROM_DEVICE, fields, pack
from jaxllm.sequence import MAX_STOP_IDS, PlannedRow, Sequence, StepPlan

MASK32 = 0xFFFFFFFF

NEUTRAL = {
    "top_k": np.iinfo(np.int32).max,
    "top_p": 1,
    "repetition_penalty": 1,
    "mask": MASK32,
}
"""What changes nothing, where that is not 0: for padding, and for rows that ask for nothing."""

FLOAT32 = (np.finfo(np.float32).tiny, np.finfo(np.float32).max)
"""What a factor may be: as 0 or infinity it would make NaN of a logit."""


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


def pack_plan(
    plan: StepPlan, bucket: Bucket, flags: SamplingFlags, config: EngineConfig
) -> np.ndarray:
    """Returns the packed inputs of one step; `inputs.fields` says what is in them."""
    values = {
        name: np.zeros(shape, dtype) for name, (shape, dtype) in fields(bucket, flags).items()
    }
    values["rows"][:] = config.max_num_seqs
    values["stop_ids"][:] = -1
    values["num_tokens"] += plan.num_tokens
    values["num_decodes"] += plan.num_decodes
    for name, neutral in NEUTRAL.items():
        if name in values:
            values[name][:] = neutral
    at = 0
    for i, row in enumerate(plan.rows):
        _fill_row(values, i, row)
        if row.samples:
            _fill_sampling(values, i, row.seq)
        if len(row.scored()) and "scored" in values:
            _fill_scored(values, row, at)
        at = _fill_tokens(values, i, row, at, config)
    if not bucket.is_decode:
        _fill_blocks(values, plan, config.block_q, bucket.tokens)
    return pack(bucket, flags, values)


def _fill_row(values: dict[str, np.ndarray], i: int, row: PlannedRow) -> None:
    """What there is once a row."""
    seq = row.seq
    values["rows"][i] = seq.row
    # A prompt that comes in chunks holds pages for all of it: the later ones wait.
    pages = seq.pages[: values["page_table"].shape[2]]
    values["page_table"][0, i, : len(pages)] = pages
    values["kv_lens"][i] = row.stop
    if row.samples:
        values["limits"][i] = row.limit
        stop_ids = seq.stop_ids()[:MAX_STOP_IDS]
        values["stop_ids"][i, : len(stop_ids)] = stop_ids


def _fill_sampling(values: dict[str, np.ndarray], i: int, seq: Sequence) -> None:
    """How a row's token is chosen."""
    params, rules = seq.params, seq.rules
    values["temperature"][i] = params.temperature
    values["seeds"][i] = (seq.seed & MASK32, seq.seed >> 32 & MASK32)
    for name in ("min_p", "top_p", "frequency_penalty", "presence_penalty"):
        if name in values:
            values[name][i] = getattr(params, name)
    if "repetition_penalty" in values:
        values["repetition_penalty"][i] = np.clip(params.repetition_penalty, *FLOAT32)
    if "top_k" in values and params.top_k:
        values["top_k"][i] = min(params.top_k, NEUTRAL["top_k"])
    if "edit_ids" in values or "mask" in values:
        ruling = rules.now(seq.prompt_token_ids, seq.output_token_ids)
        count = len(ruling.ids)
        if count:
            values["edit_ids"][i, :count] = ruling.ids
            values["edit_values"][i, :count] = ruling.values
            values["edit_until"][i, :count] = ruling.until
        if ruling.mask is not None:
            values["mask"][i] = ruling.mask
    if "logprob_ids" in values:
        ids = params.logprob_token_ids or ()
        values["logprob_ids"][i, : len(ids)] = ids


def _fill_scored(values: dict[str, np.ndarray], row: PlannedRow, at: int) -> None:
    """Adds a row's tokens whose successors are scored; its tokens begin at `at`."""
    scoring, positions = row.seq.scoring, row.scored()
    if scoring is None:
        return
    begin = int(values["num_scored"])
    end = begin + len(positions)
    first = at + positions.start - row.start
    values["scored"][begin:end] = np.arange(first, first + len(positions))
    values["targets"][begin:end] = scoring.targets[positions.start : positions.stop]
    values["num_scored"] += len(positions)


def _fill_tokens(
    values: dict[str, np.ndarray], i: int, row: PlannedRow, at: int, config: EngineConfig
) -> int:
    """What there is once a token; returns where the next row's tokens begin."""
    start, stop, end = row.start, row.stop, at + row.num_tokens
    # What the launch before this one samples is not here yet, and is a row's only token.
    is_known = start < row.seq.num_tokens
    values["tokens"][at:end] = row.seq.tokens(start, stop) if is_known else FROM_DEVICE
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
