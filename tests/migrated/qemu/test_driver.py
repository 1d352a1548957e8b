"""Guests of the QEMU driver with bare QEMUs: what keeps one from being lost, run twice, or left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from migrated.base.errors import VmmError, VmmGoneError
from migrated.kernel.tracking import AddressRange, WriteTracking, start_tracking
from migrated.settings.config import Config
from migrated.vmm.qemu.driver import QemuDriver
from migrated.vmm.qemu.guest import QemuGuest
from migrated.vmm.qemu.places import Place, read_place, write_place
from migrated.vmm.seam import GuestRequest
from tests.migrated.qemu.conftest import QEMU
from tests.migrated.qemu.test_lock import is_held

WEB = """
machine = "pc"
accelerator = "tcg"
memory = "32MiB"
memory_kind = "memfd"
uuid = "11111111-2222-3333-4444-555555555555"
"""
DISK = """
[[disk]]
file = "{directory}/disk"
cache = "writeback"
"""

WAIT_S = 60.0
Create = Callable[..., Awaitable[QemuGuest]]


def driver_of(place: Path, *, locks: bool = False, disk: bool = True) -> QemuDriver:
    """A driver that knows the definition of one guest, ``web``."""
    (place / "web.toml").write_text(WEB + (DISK if disk else ""))
    (place / "disk").touch()
    os.truncate(place / "disk", 1 << 20)
    sections: dict[str, Any] = {
        "vmm": {"directory": place, "start_timeout_s": 60.0},
        "qemu": {"definitions": place, "ram_directory": place},
        "state": {"directory": place},
        "lock": {"directory": place if locks else None},
    }
    return QemuDriver(Config.model_validate(sections))


def socket_of(place: Path) -> Path:
    (place / "qemu").mkdir(exist_ok=True)
    return place / "qemu" / "web.sock"


@pytest.fixture
async def create() -> AsyncIterator[Create]:
    """Creates the guest; it is ended after the test."""
    if shutil.which(QEMU) is None or os.geteuid() != 0:
        pytest.skip(f"needs {QEMU} (Debian: qemu-system-x86), and root")
    guests: list[QemuGuest] = []

    async def one(driver: QemuDriver, **options: Any) -> QemuGuest:
        guests.append(await driver.create(GuestRequest("web", 32 << 20, **options)))
        return guests[-1]

    yield one
    for guest in guests:
        await guest.destroy()


def processes_of(place: Path) -> list[int]:
    """The QEMUs that were started at the guest's place."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(socket_of(place)).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


async def state_of(guest: QemuGuest) -> bytes:
    """The state of its devices, saved."""
    await guest.prepare_stop()
    return b"".join([bytes(part.data) async for parts in guest.state_out("non-iterable") for part in parts])


async def test_a_paused_guest_is_saved_as_often_as_asked(place: Path, create: Create) -> None:
    """QEMU 7.2 aborts when it is asked to let go of disks that it has let go of: also by a daemon after this one."""
    driver = driver_of(place)
    guest = await create(driver, paused=True)
    await state_of(guest)
    assert read_place(guest.api_socket).disks_released
    await guest.close()
    guest = await driver.attach(guest.api_socket)
    try:
        await state_of(guest)
        await guest.resume(1)
        assert not read_place(guest.api_socket).disks_released
        await guest.pause()
        await state_of(guest)
        await state_of(guest)
        assert (await guest.status()).state == "paused"
    finally:
        await guest.destroy()


async def test_memory_that_is_copied_after_all_does_not_travel_with_the_devices(place: Path, create: Create) -> None:
    """As when the destination did not take it, or the next attempt writes a file."""
    guest = await create(driver_of(place), paused=True)
    files = await guest.memory_files()
    assert len(files) == 1
    for fd in files:
        os.close(fd)
    assert not (await state_of(guest)).startswith(b"QEVM")
    (await guest.memory()).release()
    assert (await state_of(guest)).startswith(b"QEVM")


