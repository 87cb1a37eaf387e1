"""Whether a sequence ends with its newest token, and why. No JAX here.

The order is vLLM's: end-of-sequence token, stop token, length, repetition; then
stop strings, whose finding replaces any of the others.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from typing import TYPE_CHECKING

from jaxllm.sequence import Sequence

if TYPE_CHECKING:
    from jaxllm.sampling_params import RepetitionDetectionParams


def end_if_done(seq: Sequence, max_model_len: int) -> None:
    """Sets the finish and stop reasons of a sequence that its last token ends."""
    token, params = seq.output_token_ids[-1], seq.params
    is_stop_token = token in seq.stop_ids()
    if is_stop_token:
        is_eos = token == seq.eos_token_id and not params.ignore_eos
        seq.finish_reason, seq.stop_reason = "stop", None if is_eos else token
    elif seq.remaining(max_model_len) <= 0:
        seq.finish_reason = "length"
    elif (
        params.repetition_detection is not None
        and len(seq.output_token_ids) >= params.min_tokens
        and repeats(seq.output_token_ids, params.repetition_detection)
    ):
        seq.finish_reason, seq.stop_reason = "repetition", "repetition_detected"
    if seq.text is not None:
        found = seq.text.append(token, is_stop_token=is_stop_token)
        if found is not None:
            seq.finish_reason, seq.stop_reason = "stop", found
        elif seq.is_finished:
            seq.text.finish()


def repeats(tokens: TokenIds[int], rule: RepetitionDetectionParams) -> bool:
    """Whether tokens end with one pattern, as often in a row as the rule says."""
    for size in range(max(1, rule.min_pattern_size), rule.max_pattern_size + 1):
        span = size * rule.min_count
        if span > len(tokens):
            return False
        tail = tokens[len(tokens) - span :]
        if tail[size:] == tail[:-size]:
            return True
    return False
