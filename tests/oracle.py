"""What the sampler must do, for one row, in NumPy: plain, obvious and slow.

It follows the order of operations of vLLM's own description, step by step, and
knows nothing of how the device does it. All is float64; parameters are rounded to
float32 first, as they reach the device. There is one deliberate difference:
vLLM's top-p breaks ties with its threshold by the order of a sort, here they stay,
as they do for top-k in both.

A `Row` is also turned into what the device takes, so that one row can go both ways.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.batch import NEUTRAL
from jaxllm.flags import SamplingFlags
from jaxllm.inputs import IN_PROMPT, SamplingInputs, StepInputs, sampling_fields
from jaxllm.logit_rules import bitmask, rules_of
from jaxllm.sampling_params import SamplingParams

# -------------------------------------------------------------------- the order of operations


def process(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    stop_ids: Iterable[int] = (),
    bad_word_ids: Iterable[Sequence[int]] = (),
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Returns float64 [V]: the logits that a token is chosen from.

    Args:
        logits: float32 [V], of the model.
        params: Of the request.
        prompt_ids: Its prompt.
        output_ids: What it has generated.
        stop_ids: Tokens that may not come below `min_tokens`.
        bad_word_ids: The tokens of each bad word.
        mask: bool [V], tokens allowed by anything else, such as a grammar.
    """
    x = before_truncation(logits, params, prompt_ids, output_ids, stop_ids, bad_word_ids, mask)
    x = min_p(x, params.min_p)
    x = top_k(x, params.top_k)
    return top_p(x, params.top_p)


def before_truncation(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    stop_ids: Iterable[int] = (),
    bad_word_ids: Iterable[Sequence[int]] = (),
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Returns float64 [V]: the same before min-p, top-k and top-p."""
    x = np.array(logits, np.float64)
    if mask is not None:
        x[~mask] = -np.inf
    if params.allowed_token_ids:
        forbidden = np.ones(len(x), bool)
        forbidden[list(params.allowed_token_ids)] = False
        x[forbidden] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += single(bias)
    if len(output_ids) < params.min_tokens:
        x[list(stop_ids)] = -np.inf
    x = penalized(x, params, prompt_ids, output_ids)
    for *before, last in bad_word_ids:
        if list(output_ids)[len(output_ids) - len(before) :] == before:
            x[last] = -np.inf
    return x / single(params.temperature) if params.temperature > 0 else x


def single(value: float) -> np.float64:
    """Rounds to float32."""
    return np.float64(np.float32(value))


def penalized(
    x: np.ndarray, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> np.ndarray:
    """Repetition, then frequency, then presence; the latter two look at the output alone."""
    x = x.copy()
    repetition = single(params.repetition_penalty)
    for token in {*prompt_ids, *output_ids}:
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(output_ids):
        x[token] -= single(params.frequency_penalty) * list(output_ids).count(token)
        x[token] -= single(params.presence_penalty)
    return x


def min_p(x: np.ndarray, p: float) -> np.ndarray:
    """Drops what is less than `p` times as likely as the likeliest."""
    if p <= 0:
        return x
    return np.where(x < x.max() + np.log(single(p)), -np.inf, x)


def top_k(x: np.ndarray, k: int) -> np.ndarray:
    """Drops what is below the k-th largest; ties with it stay."""
    if k <= 0 or k >= len(x):
        return x
    return np.where(x < np.sort(x)[-k], -np.inf, x)


def top_p(x: np.ndarray, p: float) -> np.ndarray:
    """Drops what the least likely, in ascending order, reach of the mass 1 - p together."""
    if p >= 1:
        return x
    order = np.argsort(x, kind="stable")
    keep = np.cumsum(softmax(x)[order]) > 1 - single(p)
    keep[-1] = True
    return np.where(x < x[order][keep].min(), -np.inf, x)


# -------------------------------------------------------------------- distributions


def softmax(x: np.ndarray) -> np.ndarray:
    """float64 [..., V], of sum 1."""
    weights = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """float64 [..., V]."""
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def rank(values: np.ndarray, token: int) -> int:
    """How many entries are at least as large as the token's."""
    return int((values >= values[token]).sum())


# -------------------------------------------------------------------- the same for the device


@dataclass(frozen=True)
class Row:
    """A request on its way: what `process` takes beside the logits, and a seed."""

    params: SamplingParams
    prompt_ids: tuple[int, ...] = (0,)
    output_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    mask: tuple[bool, ...] | None = None
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """The position of its next token."""
        return len(self.prompt_ids) + len(self.output_ids)

    def arguments(self) -> tuple:
        """What follows the logits in `process`."""
        mask = None if self.mask is None else np.asarray(self.mask)
        return (
            self.params,
            self.prompt_ids,
            self.output_ids,
            self.stop_ids,
            self.bad_word_ids,
            mask,
        )


def sampling_inputs(rows: Sequence[Row], flags: SamplingFlags, vocab_size: int) -> SamplingInputs:
    """Returns NumPy arrays that say the same of each row."""
    table = sampling_fields(len(rows), flags)
    values = {
        name: np.full(shape, NEUTRAL.get(name, 0), dtype) for name, (shape, dtype) in table.items()
    }
    for i, row in enumerate(rows):
        values["seeds"][i] = row.seed & 0xFFFFFFFF, row.seed >> 32
        for name in values.keys() & {
            "temperature",
            "min_p",
            "top_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
        }:
            values[name][i] = getattr(row.params, name)
        if "top_k" in values and row.params.top_k > 0:
            values["top_k"][i] = row.params.top_k
        _fill_rules(values, i, row, vocab_size)
    return SamplingInputs(**values)


def _fill_rules(values: dict[str, np.ndarray], i: int, row: Row, vocab_size: int) -> None:
    rules = rules_of(
        row.params,
        prompt_len=len(row.prompt_ids),
        stop_ids=row.stop_ids,
        bad_words=row.bad_word_ids,
        thinking=None,
        vocab_size=vocab_size,
    )
    if "edit_ids" in values:
        for name, column in zip(
            ("ids", "values", "until"), rules.now(row.prompt_ids, row.output_ids)[:3], strict=True
        ):
            values[f"edit_{name}"][i, : len(column)] = column
    if "mask" in values:
        if rules.allowed is not None:
            values["mask"][i] = rules.allowed
        if row.mask is not None:
            values["mask"][i] &= bitmask(np.flatnonzero(row.mask), vocab_size)
    if "logprob_ids" in values:
        named = row.params.logprob_token_ids or ()
        values["logprob_ids"][i, : len(named)] = named


def token_counts(rows: Sequence[Row], vocab_size: int) -> np.ndarray:
    """Returns int32 [B, V], as the device keeps them."""
    counts = np.zeros((len(rows), vocab_size), np.int32)
    for i, row in enumerate(rows):
        np.add.at(counts[i], list(row.output_ids), 1)
        counts[i, list(row.prompt_ids)] += IN_PROMPT
    return counts


def step_inputs(sampling: SamplingInputs, positions: np.ndarray) -> StepInputs:
    """Returns a decode step whose rows all sample their token of these positions."""
    count = len(positions)
    none = np.zeros(count, np.int32)
    return StepInputs(
        tokens=none,
        positions=none[None],
        rows=none,
        page_table=none[None, :, None],
        kv_lens=positions,
        num_tokens=np.int32(count),
        num_decodes=np.int32(count),
        stop_ids=np.full((count, 8), -1, np.int32),
        limits=np.ones(count, np.int32),
        sampling=sampling,
        chunks=None,
        score=None,
    )
