"""The daemon's side of both dirty logs: what a collect and a clear return while a guest goes on writing.

guest thread   w w   w w w   w   w w         (its own mapping, tracked)
daemon           collect  clear  collect     every write is in exactly one answer after it, runs ascend
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from migrated.kernel.tracking import WriteTracking, why_no_tracking
from migrated.kernel.userfault import open_userfaultfd
from migrated.vmm.dirty_log import ByteMapLog, DirtyLog, PagemapScanLog
from migrated.vmm.memory import Span
from protocol.pages import Runs, indices_of
from scripts.rig.huge_pages import HUGE_BYTES, aligned_memory, collapse
from vmm_sim.errors import VmmError
from vmm_sim.memory import GuestMemory
from vmm_sim.tracking import LoggedTracking, PagemapTracking, start_tracking

PAGES = 8192


class Tracked:
    """A guest's memory with a tracker on, and the daemon's log of it."""

    def __init__(self, mode: str) -> None:
        self.memory = GuestMemory(PAGES * 4096)
        self.memory.words[:] = 1
        self.tracking = start_tracking(
            self.memory, "logged" if mode == "logged" else "pagemap-scan", present_only=mode == "present-only"
        )
        assert isinstance(self.tracking, PagemapTracking | LoggedTracking)
        fd = os.dup(self.tracking.fd)
        self.log: DirtyLog = (
            ByteMapLog(fd, PAGES)
            if mode == "logged"
            else PagemapScanLog(fd, [Span(self.memory.address, PAGES, 0)], self.tracking.present_only)
        )

    def write(self, *pages: int) -> None:
        index = np.array(pages, np.int64)
        self.memory.write_words(index, np.zeros((len(index), 1), np.int64), np.ones((len(index), 1), np.uint64))


class SlowLog(DirtyLog):
    """A log whose read waits."""

    mode = None

    def clear(self, start: int, count: int) -> int:
        return 0

    def _collect(self) -> Runs:
        time.sleep(0.03)
        return np.array([[3, 1]], np.int64)

    def close(self) -> None:
        pass


@pytest.fixture(params=["pagemap-scan", "present-only", "logged"])
def tracked(request: pytest.FixtureRequest) -> Iterator[Tracked]:
    try:
        made = Tracked(request.param)
    except VmmError as error:
        pytest.skip(f"this kernel has no asynchronous write protection, or we may not use it: {error}")
    yield made
    made.log.close()
    made.tracking.close()


def ascend(runs: Runs) -> bool:
    return bool((runs[1:, 0] >= runs.sum(axis=1)[:-1]).all())


def test_a_page_is_collected_once_until_it_is_written_again(tracked: Tracked) -> None:
    tracked.log.collect()
    tracked.write(3, 4, 5, 100)
    assert tracked.log.collect().tolist() == [[3, 3], [100, 1]]
    assert tracked.log.collect().tolist() == []
    tracked.write(4)
    assert tracked.log.collect().tolist() == [[4, 1]]


def test_a_run_that_is_cleared_is_not_collected_and_nothing_else_is_touched(tracked: Tracked) -> None:
    tracked.log.collect()
    tracked.write(9, 10, 12, 19, 20)
    assert tracked.log.clear(10, 10) == 3
    assert tracked.log.clear(10, 10) == 0
    assert tracked.log.collect().tolist() == [[9, 1], [20, 1]]
    tracked.write(12)
    assert tracked.log.collect().tolist() == [[12, 1]]


@pytest.mark.parametrize(("ahead", "least_ms", "most_ms"), [(True, 0, 15), (False, 30, 10_000)])
def test_a_read_costs_a_blackout_what_it_waits_only_where_the_blackout_waits_too(
    monkeypatch: pytest.MonkeyPatch, ahead: bool, least_ms: int, most_ms: int
) -> None:
    """A read that stands in line for 30 ms behind others."""
    monkeypatch.setattr("migrated.vmm.dirty_log.may_take_precedence", lambda: ahead)
    runs, cost_ns = SlowLog().collect_with_cost()
    assert runs.tolist() == [[3, 1]]
    assert least_ms <= cost_ns / 1e6 < most_ms


def test_what_is_put_back_is_collected_again(tracked: Tracked) -> None:
    tracked.log.collect()
    tracked.write(7, 8)
    collected = tracked.log.collect()
    tracked.write(8, 9)
    tracked.log.restore(collected)
    assert tracked.log.collect().tolist() == [[7, 3]]


def test_runs_ascend_and_nothing_is_lost_while_the_guest_writes(tracked: Tracked) -> None:
    """Many short runs, written all the time: more than the kernel gathers at once."""
    tracked.log.collect()
    ending = threading.Event()
    written: set[int] = set()

    def guest() -> None:
        generator = np.random.default_rng(1)
        while not ending.is_set():
            pages = generator.integers(0, PAGES, 256)
            tracked.memory.words[pages, 1] += np.uint64(1)
            tracked.memory._mark(pages)
            written.update(pages.tolist())

    thread = threading.Thread(target=guest)
    thread.start()
    found: set[int] = set()
    try:
        for turn in range(30):
            runs = tracked.log.collect()
            assert ascend(runs), runs
            found.update(indices_of(runs).tolist())
            if turn % 3 == 0:
                tracked.log.clear(0, PAGES // 4)
    finally:
        ending.set()
        thread.join()
    found.update(indices_of(tracked.log.collect()).tolist())
    assert {page for page in written if page >= PAGES // 4} == {page for page in found if page >= PAGES // 4}


def test_a_scan_ends_where_the_kernel_names_an_earlier_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux names the place where its own buffer was full last, also when it went on to the end."""
    calls: list[int] = []

    def ioctl(_fd: int, _request: int, argument: bytearray, _mutate: bool) -> int:
        fields = list(struct.unpack("=12Q", argument))
        calls.append(fields[2])
        edges = np.array([[fields[2] + 4096, fields[2] + 8192, 2]], np.uint64)
        target = (ctypes.c_uint64 * 3).from_address(fields[5])
        target[:] = edges[0].tolist()
        fields[4] = fields[2] + 4096
        argument[:] = struct.pack("=12Q", *fields)
        return 1

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    log = PagemapScanLog(os.open(os.devnull, os.O_RDONLY), [Span(1 << 20, 64, 0)], True)
    try:
        assert log.collect().tolist() == [[1, 1]]
        assert calls == [1 << 20]
    finally:
        log.close()


