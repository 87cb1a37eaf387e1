"""One call of an engine, with the times at which each request got its tokens."""

import time
from dataclasses import dataclass

from jaxllm.bench.counts import Counts, read_counts
from jaxllm.bench.workload import Workload
from jaxllm.errors import JaxLLMError
from jaxllm.llm import LLM
from jaxllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, repr=False)
class Trace:
    """Seconds since the call began, for each request in the order of the workload."""

    seconds: float
    """Of the whole call."""

    first_token: tuple[float, ...]
    finished: tuple[float, ...]
    output_lens: tuple[int, ...]
    """Tokens that were generated."""

    counts: Counts

    @property
    def time_per_token(self) -> tuple[float, ...]:
        """Seconds from each token to the next, a mean of each request that has two."""
        times = zip(self.first_token, self.finished, self.output_lens, strict=True)
        return tuple((end - first) / (n - 1) for first, end, n in times if n > 1)

    def __repr__(self) -> str:
        """How much was generated, in which time."""
        return f"Trace({sum(self.output_lens)} tokens in {self.seconds:.3g} s)"


def run(llm: LLM, workload: Workload) -> Trace:
    """Runs a workload as `LLM.generate` would, greedily and to its full lengths.

    The same steps as that method takes; what it cannot say is when each request had
    its first token.

    Raises:
        JaxLLMError: A request failed, or has not the tokens that were asked for.
    """
    before, start = read_counts(llm), time.perf_counter()
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in workload.output_lens
    ]
    prompts = [list(prompt) for prompt in workload.prompts]
    requests = llm._requests(prompts, params, None, on_error="raise")
    engine = llm._live_engine()
    first: dict[str, float] = {}
    finished: dict[str, float] = {}
    silent = list(requests)
    with engine.call(requests):
        while len(finished) < len(requests):
            done = engine.step()
            now = time.perf_counter() - start
            spoken = [r for r in silent if r.sequences[0].output_token_ids]
            if spoken:
                first |= dict.fromkeys((r.request_id for r in spoken), now)
                silent = [r for r in silent if r.request_id not in first]
            for request in done:
                if request.error is not None:
                    raise request.error
                finished[request.request_id] = now
    seconds = time.perf_counter() - start
    lens = tuple(len(r.sequences[0].output_token_ids) for r in requests)
    if lens != workload.output_lens:
        raise JaxLLMError(
            f"The engine generated {sum(lens)} tokens where {workload.num_output_tokens} were "
            "asked for: a bug of jaxllm, and the figures would be wrong."
        )
    return Trace(
        seconds=seconds,
        first_token=tuple(first[r.request_id] for r in requests),
        finished=tuple(finished[r.request_id] for r in requests),
        output_lens=lens,
        counts=read_counts(llm) - before,
    )
