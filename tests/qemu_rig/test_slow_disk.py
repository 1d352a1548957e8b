"""A read past the page cache that is in flight while the dirty log is read: lost without the fence, not with it.

    log            collect: pages pinned, so reported      collect: nothing
    reader    preadv(O_DIRECT) ............ in flight ......| data landed, no fault
    sender         copies the page here: old                fence: copies it here, after the read has ended: new

This is what the fence of the QEMU driver rests on: shown first on memory of this process, then on a real guest in stock
QEMU, both with the daemons' own tracking and dirty log.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from migrated.kernel.process_memory import read
from migrated.kernel.tracking import start_tracking
from migrated.kernel.userfault import enable_write_tracking, open_userfaultfd, register
from migrated.vmm.dirty_log import PagemapScanLog
from migrated.vmm.memory import Span
from protocol.pages import Runs
from scripts.basics import MIB
from scripts.qemu_rig.baseline import booted
from scripts.qemu_rig.disk import make_disk
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import Disk, Qemu, QemuSpec
from scripts.qemu_rig.slow_disk import SlowDisk, slow_disk
from scripts.qemu_rig.workload import Workload
from scripts.rig.waiting import RigError, until

pytestmark = pytest.mark.slow

PAGE = 4096
READ_BYTES = 2 * MIB
SLOW = MIB
"""Bytes a second: the read takes two seconds."""
GUEST_BYTES = 256 * MIB
WAIT_S = 60.0


@pytest.fixture
def disk(directory: Path) -> Iterator[SlowDisk]:
    """The disk below the test's directory, slow for those who are held."""
    try:
        with slow_disk(directory, SLOW) as disk:
            yield disk
    except RigError as error:
        pytest.skip(str(error))


