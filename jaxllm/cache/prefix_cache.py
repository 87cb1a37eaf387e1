"""Finds pages by the tokens that fill them.

A page's name is (its parent's number, its tokens, what else its content depends
on). Numbers are given once and never again, so names are exact: no hash can
collide, and the child of an evicted page can never be found by mistake.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from jaxllm.cache.page_pool import PagePool

ROOT = 0
"""The number that parents the first page of every sequence."""

Key = tuple[int, tuple[int, ...], Hashable]


class Node(NamedTuple):
    """A page that can be found."""

    number: int
    page: int


class PrefixCache:
    """From chains of full pages to where they lie."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Makes an empty cache and the pool whose pages it names."""
        self.pool = PagePool(num_pages, on_evict=self._forget)
        self.page_size = page_size
        self.num_queried = 0
        """Tokens that were looked for."""

        self.num_hit = 0
        """Tokens that were found."""

        self._nodes: dict[Key, Node] = {}
        self._keys: dict[int, Key] = {}
        self._last_number = ROOT

    def find(self, tokens: Sequence[int], extra: Hashable) -> list[Node]:
        """Returns the longest chain of cached pages that starts these tokens.

        At least the last token is left out, as a step must compute something.
        """
        found: list[Node] = []
        parent = ROOT
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            node = self._nodes.get((parent, tuple(tokens[start : start + self.page_size]), extra))
            if node is None:
                break
            found.append(node)
            parent = node.number
        return found

    def add(self, parent: int, tokens: Sequence[int], extra: Hashable, page: int) -> int:
        """Makes a full page findable, and returns its number.

        Where another page holds the same, that one stays the one to be found.
        """
        key = (parent, tuple(tokens), extra)
        node = self._nodes.get(key)
        if node is None:
            self._last_number += 1
            node = Node(self._last_number, page)
            self._nodes[key] = node
            self._keys[page] = key
            self.pool.mark_findable(page)
        return node.number

    def _forget(self, page: int) -> None:
        del self._nodes[self._keys.pop(page)]
