"""A real guest's memory goes over our data channels, in rounds, while it reads from a slow disk past its page cache.

QemuGuest.memory -> PageSender -> socket pairs -> PageReceiver -> memfd        rounds: collect, fence, send

What the driver's fence is for, shown where it acts: the same guest, channels and log, with the fence and without it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from migrated.source.encoding import BatchEncoder
from migrated.source.pages import PageSender
from migrated.vmm.memory import GuestMemory, MixedMemory
from migrated.vmm.qemu.costs import SwitchoverCosts
from migrated.vmm.qemu.guest import QemuGuest
from migrated.vmm.qemu.places import Place
from protocol.guest import PAGE_SIZE
from scripts.qemu_rig.baseline import booted
from scripts.qemu_rig.disk import make_disk
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import Backing, Disk, Qemu, QemuSpec
from scripts.qemu_rig.slow_disk import SlowDisk, slow_disk
from scripts.qemu_rig.workload import Workload
from scripts.rig.waiting import RigError, until
from tests.migrated.page_paths import Path as PagePath

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SLOW = 1 << 20
"""Bytes a second: each read of the guest takes a second."""
READS = 2
WAIT_S = 60.0
READER = QemuSpec(memory_mib=128, workload=Workload(16))


class Unfenced(QemuGuest):
    """The driver with its fence taken away."""

    async def fence(self) -> int:
        return 0


def content(memory: GuestMemory) -> npt.NDArray[np.uint64]:
    """All pages, one a row."""
    into = np.empty((memory.pages, PAGE_SIZE // 8), np.uint64)
    memory.read(np.arange(memory.pages), into)
    return into


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qf-") as path:
        yield Path(path)


@pytest.fixture
def slow(directory: Path) -> Iterator[SlowDisk]:
    """The disk below the test's directory, slow for those who are held."""
    try:
        with slow_disk(directory, SLOW) as disk:
            yield disk
    except RigError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["private", "file"])
def backing(request: pytest.FixtureRequest) -> Backing:
    """How the guest's RAM is made. With a file, RAM is mapped and firmware is copied: memory of both kinds."""
    made: Backing = request.param
    return made


@pytest.fixture
async def reader(image: GuestImage, directory: Path, slow: SlowDisk, backing: Backing) -> AsyncIterator[Qemu]:
    """A guest that does nothing but read its disk, with O_DIRECT; its monitor is free."""
    path = directory / "disk"
    make_disk(path, data_mib=16)
    spec = replace(READER, backing=backing, disk=Disk(path, "none", read_mib=16))
    async with booted(spec, image, directory / "a") as qemu:
        await qemu.release_monitor()
        yield qemu
        slow.set_rate(0)  # whatever is in flight would keep QEMU from ending


async def carry(qemu: Qemu, slow: SlowDisk, backing: Backing, driver: type[QemuGuest]) -> int:
    """Follow a guest while it reads, then stop it and send the rest. Returns how many pages arrived old."""
    guest = await driver.attach(
        qemu.qmp_socket,
        Place(name="web", started_here=False),
        SwitchoverCosts(qemu.directory / "costs.json"),
        timeout_s=WAIT_S,
        stop_timeout_s=WAIT_S,
    )
    log = await guest.start_dirty_log("pagemap-scan")
    memory = await guest.memory()
    way = PagePath(memory.pages)
    way.sender = PageSender(memory, way.channels, way.source_digest, BatchEncoder, None)
    way.sender.start()
    try:
        assert guest.needs_fence
        assert isinstance(memory, MixedMemory) or backing == "private"
        log.collect()
        await guest.fence()
        await way.round(np.array([[0, memory.pages]], np.int64))
        slow.hold_process(qemu.pid)
        reads = asyncio.create_task(have_read(qemu, READS))
        while not reads.done():
            runs = await asyncio.to_thread(log.collect)
            await guest.fence()
            await way.round(runs)
        await reads
        await guest.pause()
        await way.round(log.collect())
        return int((content(memory) != content(way.destination.guest)).any(axis=1).sum())
    finally:
        await way.close()
        memory.release()
        log.close()
        await guest.close()


async def have_read(qemu: Qemu, count: int) -> None:
    """Until the guest's reads have ended so often."""
    first = (await asyncio.to_thread(qemu.console.status))["reads"]

    async def done() -> bool:
        return (await asyncio.to_thread(qemu.console.status))["reads"] >= first + count

    await until("the guest did not read", done, WAIT_S)


async def test_with_the_fence_no_page_is_lost(reader: Qemu, slow: SlowDisk, backing: Backing) -> None:
    assert await carry(reader, slow, backing, QemuGuest) == 0


async def test_without_the_fence_pages_are_lost(reader: Qemu, slow: SlowDisk, backing: Backing) -> None:
    assert await carry(reader, slow, backing, Unfenced) > 0
