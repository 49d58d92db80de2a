"""The pages of examples/paged_mla: no page has two owners, no token two slots, and what fails changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_mla import OutOfPagesError, PageAllocator, PagedLatentCache

PAGE_SIZE = 64
SETTINGS = settings(max_examples=60, deadline=None)


def make_cache(max_requests: int = 3, max_tokens: int = 200, num_pages: int | None = None) -> PagedLatentCache:
    return PagedLatentCache(2, max_requests, max_tokens, torch.float32, "cpu", num_pages)


@SETTINGS
@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=30))
def test_every_page_is_free_or_has_one_owner(num_pages, operations):
    allocator, owned = PageAllocator(num_pages), []
    for allocate, number in operations:
        if not allocate and owned:
            allocator.free(owned.pop(number % len(owned)))
        elif number <= allocator.num_free:
            owned.append(allocator.allocate(number))
            assert len(owned[-1]) == number
        else:
            with pytest.raises(OutOfPagesError, match=rf"^count must be at most {allocator.num_free}, .*got {number}$"):
                allocator.allocate(number)
        pages = [page for each in owned for page in each]
        assert len(set(pages)) == len(pages) and set(pages) <= set(range(num_pages))
        assert allocator.num_free == num_pages - len(pages)
    # Nothing is lost: all that are free can be had.
    rest = allocator.allocate(allocator.num_free)
    assert sorted(rest + [page for each in owned for page in each]) == list(range(num_pages))


@pytest.mark.parametrize("pages", [[3], [0, 0], [0, 2], [-1], [7]], ids=str)
def test_pages_that_are_not_in_use_are_not_taken_back(pages):
    allocator = PageAllocator(7)
    assert allocator.allocate(2) == [0, 1]
    with pytest.raises(ValueError, match=r"^pages must be different pages in use, got \["):
        allocator.free(pages)
    assert allocator.num_free == 5
    allocator.free([0, 1])
    assert allocator.num_free == 7


def test_a_freed_page_is_the_next_to_go():
    """Its memory is the likeliest to be in a cache."""
    allocator = PageAllocator(4)
    first, second = allocator.allocate(2), allocator.allocate(1)
    allocator.free(first)
    assert allocator.allocate(3) == [*first, 3] and second == [2]


def check_consistent(cache: PagedLatentCache) -> None:
    """Host and device agree, and no two tokens in the cache have the same slot."""
    assert cache.cache_seqlens.tolist() == cache.lengths
    slots = [cache.slots(row).tolist() for row in range(len(cache.lengths))]
    assert [len(each) for each in slots] == cache.lengths
    together = [slot for each in slots for slot in each]
    assert len(set(together)) == len(together)
    assert all(0 <= slot < cache.allocator.num_pages * PAGE_SIZE for slot in together)
    num_pages = [-(-length // PAGE_SIZE) for length in cache.lengths]
    assert cache.allocator.num_free == cache.allocator.num_pages - sum(num_pages)
    for row, used in zip(cache.block_table.tolist(), num_pages, strict=True):
        assert all(page >= 0 for page in row[:used]) and all(page == -1 for page in row[used:])


def state_of(cache: PagedLatentCache) -> tuple[list[int], list[list[int]], list[int], int]:
    return list(cache.lengths), cache.block_table.tolist(), cache.cache_seqlens.tolist(), cache.allocator.num_free


OPERATIONS = st.one_of(
    st.tuples(st.just("admit"), st.integers(1, 200)),
    st.tuples(st.just("step"), st.integers(1, 70)),
    st.tuples(st.just("release"), st.integers(0, 2)),
)


@SETTINGS
@given(st.integers(1, 8), st.lists(OPERATIONS, max_size=12))
def test_requests_come_grow_and_go(num_pages, operations):
    cache = make_cache(num_pages=num_pages)
    for operation, number in operations:
        before = state_of(cache)
        try:
            if operation == "admit":
                row = cache.admit(number)
                assert before[0][row] == 0 and cache.lengths[row] == number
            elif operation == "step":
                for _ in range(number):
                    before = state_of(cache)
                    cache.reserve_next()
                    positions, slots = cache.advance()
                    assert positions.tolist() == before[2]
                    for row, slot in enumerate(slots.tolist()):
                        assert slot == cache.slots(row)[-1] if cache.lengths[row] else slot < 0
            else:
                cache.release(number)
                assert cache.lengths[number] == 0
        except (ValueError, RuntimeError):
            assert state_of(cache) == before
        check_consistent(cache)


def test_advance_waits_for_a_page():
    """Without a page from the host, the device neither counts a token nor gives it a slot."""
    cache = make_cache()
    cache.admit(64)
    _, slots = cache.advance()
    assert (slots < 0).all() and cache.cache_seqlens.tolist() == [64, 0, 0]


def test_a_cache_that_is_full():
    cache = make_cache(max_requests=3, max_tokens=128, num_pages=4)
    assert [cache.admit(64), cache.admit(100)] == [0, 1]
    for _ in range(28):
        cache.reserve_next()
        cache.advance()
    assert cache.lengths == [92, 128, 0] and cache.allocator.num_free == 0
    with pytest.raises(ValueError, match=r"^row 1 must have less than max_tokens = 128 tokens, got as many"):
        cache.reserve_next()
    with pytest.raises(OutOfPagesError, match=r"^count must be at most 0, the pages that are free, got 1"):
        cache.admit(1)
    cache.release(1)
    assert cache.admit(65) == 1
    check_consistent(cache)


def test_more_requests_than_rows():
    cache = make_cache(max_requests=1)
    cache.admit(1)
    with pytest.raises(RuntimeError, match=r"^max_requests = 1 requests are in the cache, got one more"):
        cache.admit(1)


@pytest.mark.parametrize("num_tokens", [0, -1, 201])
def test_lengths_that_do_not_fit(num_tokens):
    with pytest.raises(ValueError, match=rf"^num_tokens must be from 1 to max_tokens = 200, got {num_tokens}"):
        make_cache().admit(num_tokens)


@pytest.mark.parametrize("row", [1, -1, 3])
def test_rows_without_a_request(row):
    cache = make_cache()
    cache.admit(5)
    with pytest.raises(ValueError, match=rf"^row must be one of \[0\], which have a request, got {row}"):
        cache.release(row)


@pytest.mark.parametrize("name", ["max_requests", "max_tokens", "num_pages"])
def test_sizes_of_nothing(name):
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got 0"):
        make_cache(**{name: 0})


def test_negative_counts():
    with pytest.raises(ValueError, match=r"^count must be at least 0, got -1"):
        PageAllocator(3).allocate(-1)
