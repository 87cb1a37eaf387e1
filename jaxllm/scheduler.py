"""Decides which sequences run in the next step.

The scheduler owns the waiting and running queues and is the only caller of the
page pool. It is plain Python and holds no arrays. One call of `schedule` gives
one `StepPlan`; one call of `update` applies the tokens sampled from it; nothing
else changes a sequence's status.

A step may be planned before the results of the last one are known: its rows then
count on the tokens that the last one will bring (`num_expected`). Where a token
ends its sequence after all, the step in flight computes one for nothing, and the
sequence is kept in `leaving`, with its row and pages, until that step is done.

Invariants, checked by `check_invariants` in tests:
  * a page has one owner: the free list, the prefix cache, or its holders;
  * a plan has at most `max_num_batched_tokens` tokens and `max_num_seqs` rows;
  * a running sequence holds pages for every token that it has computed;
  * what a step in flight writes to is held by the sequence that it writes for.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.cache.prefix_cache import ROOT, PrefixCache
from jaxllm.config import DECODE_STEPS, EngineConfig
from jaxllm.scoring import SampledLogprob
from jaxllm.sequence import PlannedRow, Sequence, StepPlan
from jaxllm.stopping import end_if_done


@dataclass(frozen=True, slots=True)
class SampledRow:
    """What a step brought for one sequence."""

    tokens: list[int]
    logprobs: list[SampledLogprob]
    """One for each token, or none."""


class Scheduler:
    """First come, first served; decodes before prefills; preemption by recompute."""

    def __init__(self, config: EngineConfig, num_pages: int) -> None:
        """Makes empty queues over a pool of `num_pages`, the trash page included."""
        self.config = config
        self.num_pages = num_pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.leaving: list[Sequence] = []
        """Ended, and computed once more by a step in flight."""

        self.in_flight: deque[StepPlan] = deque()
        """Planned steps whose results are not known yet, the oldest first."""

        self.num_preemptions = 0
        self._clear()

    def _clear(self) -> None:
        self.prefixes = PrefixCache(self.num_pages, self.config.page_size)
        self.pool = self.prefixes.pool
        self._free_rows = list(reversed(range(self.config.max_num_seqs)))

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    @property
    def num_pages_held(self) -> int:
        """Pages of the running sequences; those of `leaving` are as good as free."""
        return len({page for seq in self.running for page in seq.pages})

    def add(self, seq: Sequence) -> None:
        """Puts a new sequence at the end of the waiting queue."""
        self.waiting.append(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends the sequences of some requests, waiting or running, and frees their pages."""
        doomed = set(request_ids)
        for seq in [s for s in (*self.running, *self.waiting) if s.request_id in doomed]:
            seq.finish_reason = "abort"
            if seq in self.running:
                self._leave(seq)
            else:
                self.waiting.remove(seq)

    def reset(self, num_pages: int | None = None) -> None:
        """Forgets every page, and lets all unfinished sequences start anew.

        For when the cache's content is lost, or a step was cut off half-way.

        Args:
            num_pages: Of a new cache, the trash page included; as many as before by default.
        """
        unfinished = {id(s): s for s in (*self.running, *self.waiting) if not s.is_finished}
        for seq in (*unfinished.values(), *self.leaving):
            _forget_pages(seq)
        self.running = []
        self.leaving = []
        self.in_flight.clear()
        self.waiting = deque(sorted(unfinished.values(), key=lambda s: (s.arrival, s.index)))
        self.num_pages = num_pages or self.num_pages
        self._clear()

    # ---------------------------------------------------------------- planning

    def schedule(self) -> StepPlan | None:
        """Returns the next step: decodes, then unfinished prefills, then new sequences.

        None where there is nothing to do before the results of a step in flight are known.
        """
        going = [seq for seq in self.running if seq.num_pending == 1 and not self._will_end(seq)]
        if self.in_flight and (self.in_flight[-1].needs_sync or not self._has_pages_for(going)):
            return None
        budget = self.config.max_num_batched_tokens
        preemptions = self.num_preemptions
        # Growing preempts the younger, which are behind.
        decodes = [seq for seq in going if seq.row >= 0 and self._grow(seq)]
        budget -= len(decodes)
        chunks = []
        for seq in self.running:
            if seq.num_pending > 1 and budget:
                chunks.append(self._chunk(seq, budget))
                budget -= chunks[-1].num_tokens
        if self.num_preemptions == preemptions:
            chunks += self._admit(budget)
        steps, limits = (1, [1] * len(decodes)) if chunks else self._lookahead(decodes)
        rows = [
            PlannedRow(seq, seq.num_computed, 1, limit if seq.generates else 0)
            for seq, limit in zip(decodes, limits, strict=True)
        ]
        # A chunk of one token is a decode to the device: it only lacks the sampling history.
        # Decodes of like lengths side by side: those that are computed together take as long as
        # the longest.
        rows = tuple(sorted((*rows, *chunks), key=_place))
        return self._launch(rows, steps) if rows else None

    def _launch(self, rows: tuple[PlannedRow, ...], steps: int) -> StepPlan:
        """Returns the plan of these rows, and counts on what it will bring."""
        plan = StepPlan(
            rows=rows,
            num_decodes=sum(row.num_tokens == 1 for row in rows),
            lookahead=steps,
            needs_sync=any(_needs_result(row.seq, steps) for row in rows if row.samples),
        )
        self.in_flight.append(plan)
        for row in rows:
            row.seq.num_in_flight += 1
            row.seq.num_computed += row.num_tokens + max(0, row.limit - 1)
            row.seq.num_expected += row.limit
        return plan

    def _left(self, seq: Sequence) -> int:
        """Returns how many tokens a sequence may generate beyond those that are expected."""
        return seq.remaining(self.config.max_model_len) - seq.num_expected

    def _will_end(self, seq: Sequence) -> bool:
        """Whether the tokens that are expected are its last."""
        return seq.num_expected > 0 and self._left(seq) <= 0

    def _has_pages_for(self, seqs: list[Sequence]) -> bool:
        """Whether each can compute a token with the pages there are, preempting none.

        A sequence whose last token only the device knows must not be preempted.
        """
        size = self.config.page_size
        return sum(seq.num_computed >= len(seq.pages) * size for seq in seqs) <= self.pool.num_free

    def _lookahead(self, seqs: list[Sequence]) -> tuple[int, list[int]]:
        """Returns how many steps one launch may have, and the tokens of each row in it.

        One step where something waits for a place, or a row's next token needs the host.
        """
        most, one = self.config.max_decode_steps, (1, [1] * len(seqs))
        if most == 1 or self.waiting or not seqs:
            return one
        if any(seq.needs_host() or not seq.generates for seq in seqs):
            return one
        left = [self._left(seq) for seq in seqs]
        # A few steps too many at the end cost less than a program of their own.
        wanted = max(left) if max(left) == 1 else max(*left, DECODE_STEPS[-1])
        for steps in DECODE_STEPS:
            limits = [min(steps, n) for n in left]
            if steps <= min(most, wanted) and self._reserve(seqs, limits):
                return steps, limits
        return one

    def _reserve(self, seqs: list[Sequence], limits: list[int]) -> bool:
        """Gives sequences the pages that so many steps will write, if there are enough."""
        size = self.config.page_size
        # The last token sampled is not written before the launch after.
        ends = [seq.num_computed + limit for seq, limit in zip(seqs, limits, strict=True)]
        missing = [
            max(0, -(-end // size) - len(s.pages)) for s, end in zip(seqs, ends, strict=True)
        ]
        if sum(missing) > self.pool.num_free:
            return False
        for seq, count in zip(seqs, missing, strict=True):
            seq.pages += self.pool.allocate(count)
        return True

    def _admit(self, budget: int) -> list[PlannedRow]:
        """Starts waiting sequences while rows, tokens and pages last."""
        admitted = []
        while self.waiting and self._free_rows and budget:
            seq = self.waiting[0]
            cached = self._find_cached(seq)
            num_new = -(-seq.num_tokens // self.config.page_size) - len(cached)
            reserve = sum(self.pool.is_kept(node.page) for node in cached)
            # One page for each running sequence, or it would soon preempt the newcomer.
            if num_new + reserve + len(self.running) > self.pool.num_free:
                break
            num_left = seq.num_tokens - len(cached) * self.config.page_size
            if not self.config.enable_chunked_prefill and num_left > budget:
                break
            # In both queues for a moment, and never in neither: `reset` may come at any line.
            self._start(seq, cached, num_new)
            self.waiting.popleft()
            admitted.append(self._chunk(seq, budget))
            budget -= admitted[-1].num_tokens
        return admitted

    def _find_cached(self, seq: Sequence) -> list:
        if not self.config.enable_prefix_caching:
            return []
        found = self.prefixes.find(seq.tokens(0, seq.num_tokens), seq.cache_salt)
        return found[: seq.cacheable() // self.config.page_size]

    def _chunk(self, seq: Sequence, budget: int) -> PlannedRow:
        """Plans as much of a sequence's known tokens as the budget allows.

        Pages that the step will fill are findable at once: in every layer all of a
        step's keys are written before any is read, so sequences that start together
        (the completions of one prompt, say) compute their common pages once.
        """
        num_tokens = min(seq.num_pending, budget)
        self._register(seq, seq.num_computed + num_tokens)
        samples = num_tokens == seq.num_pending and seq.generates
        return PlannedRow(seq, seq.num_computed, num_tokens, limit=int(samples))

    def _start(self, seq: Sequence, cached: list, num_new: int) -> None:
        """Gives a sequence its row and the pages of all its known tokens."""
        for node in cached:
            self.pool.share(node.page)
        seq.pages = [node.page for node in cached] + self.pool.allocate(num_new)
        seq.num_computed = len(cached) * self.config.page_size
        seq.num_registered = len(cached)
        seq.prefix_node = cached[-1].number if cached else ROOT
        if seq.num_preemptions == 0:
            seq.num_cached = seq.num_computed
            self.prefixes.num_queried += seq.num_tokens
            self.prefixes.num_hit += seq.num_computed
        seq.row = self._free_rows.pop()
        self.running.append(seq)

    def _grow(self, seq: Sequence) -> bool:
        """Gets a page for the next token, preempting the youngest if there is none."""
        while seq.num_computed >= len(seq.pages) * self.config.page_size:
            if self.pool.num_free:
                seq.pages += self.pool.allocate(1)
            else:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is seq:
                    return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Takes a sequence's pages; its tokens are kept and computed again later."""
        self.waiting.appendleft(seq)
        self._leave(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def _leave(self, seq: Sequence) -> None:
        """Ends a sequence's time among the running.

        Its pages and row are given back as soon as no step in flight writes to them.
        """
        self.leaving.append(seq)  # in both for a moment, and never in neither
        self.running.remove(seq)
        self._give_back_if_idle(seq)

    def _give_back_if_idle(self, seq: Sequence) -> None:
        if seq.num_in_flight == 0:
            self.leaving.remove(seq)
            self.pool.free(seq.pages)
            self._free_rows.append(seq.row)
            _forget_pages(seq)

    # ---------------------------------------------------------------- results

    def update(self, plan: StepPlan, sampled: list[SampledRow]) -> list[Sequence]:
        """Applies what a step brought, and returns the sequences that it finished.

        Args:
            plan: The oldest step in flight.
            sampled: For each of its rows. What came of a sequence that had ended is dropped.
        """
        assert plan is self.in_flight[0], "steps are done in the order they were planned"
        self.in_flight.popleft()
        finished = []
        for row, result in zip(plan.rows, sampled, strict=True):
            seq = row.seq
            seq.num_in_flight -= 1
            if seq.is_finished:
                self._give_back_if_idle(seq)
            else:
                self._apply(row, result)
                if seq.is_finished:
                    self._leave(seq)
                    finished.append(seq)
        return finished

    def _apply(self, row: PlannedRow, result: SampledRow) -> None:
        """Gives a sequence its tokens, up to the one that ends it."""
        seq, count = row.seq, 0
        seq.num_expected -= row.limit
        while count < len(result.tokens) and not seq.is_finished:
            seq.output_token_ids.append(result.tokens[count])
            if result.logprobs:
                seq.logprobs.append(result.logprobs[count])
            end_if_done(seq, self.config.max_model_len)
            count += 1
        if not seq.generates and row.stop == seq.num_tokens:
            seq.finish_reason = "length"
        # All but the last token were fed back on the device.
        self._register(seq, row.stop + max(0, count - 1))

    def _register(self, seq: Sequence, num_tokens: int) -> None:
        """Makes the pages that its first tokens fill findable."""
        if not self.config.enable_prefix_caching:
            return
        size = self.config.page_size
        while (seq.num_registered + 1) * size <= num_tokens:
            start = seq.num_registered * size
            seq.prefix_node = self.prefixes.add(
                seq.prefix_node,
                seq.tokens(start, start + size),
                seq.cache_salt,
                seq.pages[seq.num_registered],
            )
            seq.num_registered += 1

    def check_invariants(self) -> None:
        """Raises AssertionError where the books do not balance; for tests."""
        holders = (*self.running, *self.leaving)
        held = Counter(page for seq in holders for page in seq.pages)
        references = self.pool.references()
        assert all(references[page] == held[page] for page in range(1, self.num_pages))
        unowned = self.pool.unowned()
        assert len(unowned) == len(set(unowned)), "a page is free twice"
        assert not set(unowned) & set(held), "a free page is held"
        assert len(unowned) + len(held) == self.num_pages - 1, "a page is lost"
        assert 0 not in held, "the trash page was handed out"
        rows = [seq.row for seq in holders] + self._free_rows
        assert sorted(rows) == list(range(self.config.max_num_seqs)), "a row is lost or shared"
        for seq in self.running:
            assert len(seq.pages) * self.config.page_size >= seq.num_computed
        for seq in self.leaving:
            assert seq.num_in_flight, "ended, and not given back"
        for seq in holders:
            assert seq.num_in_flight == sum(seq is r.seq for p in self.in_flight for r in p.rows)
        for row in (row for plan in self.in_flight for row in plan.rows):
            assert row.seq in holders, "a step in flight writes to pages that were given back"
        for seq in self.waiting:
            assert not seq.pages
            assert seq.num_computed == 0


def _place(row: PlannedRow) -> tuple[bool, int]:
    """Sorts decodes by length, and before chunks, which keep their order."""
    return (True, 0) if row.num_tokens > 1 else (False, row.stop)


def _needs_result(seq: Sequence, steps: int) -> bool:
    """Whether a sequence's next launch must wait for what this one of so many steps brings.

    A token that ends it is found out one launch late. That costs one step for nothing, which
    is little, or as many as the next launch has.
    """
    return seq.needs_host() or (steps > 1 and bool(seq.stop_ids()))


def _forget_pages(seq: Sequence) -> None:
    seq.pages = []
    seq.num_computed = seq.num_registered = seq.num_expected = seq.num_in_flight = 0
    seq.prefix_node = ROOT
    seq.row = -1
    seq.is_counted = False
