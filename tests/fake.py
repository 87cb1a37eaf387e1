"""A stand-in for the model and its cache, for tests of the host's half; no JAX.

The device's cache is a dict from slots to what a slot knows: every token up to its
own. A row may only read slots that know its own past, so a page that two sequences
share by mistake, or that is used after it was freed, is caught where it is read.
"""

from itertools import accumulate

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


class FakeDevice:
    """Runs plans as the programs do: all rows write, then all rows read."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[SampledRow]:
        """Returns what `Scheduler.update` takes."""
        written = set()
        for row in plan.rows:
            start = row.seq.num_computed
            known = self._known(row.seq)
            for position in range(start, start + row.num_tokens):
                slot = self.slot(row.seq, position)
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                self.slots[slot] = known[position]
        return [self._read(row) for row in plan.rows]

    def _read(self, row) -> SampledRow:
        known, end = self._known(row.seq), row.seq.num_computed + row.num_tokens
        for position in range(end):
            assert self.slots.get(self.slot(row.seq, position)) == known[position]
        tokens = row.seq.tokens(0, row.seq.num_tokens)
        return SampledRow([next_token(tokens)] if row.samples else [], [])

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.pages[position // self.page_size] * self.page_size + position % self.page_size

    def _known(self, seq: Sequence) -> list[int]:
        """For each position a number that names all tokens up to it, and the salt."""
        tokens = seq.tokens(0, seq.num_tokens)
        chain = accumulate(tokens, lambda h, t: hash((h, t)), initial=hash(seq.cache_salt))
        return list(chain)[1:]
