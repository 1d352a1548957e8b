"""Both dirty trackers against the true set of written pages."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrated.kernel import memory as kernel_memory
from scripts.rig.huge_pages import HUGE_BYTES, aligned_memory, collapse
from vmm_sim.config import GuestConfig, build_config
from vmm_sim.content import PAGE_SIZE, WORDS
from vmm_sim.errors import VmmError
from vmm_sim.memory import GuestMemory
from vmm_sim.tracking import LoggedTracking, Mode, PagemapTracking, start_tracking
from vmm_sim.workload import Workload

PAGEMAP_SCAN = 0xC0606610
WP_MATCHING_CHECK_ASYNC = 3
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_PRESENT_OR_SWAPPED = (1 << 3) | (1 << 4)
MEMORY_BYTES = 4 << 20


def kernel_has_pagemap_scan() -> bool:
    memory = GuestMemory(1 << 20)
    try:
        start_tracking(memory, "pagemap-scan").close()
    except VmmError:
        return False
    return True


needs_pagemap_scan = pytest.mark.skipif(
    not kernel_has_pagemap_scan(), reason="this kernel has no asynchronous write protection, or we may not use it"
)
PRESENT_ONLY = "pagemap-scan of present pages"
MODES = [
    pytest.param("pagemap-scan", marks=needs_pagemap_scan),
    pytest.param(PRESENT_ONLY, marks=needs_pagemap_scan),
    "logged",
]


def scan_pagemap(pagemap: int, address: int, length: int, *, present_only: bool) -> set[int]:
    """Written pages, which become clean: what a daemon does."""
    regions = np.zeros(3 * 1024, dtype=np.uint64)
    any_of = PAGE_IS_PRESENT_OR_SWAPPED if present_only else 0
    found: set[int] = set()
    start = address
    while start < address + length:
        fields = (96, WP_MATCHING_CHECK_ASYNC, start, address + length, 0, regions.ctypes.data, 1024, 0)
        argument = bytearray(struct.pack("<12Q", *fields, 0, PAGE_IS_WRITTEN, any_of, PAGE_IS_WRITTEN))
        count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
        for first, last, _ in regions[: 3 * count].reshape(-1, 3).tolist():
            found.update(range((first - address) // PAGE_SIZE, (last - address) // PAGE_SIZE))
        (start,) = struct.unpack_from("<Q", argument, 32)
    return found


def collect_bytes(log: np.ndarray) -> set[int]:
    """Marked pages, which become clean before their content would be read."""
    index = np.flatnonzero(log)
    log[index] = 0
    return set(index.tolist())


class Tracked:
    """Guest memory with a tracker on."""

    def __init__(self, mode: str, memory: GuestMemory) -> None:
        self.memory = memory
        present_only = mode == PRESENT_ONLY
        name: Mode = "logged" if mode == "logged" else "pagemap-scan"
        self.tracking = start_tracking(memory, name, present_only=present_only)
        assert (self.tracking.mode, self.tracking.present_only) == (name, present_only)

    def collect(self) -> set[int]:
        if isinstance(self.tracking, PagemapTracking):
            tracking = self.tracking
            address, length = self.memory.address, self.memory.bytes
            return scan_pagemap(tracking.fd, address, length, present_only=tracking.present_only)
        assert isinstance(self.tracking, LoggedTracking)
        with mmap.mmap(self.tracking.fd, self.memory.pages) as shared:
            log = np.frombuffer(shared, dtype=np.uint8)
            found = collect_bytes(log)
            del log
        return found


def idle_guest(**options: Any) -> GuestConfig:
    uuid = "11111111-2222-3333-4444-555555555555"
    return build_config({"name": "g", "uuid": uuid, "memory": MEMORY_BYTES, **options})


@pytest.fixture
def memory() -> GuestMemory:
    """Half touched, half holes."""
    memory = GuestMemory(MEMORY_BYTES)
    memory.words[:512] = 1
    return memory


@pytest.mark.parametrize("mode", MODES)
def test_a_log_starts_clean_and_populates_nothing(mode: str, memory: GuestMemory) -> None:
    blocks = os.fstat(memory.fd).st_blocks
    tracked = Tracked(mode, memory)
    assert tracked.collect() == set()
    assert os.fstat(memory.fd).st_blocks == blocks
    tracked.tracking.close()


writes = st.one_of(
    st.tuples(st.just("page"), st.integers(0, 1023)),
    st.tuples(st.just("run"), st.integers(0, 1000)),
    st.tuples(st.just("words"), st.integers(0, 1023)),
    st.tuples(st.just("bytes"), st.integers(0, 1023)),
)


def perform(memory: GuestMemory, write: tuple[str, int]) -> set[int]:
    """One write by one of the paths the guest side has; returns the pages it wrote."""
    kind, page = write
    pages = np.array([page], dtype=np.int64)
    if kind == "page":
        memory.write_pages(pages, np.full((1, WORDS), 7, dtype=np.uint64))
    elif kind == "run":
        memory.write_run(page, page + 20, lambda out: out.fill(9))
        return set(range(page, page + 20))
    elif kind == "words":
        memory.write_words(pages, np.array([[3, 500]]), np.array([[1, 2]], dtype=np.uint64))
    else:
        memory.write_bytes(page * PAGE_SIZE + 100, b"beat")
    return {page}


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(rounds=st.lists(st.lists(writes, max_size=12), min_size=1, max_size=4))
def test_every_round_reports_exactly_what_was_written(mode: str, rounds: list[list[tuple[str, int]]]) -> None:
    memory = GuestMemory(MEMORY_BYTES)
    memory.words[:512] = 1
    tracked = Tracked(mode, memory)
    for batch in rounds:
        truth = set().union(*(perform(memory, write) for write in batch))
        assert tracked.collect() == truth
    tracked.tracking.close()


@needs_pagemap_scan
@pytest.mark.parametrize("mode", ["pagemap-scan", PRESENT_ONLY])
@settings(max_examples=12, deadline=None)
@given(moves=st.lists(st.lists(st.lists(writes, max_size=12), min_size=1, max_size=3), min_size=1, max_size=3))
def test_huge_pages_are_reported_page_by_page_every_time(mode: str, moves: list[list[list[tuple[str, int]]]]) -> None:
    """Nothing is missed and nothing is reported that was not written, however often tracking begins anew and the kernel
    puts the huge page together in between."""
    memory = aligned_memory(MEMORY_BYTES)
    memory.words[:512] = 1
    for rounds in moves:
        collapse(memory, HUGE_BYTES)
        tracked = Tracked(mode, memory)
        for batch in rounds:
            truth = set().union(*(perform(memory, write) for write in batch))
            assert tracked.collect() == truth
        tracked.tracking.close()


@needs_pagemap_scan
def test_huge_pages_are_allowed_again_when_tracking_ends(memory: GuestMemory) -> None:
    tracked = Tracked("pagemap-scan", memory)
    assert not kernel_memory.huge_pages_allowed()
    tracked.tracking.close()
    assert kernel_memory.huge_pages_allowed()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", ["sequential", "random", "hot-cold", "phased", "fill", "delta", "stride"])
def test_a_workloads_writes_are_reported_exactly(mode: str, workload: str) -> None:
    load = Workload(idle_guest(workload=workload, phase_steps=90))
    memory = GuestMemory(MEMORY_BYTES)
    load.populate(memory, 1, load.touched_pages)
    tracked = Tracked(mode, memory)
    step = 0
    for steps in (1, 63, 64, 200):
        before = load.expected(step, 0, 1, load.touched_pages).generations
        for part in range(0, steps, 64):
            load.execute(memory, step + part, min(64, steps - part))
        step += steps
        after = load.expected(step, 0, 1, load.touched_pages).generations
        assert tracked.collect() == set((np.flatnonzero(after != before) + 1).tolist())
    tracked.tracking.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_restarted_log_is_clean_and_a_stopped_one_silent(mode: str, memory: GuestMemory) -> None:
    first = Tracked(mode, memory)
    perform(memory, ("page", 3))
    first.tracking.close()
    perform(memory, ("page", 4))
    second = Tracked(mode, memory)
    perform(memory, ("page", 5))
    assert second.collect() == {5}
    second.tracking.close()


@pytest.mark.parametrize("mode", MODES)
async def test_a_running_guest_is_tracked_exactly(mode: str, house: Any) -> None:
    """start log | run | pause at step s | the log equals the pages whose generation changed, and the heartbeat."""
    guest = await house.start("g1", "--memory", "16MiB", "--workload", "random", "--dirty-rate", "100MiB/s", "--paused")
    before = await guest.call("pause")
    name, present_only = ("logged", False) if mode == "logged" else ("pagemap-scan", mode == PRESENT_ONLY)
    started = await guest.call("dirty-log-start", mode=name, present_only=present_only)
    assert (started["mode"], started["present_only"]) == (name, present_only)
    await guest.call("resume")
    await guest.until(lambda status: status["step"] > 500)
    after = await guest.call("pause")
    load = Workload(idle_guest(memory="16MiB", workload="random", dirty_rate="100MiB/s"))
    old = load.expected(before["step"], 0, 1, load.touched_pages).generations
    new = load.expected(after["step"], 0, 1, load.touched_pages).generations
    truth = {0} | set((np.flatnonzero(new != old) + 1).tolist())
    (fd,) = started["fds"]
    if name == "pagemap-scan":
        dirty = scan_pagemap(fd, started["address"], started["bytes"], present_only=present_only)
    else:
        with mmap.mmap(fd, started["bytes"] // PAGE_SIZE) as shared:
            log = np.frombuffer(shared, dtype=np.uint8)
            dirty = collect_bytes(log)
            del log
    os.close(fd)
    assert dirty == truth
    await guest.call("dirty-log-stop")
    assert (await guest.call("status"))["dirty_tracking"] is None


@pytest.fixture
def no_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without userfaultfd."""

    def refuse() -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("migrated.kernel.userfault.open_userfaultfd", refuse)


