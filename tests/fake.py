"""A stand-in for the model and its cache, for tests of the host's half; no JAX.

The device's cache is a dict from slots to what a slot knows: every token up to its
own. A row may only read slots that know its own past, so a page that two sequences
share by mistake, or that is used after it was freed, is caught where it is read.
"""

from dataclasses import dataclass, field

from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduler import SampledRow
from jaxllm.sequence import Sequence, StepPlan

VOCAB_SIZE = 11


def make_sequence(
    name="a", prompt=(1, 2, 3), *, arrival=0, index=0, eos=(), salt=None, seed=0, **params
) -> Sequence:
    """A sequence that waits; `params` are those of `SamplingParams`."""
    return Sequence(
        request_id=name,
        index=index,
        prompt_token_ids=list(prompt),
        params=SamplingParams(**{"temperature": 0, **params}),
        seed=seed,
        arrival=arrival,
        eos_token_id=next(iter(eos), None),
        eos_token_ids=tuple(eos),
        cache_salt=salt,
    )


def next_token(tokens: list[int]) -> int:
    """The fake model: any function of all tokens does."""
    return (3 * sum(tokens) + 5 * len(tokens) + tokens[-1]) % VOCAB_SIZE


def generate(prompt, num_tokens: int, stop_ids=()) -> list[int]:
    """What a sequence must have generated in the end, with no scheduler in between."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


@dataclass
class LaunchedRow:
    """What a launch knows of a row: all of it from when it was launched."""

    name: str
    row: int
    pages: list[int]
    start: int
    tokens: list[int]
    """Those to compute; none where the device alone knows its one token."""

    before: tuple[int, ...]
    """All known tokens before those."""

    limit: int
    stop_ids: tuple[int, ...]
    salt: str | None
    sampled: list[int] = field(default_factory=list)


class FakeDevice:
    """Runs plans as the programs do: all rows write, then all rows read.

    A launch is carried out when it is fetched, as late as can be.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[int, tuple] = {}
        """For each slot its salt, and all tokens up to its own."""

        self.last_token: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[SampledRow]:
        """Returns what `Scheduler.update` takes."""
        return self.fetch(self.launch(plan))

    def launch(self, plan: StepPlan) -> list[LaunchedRow]:
        """Takes note of a plan, as the packed buffer does."""
        return [
            LaunchedRow(
                name=f"{row.seq.request_id}.{row.seq.index}",
                row=row.seq.row,
                pages=list(row.seq.pages),
                start=row.start,
                tokens=row.seq.tokens(row.start, row.stop)
                if row.start < row.seq.num_tokens
                else [],
                before=tuple(row.seq.tokens(0, row.start)),
                limit=row.limit,
                stop_ids=row.seq.stop_ids(),
                salt=row.seq.cache_salt,
            )
            for row in plan.rows
        ]

    def fetch(self, rows: list[LaunchedRow]) -> list[SampledRow]:
        """Carries a launch out."""
        for row in rows:
            row.tokens = row.tokens or [self.last_token[row.row]]
        while rows_left := [row for row in rows if row.tokens]:
            self._write(rows_left)
            for row in rows_left:
                self._sample(row)
        return [SampledRow(row.sampled, []) for row in rows]

    def _write(self, rows: list[LaunchedRow]) -> None:
        written = set()
        for row in rows:
            # Pages of the past may be written in this very step, by a row behind.
            past = row.before if len(row.before) == row.start else self._tokens(row, row.start)
            for position, token in enumerate(row.tokens, row.start):
                slot = self._slot(row.pages, position)
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                past = (*past, token)
                assert len(past) == position + 1, "a slot of its past is another's"
                self.slots[slot] = (row.salt, past)

    def _sample(self, row: LaunchedRow) -> None:
        """Reads all that is known of a row and samples, or ends it."""
        stop = row.start + len(row.tokens)
        tokens = self._tokens(row, stop)
        for position in range(stop):
            assert self._tokens(row, position + 1) == tokens[: position + 1], "a stale slot"
        assert tokens[: len(row.before)] == row.before[:stop]
        row.start, row.tokens = stop, []
        if row.limit:
            row.sampled.append(next_token(list(tokens)))
            self.last_token[row.row] = row.sampled[-1]
            if len(row.sampled) < row.limit and row.sampled[-1] not in row.stop_ids:
                row.tokens = row.sampled[-1:]

    def _tokens(self, row: LaunchedRow, count: int) -> tuple[int, ...]:
        """The first tokens of a row, as the cache has them."""
        salt, tokens = self.slots[self._slot(row.pages, count - 1)]
        assert salt == row.salt, "a page of another domain"
        return tokens

    def _slot(self, pages: list[int], position: int) -> int:
        return pages[position // self.page_size] * self.page_size + position % self.page_size

    def slot(self, seq: Sequence, position: int) -> int:
        return self._slot(seq.pages, position)
