"""The engine: requests in, finished requests out, one step at a time.

It owns the scheduler and the runner and is the only one to know both. A step is
schedule -> pack -> run -> update; there is no other loop.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jaxllm.batch import pack_plan
from jaxllm.buckets import Buckets, logprobs_bucket
from jaxllm.errors import NonFiniteError
from jaxllm.inputs import StepOutputs
from jaxllm.programs import ProgramKey
from jaxllm.runner import ModelRunner
from jaxllm.scheduler import SampledRow, Scheduler
from jaxllm.sequence import Request, Sequence, StepPlan


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_tokens: int = 0
    """Tokens computed, prefill and decode."""

    num_padded_tokens: int = 0
    """Tokens of the programs' shapes that were padding."""

    host_seconds: float = 0.0
    """Spent outside the programs: planning, packing, applying."""

    step_seconds: float = 0.0
    compile_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each program, in the order of first use."""


class Engine:
    """Continuous batching over one model."""

    def __init__(self, runner: ModelRunner) -> None:
        """Starts with an empty queue over the runner's cache."""
        self.runner = runner
        self.config = runner.builder.engine
        self.buckets = Buckets(self.config)
        self.scheduler = Scheduler(self.config, runner.builder.num_pages)
        self.requests: dict[str, Request] = {}
        self.stats = EngineStats()
        self.in_call: frozenset[str] = frozenset()
        """Requests of the call in progress; afterwards, what a cut-off call left to clean up."""

        self._arrivals = 0
        self._ended: list[Sequence] = []

    def add_request(self, request: Request) -> None:
        """Queues the sequences of a request, which has been checked."""
        self.requests[request.request_id] = request
        for seq in request.sequences:
            seq.arrival = self._arrivals
            self._arrivals += 1
            self.scheduler.add(seq)

    def step(self) -> list[Request]:
        """Runs one step, and returns the requests that it finished.

        Raises:
            NonFiniteError: The model's logits were NaN or infinite; the requests
                that had them are aborted, the others go on.
        """
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        key = self.program_key(plan)
        buffer = pack_plan(plan, key.bucket, self.config)
        launched = time.perf_counter()
        outputs = self.runner.run(key, buffer)
        returned = time.perf_counter()
        sampled = _by_row(plan, outputs)
        broken = [row.seq for row, ok in zip(plan.rows, outputs.finite, strict=False) if not ok]
        # Kept until they are returned: an error below must not lose what ended beside it.
        self._ended += self.scheduler.update(plan, sampled)
        self._count(plan, key, launched - start, returned - launched)
        if broken:
            self.abort({seq.request_id for seq in broken})
            raise NonFiniteError(
                f"The model gave NaN or infinite logits for request "
                f"{', '.join(sorted({seq.request_id for seq in broken}))} in {self.config.dtype}. "
                "Try dtype='float32', and check the checkpoint's weights."
            )
        return self._collect()

    def program_key(self, plan: StepPlan) -> ProgramKey:
        """Returns the program of a plan: the shapes, and only what its rows ask for."""
        # Rows that do not sample yet count too: the program stays the same when they do.
        params = [row.seq.params for row in plan.rows]
        asked = [p.logprobs for p in params if p.logprobs is not None]
        return ProgramKey(
            bucket=self.buckets.of(plan),
            steps=plan.lookahead,
            sampled=any(p.temperature > 0 for p in params),
            logprobs=logprobs_bucket(max(asked)) if asked else None,
        )

    def _collect(self) -> list[Request]:
        """Removes and returns the requests whose last sequence has ended."""
        ids = dict.fromkeys(seq.request_id for seq in self._ended)
        self._ended = []
        found = [self.requests[i] for i in ids if i in self.requests]
        done = [request for request in found if request.is_finished]
        for request in done:
            del self.requests[request.request_id]
        return done

    def _count(self, plan: StepPlan, key: ProgramKey, host: float, device: float) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_tokens += plan.num_tokens
        stats.num_padded_tokens += key.bucket.tokens - plan.num_tokens
        stats.host_seconds += host
        stats.step_seconds += device
        name = str(key)
        if name not in stats.compile_seconds:
            stats.compile_seconds[name] = self.runner.programs.seconds[key]

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests, finished or not, and frees what they hold."""
        request_ids = set(request_ids)
        self.scheduler.abort(request_ids)
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def recover(self) -> None:
        """Ends the call in progress, cut off wherever it was, and makes the engine exact again.

        Requests of others start anew; the tokens they had are kept. If this is interrupted too,
        `in_call` still says so, and doing it again finishes it.
        """
        self.abort(self.in_call)
        self.scheduler.reset()
        self.runner.recover()
        self.in_call = frozenset()


def _by_row(plan: StepPlan, outputs: StepOutputs) -> list[SampledRow]:
    """Cuts the outputs into one result for each planned row."""
    results = []
    tokens = np.asarray(outputs.tokens)
    for i, row in enumerate(plan.rows):
        count = int(outputs.num_tokens[i]) if row.samples else 0
        picked = []
        if outputs.logprobs is not None and row.seq.params.logprobs is not None:
            lp, k = outputs.logprobs, row.seq.params.logprobs
            picked = [
                (
                    float(lp.chosen[i, n]),
                    int(lp.rank[i, n]),
                    lp.top_ids[i, n, :k].tolist(),
                    lp.top[i, n, :k].tolist(),
                )
                for n in range(count)
            ]
        results.append(SampledRow(tokens[i, :count].tolist(), picked))
    return results