def test_spans_anywhere_in_the_vmm_are_one_log_of_page_numbers() -> None:
    """The pages of two spans that lie the other way round in the address space, and a piece that nobody tracks."""
    memory = GuestMemory(PAGES * 4096)
    memory.words[:] = 1
    try:
        tracking = start_tracking(memory, "pagemap-scan", present_only=True)
    except VmmError as error:
        pytest.skip(f"this kernel has no asynchronous write protection, or we may not use it: {error}")
    assert isinstance(tracking, PagemapTracking)
    half = PAGES // 2
    # The guest's first pages are the VMM's last ones; its 16 pages in the middle are no part of the guest.
    spans = [Span(memory.address, half - 16, half), Span(memory.address + half * 4096, half, 0)]
    log = PagemapScanLog(os.dup(tracking.fd), spans, tracking.present_only)
    try:
        log.collect()
        memory.words[[3, half - 17, half - 16, half, PAGES - 1], 5] += np.uint64(1)
        assert log.collect().tolist() == [[0, 1], [half - 1, 1], [half + 3, 1], [2 * half - 17, 1]]
        memory.words[[0, half, PAGES - 1], 5] += np.uint64(1)
        assert log.clear(half - 1, 2) == 2
        assert log.collect().tolist() == [[0, 1]]
    finally:
        log.close()
        tracking.close()


@pytest.mark.skipif(why_no_tracking() is not None, reason="this kernel cannot track the writes of another process")
def test_tracking_from_outside_reports_single_pages_of_huge_ones() -> None:
    """As for a guest in QEMU, which goes on having huge pages where it has some: of 512 pages only one is written."""
    memory = aligned_memory(2 * HUGE_BYTES)
    memory.words[:512] = 1
    collapse(memory, HUGE_BYTES)
    tracking = WriteTracking(open_userfaultfd(), 0)
    tracking.register(os.getpid(), [(memory.address, memory.bytes)], all_pages=False)
    log = PagemapScanLog(
        os.open("/proc/self/pagemap", os.O_RDONLY), [Span(memory.address, memory.pages, 0)], present_only=True
    )
    log.collect()
    for page in (7, 300, 300, 900):  # the last is a hole
        memory.write_bytes(page * 4096, b"x")
        assert log.collect().tolist() == [[page, 1]]
    log.close()
    tracking.close()
