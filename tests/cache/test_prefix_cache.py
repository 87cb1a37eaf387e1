from jaxllm.cache.prefix_cache import ROOT, PrefixCache

PAGE_SIZE = 2


def store(cache, tokens, extra=None, *, free=True):
    """Caches the full pages of a sequence, as the scheduler does; returns the pages."""
    pages = cache.pool.allocate(len(tokens) // PAGE_SIZE)
    parent = ROOT
    for i, page in enumerate(pages):
        parent = cache.add(parent, tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE], extra, page)
    if free:
        cache.pool.free(pages)
    return pages


def found(cache, tokens, extra=None):
    return [node.page for node in cache.find(tokens, extra)]


def test_an_empty_cache_finds_nothing():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)

    assert found(cache, [1, 2, 3, 4]) == []


def test_the_longest_chain_of_cached_pages_is_found():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    pages = store(cache, [1, 2, 3, 4, 5, 6])

    assert found(cache, [1, 2, 3, 4, 9, 9, 9]) == pages[:2]


def test_at_least_one_token_is_left_to_compute():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    pages = store(cache, [1, 2, 3, 4])

    assert found(cache, [1, 2, 3, 4]) == pages[:1]
    assert found(cache, [1, 2, 3, 4, 5]) == pages


def test_prompts_of_up_to_one_page_find_nothing():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    store(cache, [1, 2])

    assert found(cache, []) == found(cache, [1]) == found(cache, [1, 2]) == []


def test_a_page_is_found_while_its_owner_still_holds_it():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    pages = store(cache, [1, 2], free=False)

    assert found(cache, [1, 2, 3]) == pages


def test_a_page_is_found_only_after_the_pages_before_it():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    store(cache, [1, 2, 3, 4])

    assert found(cache, [3, 4, 5]) == []


def test_the_same_tokens_after_other_ones_are_another_page():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    first = store(cache, [1, 1, 7, 7])
    second = store(cache, [2, 2, 7, 7])

    assert found(cache, [1, 1, 7, 7, 0]) == first
    assert found(cache, [2, 2, 7, 7, 0]) == second


def test_salts_separate_domains():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    plain = store(cache, [1, 2])
    salted = store(cache, [1, 2], "mine")

    assert found(cache, [1, 2, 3]) == plain
    assert found(cache, [1, 2, 3], "mine") == salted
    assert found(cache, [1, 2, 3], "yours") == []


def test_of_two_equal_pages_the_first_stays_the_one_to_be_found():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    first, second = cache.pool.allocate(2)

    number = cache.add(ROOT, [1, 2], None, first)

    assert cache.add(ROOT, [1, 2], None, second) == number
    assert found(cache, [1, 2, 3]) == [first]


def test_the_second_of_two_equal_pages_is_not_kept():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    first, second = cache.pool.allocate(2)
    cache.add(ROOT, [1, 2], None, first)
    cache.add(ROOT, [1, 2], None, second)

    cache.pool.free([first, second])

    assert cache.pool.is_kept(first)
    assert not cache.pool.is_kept(second)


def test_a_chain_may_go_on_from_a_duplicate():
    cache = PrefixCache(num_pages=10, page_size=PAGE_SIZE)
    first, duplicate, child = cache.pool.allocate(3)
    cache.add(ROOT, [1, 2], None, first)
    number = cache.add(ROOT, [1, 2], None, duplicate)

    cache.add(number, [3, 4], None, child)

    assert found(cache, [1, 2, 3, 4, 5]) == [first, child]


def test_an_evicted_page_is_no_longer_found():
    cache = PrefixCache(num_pages=2, page_size=PAGE_SIZE)
    store(cache, [1, 2])

    cache.pool.allocate(1)

    assert found(cache, [1, 2, 3]) == []


def test_eviction_takes_the_tail_of_a_chain_and_leaves_its_head():
    cache = PrefixCache(num_pages=4, page_size=PAGE_SIZE)
    pages = store(cache, [1, 2, 3, 4, 5, 6])

    cache.pool.allocate(1)

    assert found(cache, [1, 2, 3, 4, 5, 6, 7]) == pages[:2]


def test_the_least_recently_used_chain_is_evicted_first():
    cache = PrefixCache(num_pages=5, page_size=PAGE_SIZE)
    old = store(cache, [1, 1, 1, 1])
    store(cache, [2, 2, 2, 2])
    for page in old:
        cache.pool.share(page)
    cache.pool.free(old)

    cache.pool.allocate(2)

    assert found(cache, [1, 1, 1, 1, 0]) == old
    assert found(cache, [2, 2, 2, 2, 0]) == []


def test_the_child_of_an_evicted_page_cannot_be_reached():
    cache = PrefixCache(num_pages=3, page_size=PAGE_SIZE)
    parent, child = store(cache, [1, 2, 3, 4], free=False)
    cache.pool.free([parent])  # the child is still held, and its parent goes first

    assert cache.pool.allocate(1) == [parent]

    assert found(cache, [1, 2, 3, 4, 5]) == []
    assert cache.pool.references()[child] == 1


def test_a_parent_computed_anew_does_not_bring_its_old_child_back():
    cache = PrefixCache(num_pages=3, page_size=PAGE_SIZE)
    parent, _child = store(cache, [1, 2, 3, 4], free=False)
    cache.pool.free([parent])
    again = cache.pool.allocate(1)

    cache.add(ROOT, [1, 2], None, again[0])

    assert found(cache, [1, 2, 3, 4, 5]) == again


def test_numbers_are_never_given_twice():
    cache = PrefixCache(num_pages=2, page_size=PAGE_SIZE)
    numbers = []
    for token in range(5):
        pages = cache.pool.allocate(1)  # evicts the page before
        numbers.append(cache.add(ROOT, [token, token], None, pages[0]))
        cache.pool.free(pages)

    assert len({ROOT, *numbers}) == 6


def test_forgetting_pages_leaves_no_trace_of_them():
    cache = PrefixCache(num_pages=3, page_size=PAGE_SIZE)
    for token in range(20):
        store(cache, [token] * 4)

    assert len(cache._nodes) == len(cache._keys) == 2
