import pytest

from jaxllm.cache.page_pool import PagePool
from jaxllm.errors import OutOfPagesError


def keep(pool, pages):
    """Makes pages findable and gives them back, so that they are kept."""
    for page in pages:
        pool.mark_findable(page)
    pool.free(pages)


def test_pages_are_handed_out_in_order_and_never_the_trash_page():
    pool = PagePool(num_pages=4)

    assert pool.allocate(3) == [1, 2, 3]


def test_a_new_pool_has_all_pages_free_but_the_trash_page():
    pool = PagePool(num_pages=4)

    assert (pool.num_free, pool.num_held) == (3, 0)


def test_a_pool_of_only_the_trash_page_has_nothing_to_give():
    pool = PagePool(num_pages=1)

    with pytest.raises(OutOfPagesError, match="1 pages were asked for and 0 are free"):
        pool.allocate(1)


def test_freed_pages_are_reused_before_never_used_ones():
    pool = PagePool(num_pages=4)
    first = pool.allocate(2)
    pool.free(first)

    assert pool.allocate(3) == [*first, 3]


def test_asking_for_more_pages_than_are_free_takes_none():
    pool = PagePool(num_pages=4)
    pool.allocate(1)

    with pytest.raises(OutOfPagesError, match="3 pages were asked for and 2 are free"):
        pool.allocate(3)

    assert pool.num_free == 2
    assert pool.references() == [0, 1, 0, 0]


def test_allocating_nothing_gives_nothing():
    pool = PagePool(num_pages=1)

    assert pool.allocate(0) == []


def test_a_shared_page_is_free_only_after_its_last_holder():
    pool = PagePool(num_pages=2)
    (page,) = pool.allocate(1)
    pool.share(page)

    pool.free([page])
    free_after_first = pool.num_free
    pool.free([page])

    assert (free_after_first, pool.num_free) == (0, 1)


def test_a_page_given_back_more_often_than_taken_is_refused():
    pool = PagePool(num_pages=2)
    pages = pool.allocate(1)
    pool.free(pages)

    with pytest.raises(OutOfPagesError, match="Page 1 was given back more often than taken"):
        pool.free(pages)


def test_a_findable_page_is_kept_when_it_is_freed():
    pool = PagePool(num_pages=3)
    findable, other = pool.allocate(2)

    pool.mark_findable(findable)
    pool.free([findable, other])

    assert pool.is_kept(findable)
    assert not pool.is_kept(other)


def test_a_findable_page_is_not_kept_while_it_is_held():
    pool = PagePool(num_pages=2)
    (page,) = pool.allocate(1)
    pool.mark_findable(page)

    assert not pool.is_kept(page)


def test_kept_pages_count_as_free():
    pool = PagePool(num_pages=3)
    keep(pool, pool.allocate(2))

    assert (pool.num_free, pool.num_held) == (2, 0)


def test_free_pages_are_taken_before_any_kept_one_is_evicted():
    evicted = []
    pool = PagePool(num_pages=4, on_evict=evicted.append)
    keep(pool, pool.allocate(1))

    pages = pool.allocate(2)

    assert (pages, evicted) == ([2, 3], [])


def test_the_longest_unused_kept_page_is_evicted_first():
    evicted = []
    pool = PagePool(num_pages=4, on_evict=evicted.append)
    first, second, third = pool.allocate(3)
    for page in (second, third, first):
        keep(pool, [page])

    pages = pool.allocate(3)

    assert pages == evicted == [second, third, first]


def test_the_tail_of_a_sequence_is_evicted_before_its_head():
    evicted = []
    pool = PagePool(num_pages=4, on_evict=evicted.append)
    pages = pool.allocate(3)
    keep(pool, pages)

    pool.allocate(2)

    assert evicted == [pages[2], pages[1]]


def test_sharing_a_kept_page_saves_it_from_eviction():
    evicted = []
    pool = PagePool(num_pages=3, on_evict=evicted.append)
    old, new = pool.allocate(2)
    keep(pool, [old])
    keep(pool, [new])

    pool.share(old)

    assert pool.allocate(1) == evicted == [new]
    assert pool.num_free == 0


def test_a_page_that_was_used_again_is_the_last_to_be_evicted():
    pool = PagePool(num_pages=3)
    old, new = pool.allocate(2)
    keep(pool, [old])
    keep(pool, [new])

    pool.share(old)
    pool.free([old])

    assert pool.allocate(2) == [new, old]


def test_an_evicted_page_is_not_kept_for_its_next_holder():
    pool = PagePool(num_pages=2)
    keep(pool, pool.allocate(1))

    pages = pool.allocate(1)
    pool.free(pages)

    assert not pool.is_kept(pages[0])


def test_references_count_the_holders_of_each_page():
    pool = PagePool(num_pages=4)
    one, two, three = pool.allocate(3)
    pool.share(two)
    pool.free([three])

    assert [pool.references()[page] for page in (one, two, three)] == [1, 2, 0]


def test_unowned_lists_free_and_kept_pages():
    pool = PagePool(num_pages=5)
    kept, _held, freed = pool.allocate(3)
    keep(pool, [kept])
    pool.free([freed])

    assert sorted(pool.unowned()) == [kept, freed, 4]
