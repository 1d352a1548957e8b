"""A real Linux guest in stock QEMU: it beats, finds what is wrong with its memory and its disk, and leaves nothing.

guest    b b b b b b            b b b b
QEMU     running     | stop     | cont        the gap is what was between
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from scripts.qemu_rig.baseline import booted, migrate_with_qemu
from scripts.qemu_rig.disk import make_disk, read_log, written_twice
from scripts.qemu_rig.gaps import largest_gap, said_twice
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import Backing, Cache, Disk, Machine, Qemu, QemuSpec, running_qemu
from scripts.qemu_rig.workload import Workload
from scripts.rig.waiting import RigError, until

pytestmark = pytest.mark.slow

PAGE = 4096
WAIT_S = 60.0
STOP_S = 0.05
SHORT = Workload(memory_mib=16, rate_mib_per_s=8)


async def read_guest(qemu: Qemu, physical: int) -> bytes:
    """One page of the guest's memory, read from outside."""
    with Path(f"/proc/{qemu.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(await qemu.host_address(physical))
        return memory.read(PAGE)


async def write_guest(qemu: Qemu, physical: int, content: bytes) -> None:
    """Overwrite guest memory from outside, while the guest runs."""
    with Path(f"/proc/{qemu.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(await qemu.host_address(physical))
        memory.write(content)


async def test_a_damaged_and_a_stale_page_are_found(image: GuestImage, directory: Path) -> None:
    """One bit that is wrong, and a page that is whole but as it was before: what a lost page looks like."""
    async with booted(QemuSpec(workload=Workload(16)), image, directory / "a") as qemu:
        console = qemu.console
        assert await asyncio.to_thread(console.check) == 0
        damaged, stale = [await asyncio.to_thread(console.page_address, page) for page in (5, 77)]
        old = await read_guest(qemu, stale)
        assert int.from_bytes(old[:8], "little") == 77
        await asyncio.to_thread(console.ask, "rate 64", "RATE")

        async def rewritten() -> bool:
            return await read_guest(qemu, stale) != old

        await until("page 77 was not written", rewritten, WAIT_S)
        await asyncio.to_thread(console.ask, "rate 0", "RATE")
        assert await asyncio.to_thread(console.check) == 0

        one = await read_guest(qemu, damaged)
        await write_guest(qemu, damaged, one[:2000] + bytes([one[2000] ^ 1]) + one[2001:])
        await write_guest(qemu, stale, old)
        await asyncio.to_thread(console.wait_for, "BAD page 5 damaged: word 250,", WAIT_S)
        await asyncio.to_thread(console.wait_for, r"BAD page 77 stale: .* has page 77 version 0, wanted", WAIT_S)
        assert (await asyncio.to_thread(console.status))["bad"] == 2
        # It puts them right, so that each is said once.
        assert await asyncio.to_thread(console.check) == 0
        assert len(console.complaints()) == 2


async def test_a_stop_is_seen_as_a_gap(image: GuestImage, directory: Path) -> None:
    """As long as the guest stood still; its own clock stood still as well."""
    async with booted(QemuSpec(workload=SHORT), image, directory / "a") as qemu:
        await qemu.execute("stop")
        stopped_ns = time.monotonic_ns()
        await asyncio.sleep(STOP_S)  # this is the length that is measured
        continued_ns = time.monotonic_ns()
        await qemu.execute("cont")
        await asyncio.to_thread(qemu.console.wait_for_beats, 10, WAIT_S)
        beats = qemu.console.beats()
        gap = largest_gap(beats, stopped_ns, continued_ns)
        # A beat may still be on its way through a busy host when the guest already stands: hence half.
        assert gap.ns >= (continued_ns - stopped_ns) // 2
        assert gap.ns - gap.guest_clock_ns >= (continued_ns - stopped_ns) // 2
        assert gap.end_ns >= continued_ns
        assert said_twice(beats) == []
        assert [beat.sequence for beat in beats] == list(range(beats[0].sequence, beats[-1].sequence + 1))


@pytest.mark.parametrize(
    ("machine", "backing", "numa"),
    [("pc", "private", False), ("q35", "file", True), ("q35", "memfd", False), ("pc", "private", True)],
)
async def test_every_kind_of_guest_boots(
    image: GuestImage, directory: Path, machine: Machine, backing: Backing, numa: bool
) -> None:
    """And has its memory right, and powers itself off when it is told to; nothing is left then."""
    spec = QemuSpec(workload=Workload(160), machine=machine, backing=backing, numa=numa, cpus=2)
    async with booted(spec, image, directory / "a") as qemu:
        kind = await qemu.execute("qom-get", {"path": "/machine", "property": "type"})
        backends = await qemu.execute("query-memdev")
        assert kind.startswith(f"pc-{'q35' if machine == 'q35' else 'i440fx'}")
        assert [backend["size"] for backend in backends] == ([128 << 20] * 2 if numa else [256 << 20])
        assert {backend["share"] for backend in backends} == {backing != "private"}
        assert await asyncio.to_thread(qemu.console.check) == 0
        qemu.console.tell("stop")
        assert await qemu.ended(WAIT_S) == 0
    assert not list(Path("/dev/shm").glob(f"{directory.name}*"))


async def test_a_guest_whose_memory_crosses_the_pci_hole(image: GuestImage, directory: Path) -> None:
    """Some of its pages are below the hole, which begins at 512 MiB here, and some behind it, above 4 GiB."""
    spec = QemuSpec(machine="pc", memory_mib=640, workload=Workload(256))
    hole = ["-machine", "max-ram-below-4g=512M"]
    async with booted(spec, image, directory / "a", extra=hole) as qemu:
        pages = range(0, 256 * 256, 256 * 16)
        addresses = [await asyncio.to_thread(qemu.console.page_address, page) for page in pages]
        assert min(addresses) < 1 << 32 < max(addresses)
        assert await asyncio.to_thread(qemu.console.check, 120) == 0


@pytest.mark.parametrize("cache", ["none", "writeback"])
async def test_the_disk_is_logged_to_and_read(image: GuestImage, directory: Path, cache: Cache) -> None:
    """Records say under which incarnation they were written; a page of the disk that is wrong is found."""
    path = directory / "disk"
    make_disk(path, data_mib=2)
    disk = Disk(path, cache, log_ms=1, read_mib=2)
    async with running_qemu(QemuSpec(workload=SHORT, disk=disk), image, directory / "a", incarnation=67) as qemu:
        console = qemu.console
        await asyncio.to_thread(console.wait_for, "READY", WAIT_S * 2)

        async def used() -> bool:
            status = await asyncio.to_thread(console.status)
            return min(status["reads"], status["log"]) >= 20

        await until("the guest did not use its disk", used, WAIT_S)
        assert console.complaints() == []
        records = read_log(path)
        with path.open("r+b") as file:
            file.seek(-PAGE + 100, os.SEEK_END)
            file.write(b"damaged")
            file.flush()
            os.fsync(file.fileno())
        await asyncio.to_thread(console.wait_for, "BAD disk-page 511 damaged", WAIT_S)
    assert [record.number for record in records] == list(range(len(records)))
    assert {record.incarnation for record in records} == {67}
    assert written_twice(records) == []
    assert written_twice([*records, records[3]]) == [3]


async def test_qemus_own_migration_is_measured(image: GuestImage, directory: Path) -> None:
    """The guest is whole and beats on on the other side; its memory was moved, and the gap is that of the move."""
    begin_ns = time.monotonic_ns()
    result = await migrate_with_qemu(QemuSpec(workload=Workload.hot_cold(32, 8)), image, directory)
    assert result.bad_pages == 0
    assert 0 < result.observed_gap_ns < time.monotonic_ns() - begin_ns
    assert result.transferred_bytes > 32 << 20
    assert result.ram_bytes > 256 << 20
    assert 0 < result.total_ms <= result.seconds * 1000


async def test_a_qemu_that_does_not_start_says_why(image: GuestImage, directory: Path) -> None:
    """And nothing of it is left."""
    with pytest.raises(RigError, match="no-such-option"):
        async with running_qemu(QemuSpec(), image, directory / "a", extra=["-no-such-option"]):
            pass
