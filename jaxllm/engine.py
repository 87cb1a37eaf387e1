"""The engine: requests in, finished requests out, one step at a time.

It owns the scheduler and the runner and is the only one to know both. A step is
schedule -> pack -> launch, and then fetch -> update for the launch before; there is
no other loop. So the host plans the next step while the device computes this one.
With `async_scheduling=False` it fetches each launch before it plans the next.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from jaxllm import interrupts
from jaxllm.batch import pack_plan
from jaxllm.buckets import Buckets
from jaxllm.errors import NonFiniteError, RequestError
from jaxllm.flags import FlagSets, flags_of, has_penalties
from jaxllm.inputs import SampledLogprobs, Scores, StepOutputs
from jaxllm.programs import ProgramBuilder, ProgramKey
from jaxllm.runner import ModelRunner
from jaxllm.scheduler import SampledRow, Scheduler
from jaxllm.scoring import SampledLogprob
from jaxllm.sequence import PlannedRow, Request, Sequence, StepPlan


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_tokens: int = 0
    """Tokens computed, prefill and decode."""

    num_padded_tokens: int = 0
    """Tokens of the programs' shapes that were padding."""

    num_ahead: int = 0
    """Steps that were launched before the results of the step before were known."""

    host_seconds: float = 0.0
    """Spent on the host: planning, packing, applying; beside the device where steps overlap."""

    step_seconds: float = 0.0
    """Spent on launching, and on waiting for results."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A step on the device."""

    plan: StepPlan
    key: ProgramKey
    outputs: StepOutputs
    """On the device, perhaps not computed yet."""


