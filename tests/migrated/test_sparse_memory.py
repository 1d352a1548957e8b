"""Memory that the guest does not use stays unused on the way of its pages, and memory that it uses densely is populated
ahead of them.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
from typing import Any

import numpy as np
import pytest

from migrated.source import pages as source_pages
from migrated.vmm import memory as memory_module
from migrated.vmm.memory import WORDS_PER_PAGE, MappedMemory
from protocol import messages
from protocol.guest import PAGE_SIZE
from protocol.pages import pack_runs, runs_of, split_runs
from tests.migrated.page_paths import HUGE, PAGES, WAIT_S, Memory, content_of, noise, path, run, until


@pytest.mark.parametrize("announce", [False, True])
async def test_holes_and_zero_pages_take_no_memory_on_the_destination(announce: bool) -> None:
    async with path(8 * HUGE, 2) as both:
        memory = both.source.guest
        both.send_with(announce=announce)
        memory.words[HUGE + 5 : 3 * HUGE] = noise(2 * HUGE - 5, 1)
        memory.words[4 * HUGE : 5 * HUGE] = 0  # touched, all zero
        memory.words[6 * HUGE : 6 * HUGE + 9 : 2] = noise(5, 2)
        assert both.source.backed_pages() == 3 * HUGE - 5 + 5
        sent, _ = await both.round(memory.data_runs())
        assert (sent.normal_pages, sent.zero_pages) == (2 * HUGE - 5 + 5, HUGE)
        both.assert_equal()
        assert both.destination.backed_pages() == 2 * HUGE - 5 + 5


def mapped_pages(memory: MappedMemory) -> int:
    """How many pages of a mapping have an entry in the page tables: bit 63 in /proc/self/pagemap."""
    with pathlib.Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(memory.words.ctypes.data // PAGE_SIZE * 8)
        return int((np.frombuffer(pagemap.read(8 * memory.pages), np.uint64) >> np.uint64(63)).sum())


async def test_what_came_through_the_file_is_mapped_after_the_first_round_and_holes_stay_holes() -> None:
    async with path(8 * HUGE, 1) as both:
        memory = both.source.guest
        both.send_with()
        memory.words[HUGE : 3 * HUGE] = noise(2 * HUGE, 1)
        memory.words[5 * HUGE : 5 * HUGE + 40] = noise(40, 2)
        await both.round(memory.data_runs())
        await until(lambda: mapped_pages(both.destination.guest) >= 2 * HUGE + 40)
        assert both.destination.backed_pages() == 2 * HUGE + 40
        both.assert_equal()


async def test_nothing_is_mapped_ahead_once_the_guest_is_stopped() -> None:
    async with path(8 * HUGE, 1) as both:
        both.receiver.guest_stopped()
        both.send_with()
        both.source.guest.words[:] = noise(8 * HUGE, 1)
        await both.round(both.source.guest.data_runs())
        assert mapped_pages(both.destination.guest) == 0


async def test_pages_that_become_zero_are_given_back_where_they_are_many_in_a_row() -> None:
    async with path(PAGES, 1) as both:
        both.send_with()
        both.source.guest.words[:300] = noise(300, 1)
        await both.round(run(0, 300))
        both.source.guest.words[100:200] = 0
        both.source.guest.words[210:300:7] = 0
        await both.round(run(0, 300))
        both.assert_equal()
        assert both.destination.backed_pages() == 200
        both.source.guest.words[100:104] = noise(4, 2)
        both.source.guest.words[210:214] = noise(4, 3)
        await both.round(runs_of(np.array([100, 101, 102, 103, 210, 211, 212, 213])))
        both.assert_equal()
        assert both.destination.backed_pages() == 204


async def test_of_scattered_pages_only_those_travel_that_are_not_zero_to_their_end() -> None:
    async with path(PAGES, 2) as both:
        both.send_with()
        scattered = np.arange(1, PAGES, 3)
        both.source.guest.words[scattered] = noise(len(scattered), 1)
        both.source.guest.words[scattered[::5]] = 0
        both.source.guest.words[scattered[::10], -1] = 7  # only the last word of the page
        sent, received = await both.round(runs_of(scattered))
        zero = len(scattered[::5]) - len(scattered[::10])
        assert (sent.zero_pages, sent.normal_pages) == (zero, len(scattered) - zero)
        assert (received.zero_pages, received.normal_pages) == (zero, len(scattered) - zero)
        both.assert_equal()


async def test_announced_memory_that_turns_out_zero_is_given_back() -> None:
    async with path(2 * HUGE, 1) as both:
        channel = both.channels[0]
        channel.send(messages.Extents(runs=pack_runs(run(0, 2 * HUGE))), round_number=1)
        await until(lambda: both.destination.backed_pages() == 2 * HUGE)  # a thread of its own populates it
        channel.send(messages.ZeroPages(runs=pack_runs(run(0, HUGE))), round_number=1)
        channel.send(messages.Barrier(round=1), round_number=1)
        async with asyncio.timeout(WAIT_S):
            await both.rounds.get()
        assert both.destination.backed_pages() == HUGE
        assert not any(both.destination.content())


@pytest.mark.parametrize("possible", [False, True])
async def test_announced_memory_arrives_right_whether_or_not_it_can_be_populated(
    possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with path(8 * HUGE, 2) as both:
        if not possible:
            monkeypatch.setattr(both.destination.guest, "populate_huge", lambda *_run: False)
        both.send_with(announce=True)
        both.source.guest.words[3 : 7 * HUGE] = noise(7 * HUGE - 3, 1)
        await both.round(both.source.guest.data_runs())
        both.assert_equal()
        both.source.guest.words[::5, 9] += np.uint64(1)
        await both.round(runs_of(np.arange(0, 8 * HUGE, 5)))
        both.assert_equal()


async def test_only_huge_pages_without_a_zero_page_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with path(4 * HUGE, 2) as both:
        announced: list[list[int]] = []
        monkeypatch.setattr(both.receiver.populator, "expect", lambda runs: announced.extend(runs.tolist()))
        both.source.guest.words[:] = noise(4 * HUGE, 1)
        both.source.guest.words[2 * HUGE + 7] = 0
        both.send_with(announce=True)
        await both.round(run(0, 4 * HUGE))
        assert announced == [[0, 2 * HUGE], [3 * HUGE, HUGE]]
        both.assert_equal()


async def test_memory_that_is_announced_again_is_populated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with path(4 * HUGE, 1) as both:
        populated: list[tuple[int, int]] = []

        def populate(start: int, count: int) -> bool:
            populated.append((start, count))
            return True

        monkeypatch.setattr(both.destination.guest, "populate_huge", populate)
        for start in (0, 0, 0, 1):
            both.channels[0].send(messages.Extents(runs=pack_runs(run(start * HUGE, HUGE))), round_number=1)
        await until(lambda: (HUGE, HUGE) in populated)
        assert populated == [(0, HUGE), (HUGE, HUGE)]


async def test_memory_is_written_whole_also_when_the_kernel_takes_less_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    memory = Memory(8)
    try:
        memory.guest.write_new(3, np.frombuffer(content_of(2), np.uint64).reshape(2, WORDS_PER_PAGE))
        assert memory.content() == bytes(3 * PAGE_SIZE) + content_of(2) + bytes(3 * PAGE_SIZE)
    finally:
        memory.close()


def test_every_stretch_is_announced_before_its_batches_and_only_whole_huge_pages() -> None:
    runs = np.array([[3, 20_000], [30_000, 400], [40_960, 1024], [90_000, 5_000]], np.int64)
    batches = split_runs(runs, 256)
    jobs: list[Any] = [("batch", int(batch[0, 0])) for batch in batches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_pages, "_announce_job", lambda granules: ("announce", granules * HUGE))
        order: list[Any] = source_pages._looking_ahead(runs, batches, jobs)
    assert [job for job in order if job[0] == "batch"] == jobs
    announced = np.concatenate([extents for kind, extents in order if kind == "announce"])
    assert not (announced % HUGE).any()
    inside = [
        any(start >= first and start + count <= first + pages for first, pages in runs.tolist())
        for start, count in announced.tolist()
    ]
    assert all(inside)
    assert announced[:, 1].sum() == (19_968 - 512) + 1024 + 4_608
    seen: list[int] = []
    for kind, value in order:
        if kind == "announce":
            assert not any(first >= value[0, 0] for first in seen), "a stretch is announced after its own batches"
        else:
            seen.append(value)


def test_whether_the_host_has_shared_huge_pages(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "shmem_enabled"
    monkeypatch.setattr(memory_module, "_SHMEM_HUGE", setting)
    assert not memory_module.shared_huge_pages()
    for text, huge in (
        ("always within_size advise [never] deny force", False),
        ("always within_size advise never [deny] force", False),
        ("always within_size [advise] never deny force", True),
        ("[always] within_size advise never deny force", True),
    ):
        setting.write_text(text)
        assert memory_module.shared_huge_pages() is huge
