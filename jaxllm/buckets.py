"""The padded sizes that programs are compiled for. No JAX here."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.config import EngineConfig
from jaxllm.sequence import StepPlan

FEW_ROWS = 8
"""A mixed step has this many rows, or the most: rows cost little beside tokens."""

TOKENS = (16, 64, 128, 256, 512)
"""Small steps; from here on powers of two, as padding a large step costs compute."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The shapes of one program."""

    tokens: int
    """T; in a decode program the same as `rows`."""

    rows: int
    """B."""

    width: int
    """M, pages of the page table."""

    decode_rows: int
    """Rows that may be decodes: 0, or B."""

    query_blocks: int
    """NQ; 0 in a decode program."""

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token."""
        return self.query_blocks == 0


def at_least(sizes: Sequence[int], needed: int) -> int:
    """Returns the smallest size that holds `needed`."""
    return next(size for size in sizes if size >= needed)


def powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    """Returns smallest, its doubles, and one size that holds `largest`."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


class Buckets:
    """The sizes one engine uses."""

    def __init__(self, config: EngineConfig) -> None:
        self.block_q = config.block_q
        self.page_size = config.page_size
        self.max_model_len = config.max_model_len
        self.rows = powers_of_two(config.min_rows, config.max_num_seqs)
        self.mixed_rows = tuple(sorted({min(FEW_ROWS, self.rows[-1]), self.rows[-1]}))
        most = config.max_num_batched_tokens
        small = [size for size in TOKENS if size < most]
        self.tokens = (*small[:-1], *powers_of_two(small[-1] if small else most, most))
        narrowest = min(config.min_width, config.pages_per_seq)
        self.widths = powers_of_two(narrowest, config.pages_per_seq)

    def of(self, plan: StepPlan) -> Bucket:
        """Returns the bucket of a step."""
        longest = max(row.stop for row in plan.rows) + plan.lookahead - 1
        # A launch of several steps goes on for rows that end in it; they write no page.
        longest = min(longest, self.max_model_len)
        width = at_least(self.widths, -(-longest // self.page_size))
        if all(row.num_tokens == 1 and row.samples for row in plan.rows):
            return self.decode(at_least(self.rows, len(plan.rows)), width)
        rows = at_least(self.mixed_rows, len(plan.rows))
        tokens = at_least(self.tokens, plan.num_tokens)
        return self.mixed(tokens, rows, width, with_decodes=plan.num_decodes > 0)

    def decode(self, rows: int, width: int) -> Bucket:
        """Returns the bucket of a decode program."""
        return Bucket(rows, rows, width, decode_rows=rows, query_blocks=0)

    def mixed(self, tokens: int, rows: int, width: int, *, with_decodes: bool) -> Bucket:
        """Returns the bucket of a mixed program."""
        # Each row may end inside a block, so it takes up to one more than its share.
        blocks = -(-tokens // self.block_q) + rows
        decode_rows = min(rows, tokens) if with_decodes else 0
        return Bucket(tokens, rows, width, decode_rows, blocks)

    def largest(self) -> tuple[Bucket, Bucket]:
        """Returns the largest decode and the largest mixed bucket."""
        rows, width = self.rows[-1], self.widths[-1]
        mixed = self.mixed(self.tokens[-1], self.mixed_rows[-1], width, with_decodes=True)
        return self.decode(rows, width), mixed