class Memory:
    """Memory of this process, tracked as a guest's, and a read from a slow disk into all of it."""

    def __init__(self, path: Path, disk: SlowDisk) -> None:
        path.write_bytes(b"\x02" * READ_BYTES)
        self._file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        self._disk = disk
        self._mapping = mmap.mmap(-1, READ_BYTES)
        self.bytes = np.frombuffer(self._mapping, np.uint8)
        self.bytes[:] = 1
        self._uffd = open_userfaultfd()
        enable_write_tracking(self._uffd)
        address = self.bytes.ctypes.data
        register(self._uffd, address, READ_BYTES)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.log = PagemapScanLog(pagemap, [Span(address, READ_BYTES // PAGE, first_page=0)], True)
        self.log.collect()
        self.reader = threading.Thread(target=self._read)

    def _read(self) -> None:
        self._disk.hold_thread(threading.get_native_id())
        assert os.preadv(self._file, [self._mapping], 0) == READ_BYTES

    def close(self) -> None:
        """End tracking; the read has ended."""
        self.reader.join()
        self.log.close()
        os.close(self._uffd)
        os.close(self._file)


@pytest.fixture
def memory(directory: Path, disk: SlowDisk) -> Iterator[Memory]:
    """Tracked memory whose read has not begun."""
    try:
        memory = Memory(directory / "data", disk)
    except OSError as error:
        pytest.skip(f"writes cannot be tracked, or files not be read past the page cache: {error.strerror}")
    yield memory
    memory.close()


def pages(runs: Runs) -> int:
    """How many pages are in the runs."""
    return int(runs[:, 1].sum()) if len(runs) else 0


async def all_pinned(memory: Memory) -> None:
    """Until the log has reported every page: the kernel has pinned them for the read, which is in flight now."""
    reported = 0

    async def everything() -> bool:
        nonlocal reported
        reported += pages(memory.log.collect())
        return reported >= READ_BYTES // PAGE

    await until("the read was not reported", everything)
    assert memory.reader.is_alive(), "the read has ended already: the disk is not slow"


async def test_without_the_fence_a_read_in_flight_is_lost(memory: Memory) -> None:
    """The log reports its pages when they are pinned, and never again: what is sent at once is old for good."""
    memory.reader.start()
    await all_pinned(memory)
    sent = memory.bytes.copy()
    memory.reader.join()
    assert (memory.bytes == 2).all()
    assert pages(memory.log.collect()) == 0
    assert (sent == 1).any()


async def test_with_the_fence_nothing_is_lost(memory: Memory) -> None:
    """Scan, let what is in flight end, then read and send."""
    memory.reader.start()
    await all_pinned(memory)
    memory.reader.join()  # what a drain of the VMM's block layer waits for
    sent = memory.bytes.copy()
    assert (sent == 2).all()


@pytest.fixture
async def reading_guest(image: GuestImage, directory: Path, disk: SlowDisk) -> AsyncIterator[Qemu]:
    """A guest that does nothing but read its disk, 1 MiB at a time; its QEMU opens the image with O_DIRECT."""
    path = directory / "disk"
    make_disk(path, data_mib=16)
    spec = QemuSpec(workload=Workload(16), disk=Disk(path, "none", read_mib=16))
    async with booted(spec, image, directory / "a") as qemu:
        await have_read(qemu, 1)
        yield qemu
        disk.set_rate(0)  # whatever is in flight would keep QEMU from ending


async def have_read(qemu: Qemu, count: int) -> None:
    """Until so many reads more have ended."""
    first = (await asyncio.to_thread(qemu.console.status))["reads"]

    async def done() -> bool:
        return (await asyncio.to_thread(qemu.console.status))["reads"] >= first + count

    await until("the guest did not read", done, WAIT_S)


async def test_a_guest_that_reads_past_its_page_cache_has_reads_in_flight(reading_guest: Qemu, disk: SlowDisk) -> None:
    """While its QEMU is held a read of 1 MiB takes about a second, and brings what is on the disk."""
    disk.hold_process(reading_guest.pid)
    await have_read(reading_guest, 1)  # the kernel lets a little through in advance
    begin = time.monotonic()
    await have_read(reading_guest, 3)
    assert time.monotonic() - begin > 1.5
    disk.set_rate(0)
    await have_read(reading_guest, 8)
    assert reading_guest.console.complaints() == []


class Follower:
    """A copy of a guest's memory that is kept up by its dirty log, as a migration keeps up its destination's."""

    def __init__(self, pid: int, address: int) -> None:
        self._pid = pid
        self._address = address
        self._tracking = start_tracking(pid, [(address, GUEST_BYTES)])
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        self.log = PagemapScanLog(pagemap, [Span(address, GUEST_BYTES // PAGE, first_page=0)], True)
        self.copy = np.zeros((GUEST_BYTES // PAGE, PAGE), np.uint8)

    def read(self, runs: Runs) -> None:
        """Copy runs of pages as they are now."""
        for first, count in runs.tolist():
            span = np.array([[self._address + first * PAGE, count * PAGE]], np.uint64)
            read(self._pid, span, self.copy[first : first + count])

    def stale(self) -> int:
        """How many pages differ from the guest's, which does not run."""
        kept = self.copy.copy()
        self.read(np.array([[0, GUEST_BYTES // PAGE]]))
        return int((kept != self.copy).any(axis=1).sum())

    def close(self) -> None:
        """End the tracking."""
        self.log.close()
        self._tracking.close()


async def follow(qemu: Qemu, disk: SlowDisk, fenced: bool) -> int:
    """Follow a guest while it reads, then stop it and send the rest. Returns how many pages of the copy are stale."""
    follower = await asyncio.to_thread(Follower, qemu.pid, await qemu.host_address(0))
    try:
        disk.hold_process(qemu.pid)
        follower.read(np.array([[0, GUEST_BYTES // PAGE]]))
        rounds = asyncio.create_task(have_read(qemu, 2))
        while not rounds.done():
            runs = follower.log.collect()
            if fenced:
                await qemu.execute("transaction", {"actions": []})
            follower.read(runs)
            await asyncio.sleep(0)
        await rounds
        await qemu.execute("stop")
        follower.read(follower.log.collect())
        return follower.stale()
    finally:
        follower.close()


async def test_a_guests_read_in_flight_is_lost_without_the_fence(reading_guest: Qemu, disk: SlowDisk) -> None:
    """Tracked from outside, sent in rounds: pages of the guest's reads stay behind, in silence."""
    assert await follow(reading_guest, disk, fenced=False) > 0


async def test_a_guests_read_in_flight_is_not_lost_with_the_fence(reading_guest: Qemu, disk: SlowDisk) -> None:
    """Scan, have QEMU drain its block layer, then read and send: the copy is equal, byte for byte."""
    assert await follow(reading_guest, disk, fenced=True) == 0