@pytest.mark.usefixtures("no_userfaultfd")
def test_without_the_kernels_help_auto_falls_back_and_the_rest_is_refused(memory: GuestMemory) -> None:
    tracking = start_tracking(memory, "auto")
    assert tracking.mode == "logged"
    tracking.close()
    with pytest.raises(VmmError, match="Function not implemented") as raised:
        start_tracking(memory, "pagemap-scan")
    assert raised.value.name == "DirtyTrackingUnavailable"


@needs_pagemap_scan
@pytest.mark.parametrize("present_only", [False, True])
def test_a_page_that_only_the_daemon_filled_is_reported_once_the_guest_writes_it(present_only: bool) -> None:
    """On the destination of a move, pages come in through the daemon's own mapping."""
    memory = GuestMemory(MEMORY_BYTES)
    os.pwrite(memory.fd, bytes(range(256)) * 16, 700 * PAGE_SIZE)
    tracked = Tracked(PRESENT_ONLY if present_only else "pagemap-scan", memory)
    assert tracked.collect() == set()
    perform(memory, ("words", 700))
    assert tracked.collect() == {700}
    tracked.tracking.close()


@needs_pagemap_scan
def test_tracking_of_present_pages_costs_nothing_for_untouched_memory() -> None:
    """64 GiB of holes: no page table may be filled for them (that would be 128 MiB)."""
    memory = GuestMemory(64 << 30)
    memory.words[:100] = 1
    before = page_table_kib()
    tracked = Tracked(PRESENT_ONLY, memory)
    assert tracked.collect() == set()
    perform(memory, ("page", 15_000_000))
    assert tracked.collect() == {15_000_000}
    tracked.tracking.close()
    assert page_table_kib() - before < 1024


def page_table_kib() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmPTE"))


@needs_pagemap_scan
def test_trackers_leave_no_descriptor_behind(memory: GuestMemory) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for mode in ("pagemap-scan", "logged"):
        start_tracking(memory, mode).close()
    assert set(os.listdir("/proc/self/fd")) == before
