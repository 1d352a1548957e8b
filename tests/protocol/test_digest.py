"""The memory digest against a page-by-page definition in plain integers, and what it must notice."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protocol.digest import MemoryDigest

TOTAL = 64
MASK = 2**64 - 1

hashes = st.integers(0, MASK)
page_lists = st.lists(st.integers(0, TOTAL - 1), min_size=1, max_size=12, unique=True)
batch = st.tuples(page_lists, st.one_of(st.none(), hashes))
histories = st.lists(batch, max_size=12)


def scramble(value: int) -> int:
    value ^= value >> 32
    value = value * 0xD6E8FEB86659FD93 & MASK
    return value ^ value >> 32


def weight(page: int, entry: int) -> int:
    return scramble(entry ^ (page + 1) * 0xC2B2AE3D27D4EB4F & MASK) if entry else 0


def entry_of(batch_hash: int, slot: int) -> int:
    return scramble(batch_hash + slot * 0x9E3779B97F4A7C15 & MASK) | 1


class NaiveDigest:
    """The definition: one entry for every page, the sum of their weights."""

    def __init__(self) -> None:
        self.entries = [0] * TOTAL

    def take(self, pages: list[int], batch_hash: int | None) -> None:
        for slot, page in enumerate(pages):
            self.entries[page] = 0 if batch_hash is None else entry_of(batch_hash, slot)

    @property
    def value(self) -> int:
        return sum(weight(page, entry) for page, entry in enumerate(self.entries)) & MASK


def take(digest: MemoryDigest, pages: list[int], batch_hash: int | None) -> None:
    index = np.array(pages, np.int64)
    digest.add(digest.set_zero(index) if batch_hash is None else digest.set_pages(index, batch_hash))


def digest_after(history: list[tuple[list[int], int | None]]) -> MemoryDigest:
    digest = MemoryDigest(TOTAL)
    for pages, batch_hash in history:
        take(digest, pages, batch_hash)
    return digest


def test_zero_memory_is_0() -> None:
    assert MemoryDigest(TOTAL).value == 0


@given(histories)
def test_every_update_equals_recomputation(history: list[tuple[list[int], int | None]]) -> None:
    digest, naive = MemoryDigest(TOTAL), NaiveDigest()
    for pages, batch_hash in history:
        take(digest, pages, batch_hash)
        naive.take(pages, batch_hash)
        assert digest.value == naive.value
    assert digest.entries.tolist() == naive.entries


@given(histories)
def test_memory_that_becomes_zero_again_is_0(history: list[tuple[list[int], int | None]]) -> None:
    digest = digest_after(history)
    take(digest, list(range(TOTAL)), None)
    assert digest.value == 0


@given(st.lists(hashes, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_batches_with_distinct_pages_is_irrelevant(values: list[int], random: Random) -> None:
    history: list[tuple[list[int], int | None]] = [
        (list(range(at * 8, at * 8 + 8)), value) for at, value in enumerate(values)
    ]
    shuffled = history[:]
    random.shuffle(shuffled)
    assert digest_after(history).value == digest_after(shuffled).value


@given(histories, page_lists, hashes)
def test_a_lost_batch_shows(history: list[tuple[list[int], int | None]], pages: list[int], batch_hash: int) -> None:
    whole = digest_after([*history, (pages, batch_hash)])
    lost = digest_after(history)
    assert (whole.value == lost.value) == (whole.entries.tolist() == lost.entries.tolist())


@given(page_lists, hashes, hashes)
def test_a_stale_page_shows(pages: list[int], old: int, new: int) -> None:
    """The destination kept the last page of the batch as it was before."""
    source = digest_after([(pages, old), (pages, new)])
    stale = digest_after([(pages, old), (pages, new)])
    kept = entry_of(old, len(pages) - 1)
    page = pages[-1]
    stale.add(weight(page, kept) - weight(page, int(stale.entries[page])))
    assert (stale.value == source.value) == (old == new)


@given(st.lists(st.integers(0, TOTAL - 1), min_size=2, max_size=12, unique=True), hashes)
def test_swapped_pages_show(pages: list[int], batch_hash: int) -> None:
    swapped = [pages[1], pages[0], *pages[2:]]
    assert digest_after([(pages, batch_hash)]).value != digest_after([(swapped, batch_hash)]).value


@given(page_lists, hashes)
def test_a_page_zeroed_on_one_side_shows(pages: list[int], batch_hash: int) -> None:
    history: list[tuple[list[int], int | None]] = [(pages, batch_hash)]
    assert digest_after(history).value != digest_after([*history, (pages[:1], None)]).value


@given(page_lists, hashes, st.integers(0, 63))
def test_one_flipped_bit_of_content_shows(pages: list[int], batch_hash: int, bit: int) -> None:
    assert digest_after([(pages, batch_hash)]).value != digest_after([(pages, batch_hash ^ 1 << bit)]).value


def test_the_same_content_on_another_page_shows() -> None:
    assert digest_after([([3], 12345)]).value != digest_after([([4], 12345)]).value


def test_no_collision_among_many_single_changes() -> None:
    """Ten thousand tables that differ in one batch hash or one page, all with their own digest."""
    seen = {digest_after([([page], value * 0x1234567)]).value for page in range(TOTAL) for value in range(160)}
    assert len(seen) == TOTAL * 160
