"""Makes of a request what its caller gets: text, tokens, log-probabilities. No JAX here."""

from collections.abc import Sequence as Several
from typing import Any

from jaxllm.outputs import (
    CompletionOutput,
    CompletionScore,
    FlatLogprobs,
    Logprob,
    RequestOutput,
)
from jaxllm.scoring import SampledLogprob, Scoring
from jaxllm.sequence import Request, Sequence
from jaxllm.text_stream import text_of
from jaxllm.tokenizer import decoded_token


class Results:
    """Outputs of requests of one model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def output(self, request: Request) -> RequestOutput:
        """Returns all there is of a request, finished or not."""
        first = next(iter(request.sequences), None)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs(request) if first else None,
            outputs=[] if request.error else [self._completion(s) for s in request.sequences],
            finished=request.is_finished,
            num_cached_tokens=first.num_cached if first else 0,
            error=request.error,
        )

    def score(self, request: Request) -> CompletionScore:
        """Returns the log-probabilities of a scored completion."""
        scoring = _scoring(request)
        assert scoring is not None, "the request scores nothing"
        return CompletionScore(
            token_ids=scoring.targets[scoring.start :],
            logprobs=scoring.logprobs,
            ranks=scoring.ranks,
        )

    def _completion(self, seq: Sequence) -> CompletionOutput:
        output = CompletionOutput(
            index=seq.index,
            text=self._text(seq),
            token_ids=list(seq.output_token_ids),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            seed=seq.seed,
        )
        if seq.num_logprobs is not None:
            found = [self._sampled(seq, i) for i in range(len(seq.logprobs))]
            output.logprobs = _container(found, flat=seq.params.flat_logprobs)
            output.cumulative_logprob = sum(one.chosen for one in seq.logprobs)
        return output

    def _text(self, seq: Sequence) -> str:
        if self._tokenizer is None or not seq.params.detokenize:
            return ""
        if seq.text is not None:
            return seq.text.visible
        return text_of(
            self._tokenizer,
            seq.prompt_token_ids,
            seq.output_token_ids,
            seq.params,
            ends_with_stop_token=seq.finish_reason == "stop",
        )

    def _sampled(self, seq: Sequence, i: int) -> dict[int, Logprob]:
        """The token itself first, then the others in order; a token comes once."""
        found: SampledLogprob = seq.logprobs[i]
        token = seq.output_token_ids[i]
        end = len(seq.prompt_token_ids) + i
        before = seq.tokens(max(0, end - 4), end)
        known = {token: Logprob(found.chosen, found.rank, self._decoded(before, token))}
        for other, value, rank in zip(found.ids, found.values, found.ranks, strict=True):
            if other != token:
                known[other] = Logprob(value, rank, self._decoded(before, other))
        return known

    def _prompt_logprobs(self, request: Request) -> list[dict[int, Logprob] | None] | Any:
        scoring, first = _scoring(request), request.sequences[0]
        if scoring is None or not (first.output_token_ids or first.is_finished):
            return None
        known = request.prompt_token_ids
        rows: list[dict[int, Logprob] | None] = [None]
        for i in range(len(scoring.logprobs)):
            token = int(scoring.targets[i])
            before = known[max(0, i - 3) : i + 1]
            row = {
                token: Logprob(
                    float(scoring.logprobs[i]),
                    int(scoring.ranks[i]),
                    self._decoded(before, token),
                )
            }
            others = zip(scoring.top_ids[i].tolist(), scoring.top[i].tolist(), strict=True)
            for rank, (other, value) in enumerate(others, start=1):
                if other != token:
                    row[other] = Logprob(value, rank, self._decoded(before, other))
            rows.append(row)
        return _container(rows, flat=request.params.flat_logprobs)

    def _decoded(self, before: Several[int], token: int) -> str | None:
        return None if self._tokenizer is None else decoded_token(self._tokenizer, before, token)


def _scoring(request: Request) -> Scoring | None:
    return request.sequences[0].scoring


def _container(rows: list[Any], *, flat: bool) -> Any:
    if not flat:
        return rows
    container = FlatLogprobs()
    for row in rows:
        container.append(row)
    return container


def delta(whole: RequestOutput, sent: dict[int, tuple[int, int]]) -> RequestOutput:
    """Cuts an output to what is new since the last one.

    Args:
        whole: The output so far; changed in place.
        sent: For each completion, characters and tokens sent before; brought up to date.
    """
    for one in whole.outputs:
        num_chars, num_tokens = sent.get(one.index, (0, 0))
        sent[one.index] = (len(one.text), len(one.token_ids))
        one.text, one.token_ids = one.text[num_chars:], one.token_ids[num_tokens:]
        if one.logprobs is not None:
            one.logprobs = one.logprobs[num_tokens:]
    return whole