class Engine:
    """Continuous batching over one model."""

    def __init__(self, runner: ModelRunner) -> None:
        """Starts with an empty queue over the runner's cache."""
        self.runner = runner
        self.config = runner.builder.engine
        self.buckets = Buckets(self.config)
        self.scheduler = Scheduler(self.config, runner.builder.num_pages)
        self.flag_sets = FlagSets()
        self.requests: dict[str, Request] = {}
        self.stats = EngineStats()
        self.in_call: frozenset[str] = frozenset()
        """Requests of the call in progress; afterwards, what a cut-off call left to clean up."""

        self.lock = threading.RLock()
        """Held by whoever steps where another thread may recover, and in `recover`. A thread that
        was cut off as it let it go may take it again."""

        self.is_settled = True
        """Whether no `reshard` was cut off, and its recovery too."""

        self._in_flight: deque[Launch] = deque()
        self._arrivals = 0
        self._ended: list[Sequence] = []
        self._doomed: set[str] = set()

    def add_request(self, request: Request) -> None:
        """Queues the sequences of a request, which has been checked."""
        self.requests[request.request_id] = request
        for seq in request.sequences:
            seq.arrival = self._arrivals
            self._arrivals += 1
            self.scheduler.add(seq)

    @contextmanager
    def call(self, requests: Several[Request]) -> Iterator[None]:
        """A stretch of steps on behalf of some requests, queued if they are not yet.

        Whatever ends it early (an interrupt wherever it falls, an error) ends these
        requests, frees all they held and makes the engine exact again.
        """
        if self.in_call or not self.is_settled:
            self.recover()  # the last call's own recovery was interrupted
        self.in_call = frozenset(request.request_id for request in requests)
        try:
            with interrupts.noticed():
                self._tell_peers(requests)
                for request in requests:
                    if request.request_id not in self.requests and not request.is_finished:
                        self.add_request(request)
                yield
        except GeneratorExit:
            # An interrupt fell between this and the body of the `with`, and the collector found
            # the rest: in any thread, in the middle of a later step. The next call recovers.
            raise
        except BaseException as error:
            self.runner.peers.say(f"end a call by {type(error).__name__}")
            self.recover()
            raise
        self.in_call = frozenset()

    def _tell_peers(self, requests: Several[Request]) -> None:
        """Makes sure that every process of the engine was given the same requests."""
        fresh = [request for request in requests if request.request_id not in self.requests]
        asked = [(r.prompt_token_ids, r.params, [s.seed for s in r.sequences]) for r in fresh]
        what = f"call with {len(requests)} requests, {len(fresh)} of them new;"
        self.runner.peers.say(what, asked)
        self.runner.peers.agree()

    def step(self) -> list[Request]:
        """Launches a step and applies the results of the one before; returns what has finished.

        A request whose logits were not finite, or whose own rules left no token to
        choose, is finished with its `error` set; the others go on.
        """
        interrupts.check()
        self._abort_doomed()
        start = time.perf_counter()
        plan = self.scheduler.schedule() if self.scheduler.has_work else None
        if plan is not None:
            with self.runner.programs.watched():
                self._launch(plan)
        self.stats.host_seconds += time.perf_counter() - start
        overlaps = plan is not None and self.config.async_scheduling and not plan.needs_sync
        while len(self._in_flight) > overlaps:
            self._finish(self._in_flight.popleft())
        return self._collect()

    def _launch(self, plan: StepPlan) -> None:
        """Sends a step to the device and does not wait for it."""
        key = self.program_key(plan)
        buffer = pack_plan(plan, key.bucket, key.flags, self.config)
        if key.flags.penalties:
            self._count_tokens(plan)
        start = time.perf_counter()
        outputs = self.runner.launch(key, buffer)
        seconds = time.perf_counter() - start
        self.stats.num_ahead += bool(self._in_flight)
        self._in_flight.append(Launch(plan, key, outputs))
        self.stats.step_seconds += seconds
        self.stats.host_seconds -= seconds  # which are inside of those of `step`

    def _finish(self, launch: Launch) -> None:
        """Waits for a step and applies what it brought."""
        start = time.perf_counter()
        outputs = self.runner.fetch(launch.outputs)
        fetched = time.perf_counter()
        plan = launch.plan
        live = [not row.seq.is_finished for row in plan.rows]
        _put_scores(plan, outputs.scores)
        # Kept until they are returned: an interrupt below must not lose what has ended.
        self._ended += self.scheduler.update(plan, _by_row(plan, outputs))
        self._fail_broken(plan, outputs, live)
        self._count(plan, launch.key)
        self.stats.step_seconds += fetched - start
        self.stats.host_seconds += time.perf_counter() - fetched

    def _count_tokens(self, plan: StepPlan) -> None:
        """Has the device count the tokens of rows whose penalties start to matter."""
        for row in plan.rows:
            seq = row.seq
            if row.samples and not seq.is_counted and has_penalties(seq.params):
                known = seq.tokens(0, seq.num_tokens)
                self.runner.count_tokens(seq.row, known, len(seq.prompt_token_ids))
                seq.is_counted = True

    def _fail_broken(self, plan: StepPlan, outputs: StepOutputs, live: list[bool]) -> None:
        """Ends the requests that could not be sampled, with the reason.

        Args:
            plan: Of the step.
            outputs: Of it.
            live: For each row whether its sequence had not ended before.
        """
        good = outputs.finite & outputs.possible
        if np.all(good):
            return
        rows = zip(plan.rows, outputs.finite, good, live, strict=False)
        for row, finite, is_good, is_live in rows:
            request = self.requests.get(row.seq.request_id)
            if is_good or not is_live or request is None or request.error is not None:
                continue
            name = request.request_id
            request.error = (
                RequestError(
                    f"The rules of request {name} leave no token to choose. Its allowed_token_ids, "
                    "bad_words, min_tokens and logit_bias ban every one of them: allow some."
                )
                if finite
                else NonFiniteError(
                    f"The model gave NaN or infinite logits for request {name} in "
                    f"{self.config.dtype}. Try dtype='float32', and check the checkpoint's weights."
                )
            )
            self.scheduler.abort({name})
            for seq in request.sequences:
                seq.finish_reason = "error"
            self._ended += request.sequences

    def program_key(self, plan: StepPlan) -> ProgramKey:
        """Returns the program of a plan: the shapes, and only what its rows ask for."""
        flags = self.flag_sets.serving(flags_of(plan.rows))
        wanted = ProgramKey(self.buckets.of(plan), plan.lookahead, flags)
        return self.runner.programs.serving(wanted)

    def _collect(self) -> list[Request]:
        """Removes and returns the requests whose last sequence has ended."""
        ids = dict.fromkeys(seq.request_id for seq in self._ended)
        self._ended = []
        found = [self.requests[i] for i in ids if i in self.requests]
        done = [request for request in found if request.is_finished]
        for request in done:
            del self.requests[request.request_id]
        return done

    def _count(self, plan: StepPlan, key: ProgramKey) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.num_tokens += plan.num_tokens
        stats.num_padded_tokens += key.bucket.tokens - plan.num_tokens

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests, finished or not, and frees what they hold."""
        request_ids = set(request_ids)
        self.scheduler.abort(request_ids)
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def abort_later(self, request_ids: Iterable[str]) -> None:
        """Ends requests before the next step; safe wherever it is called, in a finalizer too."""
        self._doomed.update(request_ids)

    def _abort_doomed(self) -> None:
        while self._doomed:
            self.abort({self._doomed.pop()})

    def recover(self) -> None:
        """Ends the call in progress, cut off wherever it was, and makes the engine exact again.

        Requests of others start anew; the tokens they had are kept. If this is interrupted too,
        `in_call` still says so, and doing it again finishes it.
        """
        with self.lock:  # a step in progress elsewhere would go on with what is cleared here
            self.abort(self.in_call)
            self._in_flight.clear()
            self.scheduler.reset(self.runner.builder.num_pages)
            self.runner.recover()
            self.in_call = frozenset()
            self.is_settled = True

    def reshard(self, builder: ProgramBuilder) -> None:
        """Moves the model to another layout; unfinished requests are computed anew there.

        An error or an interrupt puts everything back where it was.

        Args:
            builder: For the same model and engine config under the other layout.
        """
        self.is_settled = False
        try:
            with interrupts.noticed():
                self.runner.reshard(builder)
        finally:
            self.recover()


def _by_row(plan: StepPlan, outputs: StepOutputs) -> list[SampledRow]:
    """Cuts the outputs into one result for each planned row."""
    results = []
    tokens = np.asarray(outputs.tokens)
    for i, row in enumerate(plan.rows):
        count = int(outputs.num_tokens[i]) if row.samples else 0
        picked = []
        if outputs.logprobs is not None and row.seq.num_logprobs is not None:
            picked = [_logprob(outputs.logprobs, row.seq, i, n) for n in range(count)]
        results.append(SampledRow(tokens[i, :count].tolist(), picked))
    return results


def _logprob(found: SampledLogprobs, seq: Sequence, i: int, n: int) -> SampledLogprob:
    """Returns what row i's n-th token has: the likeliest, or the tokens the caller named."""
    chosen, rank = float(found.chosen[i, n]), int(found.rank[i, n])
    named = seq.params.logprob_token_ids
    if named and found.named is not None and found.named_rank is not None:
        values = found.named[i, n, : len(named)].tolist()
        ranks = found.named_rank[i, n, : len(named)].tolist()
        return SampledLogprob(chosen, rank, list(named), values, ranks)
    k = seq.num_logprobs
    ids, values = found.top_ids[i, n, :k].tolist(), found.top[i, n, :k].tolist()
    return SampledLogprob(chosen, rank, ids, values, list(range(1, len(ids) + 1)))


def _put_scores(plan: StepPlan, scores: Scores | None) -> None:
    """Hands each row the log-probabilities of its given tokens."""
    if scores is None:
        return
    scored: list[tuple[PlannedRow, range]] = [(row, row.scored()) for row in plan.rows]
    ends = list(accumulate(len(positions) for _, positions in scored))
    for (row, positions), end in zip(scored, ends, strict=True):
        if row.seq.scoring is not None and len(positions):
            at = slice(end - len(positions), end)
            found = (scores.logprobs, scores.ranks, scores.top_ids, scores.top)
            row.seq.scoring.put(positions, *(np.asarray(x)[at] for x in found))
