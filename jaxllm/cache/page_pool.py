"""The books of the cache's pages: who holds each, and which may be taken.

Plain Python. A page is in exactly one of three states:

    free       nobody holds it, nothing in it is worth keeping
    kept       nobody holds it, the prefix cache can still find it; may be evicted
    held       by one or more sequences (`references`)

Page 0 is the trash page: padding writes there, and it is never handed out.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from jaxllm.errors import OutOfPagesError


class PagePool:
    """Free list, reference counts, and kept pages in order of last use."""

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] | None = None) -> None:
        """Makes all pages but the trash page free.

        Args:
            num_pages: The trash page included.
            on_evict: Told of a kept page whose content is about to be lost.
        """
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_pages
        self._findable = [False] * num_pages
        self._on_evict = on_evict or (lambda page: None)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - 1 - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Takes pages, evicting the longest unused kept ones if need be.

        Raises:
            OutOfPagesError: There are fewer than `count`; none is taken.
        """
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages were asked for and {self.num_free} are free.")
        pages = []
        for _ in range(count):
            # The last one freed: its memory is mapped, and on a CPU often still in its cache.
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)
        return pages

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._findable[page] = False
        self._on_evict(page)
        return page

    def share(self, page: int) -> None:
        """Adds a holder to a page that is held or kept."""
        self._references[page] += 1
        self._kept.pop(page, None)

    def is_kept(self, page: int) -> bool:
        """Whether a page is kept: nobody holds it and it can be found."""
        return page in self._kept

    def mark_findable(self, page: int) -> None:
        """Says that the prefix cache finds this page, so that freeing keeps it."""
        self._findable[page] = True

    def free(self, pages: Iterable[int]) -> None:
        """Gives back one reference to each page, the last page first.

        So the tail of a sequence is evicted before its head, which more prompts share.
        """
        for page in reversed(list(pages)):
            self._references[page] -= 1
            if self._references[page] < 0:
                raise OutOfPagesError(f"Page {page} was given back more often than taken.")
            if self._references[page] == 0:
                if self._findable[page]:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def references(self) -> list[int]:
        """Returns the number of holders of each page; for invariant checks."""
        return list(self._references)

    def unowned(self) -> list[int]:
        """Returns free and kept pages; for invariant checks and poison tests."""
        return [*self._free, *self._kept]
