"""A disk that both hosts could open for writing: at every moment of a move one QEMU at most has, by QEMU's image locks.

a runs, has it | b waits, has it not | stop, save: a lets go | b loads | commit: b takes it, runs     abort: a takes it
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.messages import FrameType
from scripts.qemu_rig.disk import read_log, written_twice
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.kernel import QEMU
from scripts.qemu_rig.launcher import Disk, QemuSpec
from scripts.qemu_rig.pair import GUEST, QemuPair
from scripts.qemu_rig.workload import Workload
from scripts.rig.faults import AtFrame
from scripts.rig.host import Host
from scripts.rig.matrix import action_of
from scripts.rig.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOMY = {"downtime_limit": 10_000}
SHORT = {"downtime_limit": 500, "timeout_s": 0.1, "on_timeout": "force"}
SPEC = QemuSpec(memory_mib=128, workload=Workload.hot_cold(16, 5))


@pytest.fixture(scope="module", params=["none", "writeback"])
def hosts(request: pytest.FixtureRequest, image: GuestImage) -> Iterator[QemuPair]:
    """Two hosts that both reach a disk, for all tests of the module."""
    with tempfile.TemporaryDirectory(prefix="qd-") as directory:
        disk = Disk(Path(directory) / "disk", request.param, log_ms=20)
        with QemuPair(replace(SPEC, disk=disk), image) as made:
            yield made


@pytest.fixture
async def pair(hosts: QemuPair) -> AsyncIterator[QemuPair]:
    """The hosts without faults, and a guest on the first that logs to the disk. It is the one of the test before if
    that left it there, else a new one with a new disk."""
    await hosts.recover()
    if await hosts.settled(GUEST) is not hosts.a:
        await hosts.remove_guests()
        await hosts.new_guest(hosts.a, GUEST)
    yield hosts
    assert hosts.double_runs() == []


async def may_be_written(path: Path) -> bool:
    """Whether one more QEMU may open the image for writing now."""
    process = await asyncio.create_subprocess_exec(
        QEMU, "-machine", "q35,accel=tcg", "-m", "64M", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio",
        "-drive", f"file={path},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await process.communicate(b"quit\n")
    assert process.returncode == 0 or b'Failed to get "write" lock' in said, said
    return process.returncode == 0


def disk_of(pair: QemuPair) -> Path:
    assert pair.spec.disk is not None
    return pair.spec.disk.path


async def it_goes_on_writing(pair: QemuPair, at: Host) -> None:
    """The guest writes its log on this host, and has the disk for itself."""
    incarnation = pair.hosts.index(at)
    last = max(record.number for record in read_log(disk_of(pair)))

    async def written() -> bool:
        return any(record.number > last and record.incarnation == incarnation for record in read_log(disk_of(pair)))

    await until("the guest writes its log", written)
    assert written_twice(read_log(disk_of(pair))) == []
    assert not await may_be_written(disk_of(pair))
    assert (await at.verify(GUEST))["ok"]


async def test_the_disk_goes_with_the_guest(pair: QemuPair) -> None:
    a, b = pair.hosts
    for source, target in ((a, b), (b, a)):
        migration = await source.begin_migration(GUEST, target, pause_before_switchover=True, **ROOMY)
        await source.until_status(GUEST, "pre-switchover")
        assert not await may_be_written(disk_of(pair))  # it stands, with its disk, and the other QEMU waits for it
        await source.command("migrate-continue", {"guest": GUEST, "state": "pre-switchover"})
        record = await source.wait(migration)
        assert record["outcome"] == "completed", record["reason"]
        await it_goes_on_writing(pair, target)


@pytest.mark.parametrize("fault", ["stop-destination-vmm", "kill-destination-vmm", "kill-destination-daemon", "cut"])
async def test_an_abort_after_the_save_takes_the_disk_back(pair: QemuPair, fault: str) -> None:
    proxy = pair.way_to(pair.b)
    armed = proxy.arm(AtFrame(FrameType.STATE_END), action_of(fault, pair.a, pair.b, GUEST))
    migration = await pair.a.begin_migration(GUEST, proxy.uri, **SHORT)
    assert await pair.fired(armed, pair.a, migration)
    record = await pair.a.wait(migration)
    assert record["outcome"] in ("aborted", "failed"), record["reason"]
    await pair.recover()
    assert await pair.settled(GUEST) is pair.a
    await it_goes_on_writing(pair, pair.a)


async def test_no_lock_is_left_when_qemu_was_killed(pair: QemuPair) -> None:
    record = await pair.a.migrate(GUEST, pair.b, **ROOMY)
    assert record["outcome"] == "completed", record["reason"]
    await it_goes_on_writing(pair, pair.b)
    pair.b.kill_vmm(GUEST)
    assert await may_be_written(disk_of(pair))
