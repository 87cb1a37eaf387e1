"""Steps of paged attention in the op's own terms, with the reference's answer."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxllm.pallas_kernels.attention import PagedAttend, QueryBlocks
from jaxllm.pallas_kernels.attention.reference import attend_sequence

NUM_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    num_kv_heads: int
    group: int
    """Query heads of each."""

    head_dim: int
    page_size: int


@dataclasses.dataclass
class Case:
    """A step and the answer."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    caches: tuple
    attend: PagedAttend
    expected: np.ndarray
    terms: np.ndarray
    """What the expected numbers are sums of, each term without its sign."""

    written: tuple
    """The caches after the step, the trash page aside."""

    num_tokens: int


def lay_out(pages, order):
    """[P, S, K, D] in another order of axes."""
    return pages.transpose(["PSKD".index(axis) for axis in order])


def make_case(rows, spec, tuning, sizes, dtype=np.float64, *, block_q, padded, width, seed=0):
    """A step of rows (tokens before it, tokens in it), decodes first.

    `padded` tokens and page tables of `width` pages. Whatever no row has written is NaN: the trash
    page, free pages, the tails of pages.
    """
    rng = np.random.default_rng(seed)
    page_size, num_tokens = sizes.page_size, sum(new for _, new in rows)
    kept = (sizes.num_kv_heads, sizes.head_dim)  # of a token
    num_pages = sum(-(-(before + new) // page_size) for before, new in rows) + 3

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    q = draw(padded, sizes.num_kv_heads * sizes.group, sizes.head_dim)
    k, v = draw(padded, *kept), draw(padded, *kept)
    pages = [np.full((num_pages, page_size, *kept), np.nan, dtype) for _ in range(2)]
    written = [held.copy() for held in pages]
    table = np.zeros((NUM_ROWS, width), np.int32)
    lens, slots = np.zeros(NUM_ROWS, np.int32), np.zeros(padded, np.int32)
    positions = np.zeros(padded, np.int32)
    expected, terms = np.zeros(q.shape), np.zeros(q.shape)
    blocks, free, at = [], list(rng.permutation(np.arange(1, num_pages))), 0
    for row, (before, new) in enumerate(rows):
        total, mine = before + new, slice(at, at + new)
        own = [free.pop() for _ in range(-(-total // page_size))]
        table[row, : len(own)], lens[row] = own, total
        where = np.array([own[p // page_size] * page_size + p % page_size for p in range(total)])
        slots[mine], positions[mine] = where[before:], np.arange(before, total)
        both = []
        for held, later, added in zip(pages, written, (k, v), strict=True):
            whole = np.concatenate([draw(before, *kept), added[mine]])
            held.reshape(-1, *kept)[where[:before]] = whole[:before]
            later.reshape(-1, *kept)[where] = whole
            both.append(whole.astype(np.float64))
        queries = q[mine].astype(np.float64)
        expected[mine] = attend_sequence(queries, *both, spec)
        terms[mine] = attend_sequence(queries, both[0], np.abs(both[1]), spec)
        if new > 1:
            blocks += [(row, start) for start in range(at, at + new, block_q)]
        at += new
    unused = [(0, padded)] * 3
    block_rows, starts = np.array(blocks + unused, np.int32).T
    attend = PagedAttend(
        slot_mapping=jnp.asarray(slots),
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray(lens),
        num_decodes=jnp.int32(sum(new == 1 for _, new in rows)),
        blocks=QueryBlocks(
            jnp.asarray(block_rows),
            jnp.asarray(starts),
            jnp.asarray(positions),
            jnp.int32(len(blocks)),
        ),
        tuning=tuning,
        decode_rows=NUM_ROWS,
        block_q=block_q,
    )
    caches, after = (tuple(map(lay_out, held, tuning.orders)) for held in (pages, written))
    return Case(q, k, v, caches, attend, expected, terms, after, num_tokens)