async def test_tracking_that_is_cancelled_can_begin_again(
    place: Path, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No userfaultfd is left that would keep the next one out."""
    guest = await create(driver_of(place))
    begun, may_go_on = threading.Event(), threading.Event()

    def held(pid: int, ranges: Sequence[AddressRange], *, all_pages: bool) -> WriteTracking:
        begun.set()
        assert may_go_on.wait(WAIT_S)
        return start_tracking(pid, ranges, all_pages=all_pages)

    monkeypatch.setattr("migrated.vmm.qemu.guest.start_tracking", held)
    beginning = asyncio.create_task(guest.start_dirty_log("auto"))
    assert await asyncio.to_thread(begun.wait, WAIT_S)
    beginning.cancel()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await beginning
    (await guest.start_dirty_log("auto")).close()
    await guest.stop_dirty_log()


async def test_shared_memory_that_may_be_swapped_out_is_tracked_by_its_pages_without_entries(
    place: Path, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = await create(driver_of(place), paused=True)
    found = []
    for swap in (True, False):
        monkeypatch.setattr("migrated.vmm.qemu.guest.swap_is_on", lambda swap=swap: swap)
        log = await guest.start_dirty_log("auto")
        found.append(len(log.collect()))
        log.close()
        await guest.stop_dirty_log()
    assert found[0] == 0, "all pages were protected, those too that hold something"
    assert found[1] > 0, "only what is written from now on is, and the first look has it all"


async def test_a_guest_does_not_run_without_its_lock(place: Path, create: Create) -> None:
    driver = driver_of(place, locks=True, disk=False)
    guest = await create(driver)
    lock = place / "11111111-2222-3333-4444-555555555555.lock"
    assert (await guest.status()).state == "running"
    assert is_held(lock)
    guest.api_socket.rename(place / "moved.sock")  # so that the second is one of another host, with the same locks
    with pytest.raises(VmmError, match="another VMM holds the ownership lock"):
        await create(driver)
    assert not socket_of(place).exists()
    assert processes_of(place) == [guest.pid]


async def test_a_qemu_that_ends_at_once_is_heard(place: Path, create: Create) -> None:
    """In its own words, also when it ends while the driver talks to it."""
    guest = await create(driver_of(place))
    guest.api_socket.rename(place / "moved.sock")
    with pytest.raises(VmmError, match=r'ended at once: .*Failed to get "write" lock'):
        await create(driver_of(place))


async def test_a_place_where_a_qemu_listens_is_not_taken(place: Path) -> None:
    """It may be a guest that this daemon could not use when it found it: whose socket would be taken away, and who
    would be ended in place of the new one."""
    driver, there = driver_of(place), Place(name="web", started_here=True, epoch=7)
    write_place(socket_of(place), there)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_of(place)))
        listener.listen()
        for options in ({}, {"qmp": "/nowhere"}):
            with pytest.raises(VmmError, match=r"listens on .* already"):
                await driver.create(GuestRequest("web", 32 << 20, options=options))
    assert read_place(socket_of(place)) == there


async def test_what_an_ended_guest_left_is_no_hindrance(place: Path) -> None:
    driver = driver_of(place)
    socket_of(place).symlink_to(place / "ended")
    with pytest.raises(VmmGoneError):
        await driver.create(GuestRequest("web", 32 << 20, options={"qmp": str(place / "nobody")}))
    assert not socket_of(place).is_symlink()


async def test_a_run_log_that_tells_nothing_is_not_taken_for_one(place: Path) -> None:
    """A name that is misspelt would prove of every guest that it never ran."""
    driver, log = driver_of(place), place / "log"
    options = {"qmp": str(place / "nobody"), "run_log": str(log)}
    with pytest.raises(VmmError, match="cannot be read as the run log"):
        await driver.create(GuestRequest("web", 32 << 20, options=options))
    write_place(socket_of(place), Place(name="web", started_here=False, run_log=log, epoch=3, run_log_bytes=5))
    assert driver.ran("web", 3) is None
    log.write_text("vm_")  # shorter than it was: begun anew
    assert driver.ran("web", 3) is None
    log.write_text("old! vm_state_notify running 1 reason 9 (running)\n")
    assert driver.ran("web", 3) is True
    assert driver.ran("web", 4) is False
    log.write_text("old! vm_state_notify running 0 reason 4 (paused)\n")
    assert driver.ran("web", 3) is False
