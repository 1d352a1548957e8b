"""The guests of one host with real processes: names that are taken and become free, sockets that nobody listens at."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from migrated.base.errors import NoRoomError, RefusedError, VmmError
from migrated.destination.offer import Refusal
from migrated.guests.registry import GuestRegistry, UnknownGuestError
from migrated.guests.reservation import Reservation
from migrated.settings.config import Config, LimitsConfig, VmmConfig
from migrated.vmm import spawn
from migrated.vmm.drivers import load_drivers
from migrated.vmm.seam import GuestRequest, Replacement
from protocol.errors import ErrorCode
from scripts.rig.processes import is_alive
from scripts.rig.waiting import until
from tests.tiny_vmm.hosts import TINY

WAIT_S = 60.0
G1 = GuestRequest("g1", 2 << 20)
OTHER = str(uuid.UUID(int=1))


@contextlib.asynccontextmanager
async def opened(directory: Path, **limits: Any) -> AsyncIterator[GuestRegistry]:
    """The registry of a host whose guests are tiny. Guests run on when it is closed."""
    vmm = VmmConfig(directory=directory, driver="tiny", drivers=(TINY,))
    config = Config(vmm=vmm, limits=LimitsConfig(**limits))
    registry = GuestRegistry(config, load_drivers(config))
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


@pytest.fixture
async def guests(short_directory: Path) -> AsyncIterator[GuestRegistry]:
    """A registry without guests; those that a test leaves are ended."""
    async with opened(short_directory) as registry:
        yield registry
        for name in registry.names():
            await registry.destroy(registry.get(name))


async def test_a_guest_is_found_again(short_directory: Path) -> None:
    async with opened(short_directory) as first:
        pid = (await first.create(G1)).vmm.pid
    async with opened(short_directory) as later:
        assert later.names() == ["g1"]
        assert later.get("g1").vmm.pid == pid
        await later.destroy(later.get("g1"))
    assert not is_alive(pid)


async def test_a_stale_socket_is_removed_and_its_name_is_free(short_directory: Path) -> None:
    """A guest ended, with no daemon there to notice."""
    place = short_directory / "tiny"
    place.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place / "g1.sock"))
    (place / "g1.uuid").write_text("0" * 32, encoding="ascii")
    async with opened(short_directory) as registry:
        assert registry.names() == []
        assert not (place / "g1.sock").exists()
        await registry.destroy(await registry.create(G1))


async def test_a_guest_that_is_called_otherwise_than_its_place_is_ended(guests: GuestRegistry) -> None:
    """An option of the simulated VMM could give it the name of another guest here."""
    request = GuestRequest("g1", 16 << 20, options={"set": "name=g2"})
    with pytest.raises(VmmError, match="calls its guest 'g2'"):
        await guests.create(request, "sim")
    assert guests.all() == []
    assert not guests.holds("g1")


async def test_of_two_who_want_a_name_one_gets_it(guests: GuestRegistry) -> None:
    answers = await asyncio.gather(guests.create(G1), guests.create(G1), return_exceptions=True)
    (refused,) = [answer for answer in answers if isinstance(answer, BaseException)]
    assert isinstance(refused, RefusedError)
    assert "a guest named 'g1' is already on this host; choose another name" in str(refused)
    assert guests.names() == ["g1"]
    with pytest.raises(RefusedError, match="is already on this host"):
        await guests.create(G1)


async def test_a_guest_that_does_not_start_leaves_its_name_free(guests: GuestRegistry) -> None:
    with pytest.raises(VmmError, match="has no options"):
        await guests.create(GuestRequest("g1", 2 << 20, options={"speed": "high"}))
    assert guests.names() == []
    await guests.create(G1)


async def test_a_name_is_free_once_the_process_has_ended(guests: GuestRegistry) -> None:
    gone: list[str] = []
    guests.on_gone = lambda guest: gone.append(guest.name)
    guest = await guests.create(G1)
    os.kill(guest.vmm.pid, signal.SIGKILL)

    async def noticed() -> bool:
        return bool(gone)

    await until("the end of the guest is noticed", noticed, WAIT_S)
    assert gone == ["g1"]
    assert guests.find("g1") is None
    with pytest.raises(UnknownGuestError, match="no guest 'g1' on this host; guests here: none"):
        guests.get("g1")
    assert (await guests.create(G1)).vmm.pid != guest.vmm.pid
    assert gone == ["g1"]


async def test_the_driver_lets_go_of_a_guest_whose_process_has_ended(
    guests: GuestRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptors would stay open for as long as the daemon runs."""
    guest = await guests.create(G1)
    closed = asyncio.Event()
    close = guest.vmm.close

    async def close_and_say() -> None:
        await close()
        closed.set()

    monkeypatch.setattr(guest.vmm, "close", close_and_say)
    os.kill(guest.vmm.pid, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        await closed.wait()


async def test_who_wants_the_name_of_a_guest_that_is_ending_waits_for_its_end(guests: GuestRegistry) -> None:
    guest = await guests.create(G1)
    ending = asyncio.create_task(guests.destroy(guest))
    await asyncio.sleep(0)  # the task has begun: the name is given up, and the process still runs
    assert guests.names() == []
    assert is_alive(guest.vmm.pid)
    await guests.create(G1)
    assert not is_alive(guest.vmm.pid)
    await ending
    assert guests.names() == ["g1"]


async def test_a_guest_whose_process_does_not_end_keeps_its_name(
    guests: GuestRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one of its name would run beside it."""

    async def stands_in_the_kernel() -> None:
        raise VmmError("the VMM does not end")

    gone = asyncio.get_running_loop().create_future()
    guests.on_gone = gone.set_result
    guest = await guests.create(G1)
    with monkeypatch.context() as patched:
        patched.setattr(guest.vmm, "destroy", stands_in_the_kernel)
        with pytest.raises(VmmError, match="does not end"):
            await guests.destroy(guest)
    assert guests.find("g1") is guest
    with pytest.raises(RefusedError, match="a guest named 'g1' is already on this host"):
        await guests.create(G1)
    os.kill(guest.vmm.pid, signal.SIGKILL)
    assert await asyncio.wait_for(gone, WAIT_S) is guest, "its end is noticed as any other's"
    assert not guests.holds("g1")


@pytest.mark.usefixtures("little_patience")
async def test_a_silent_guest_keeps_its_name_until_it_ends(short_directory: Path) -> None:
    async with opened(short_directory) as first:
        pid = (await first.create(G1)).vmm.pid
    settled = asyncio.get_running_loop().create_future()
    os.kill(pid, signal.SIGSTOP)
    async with opened(short_directory) as registry:
        registry.on_settled = lambda place, ended: settled.set_result((place, ended))
        assert list(registry.silent) == ["g1"]
        with pytest.raises(RefusedError, match="a guest named 'g1' is already on this host"):
            await registry.create(G1)
        assert await spawn.make_sure_gone(pid, WAIT_S)
        assert await asyncio.wait_for(settled, WAIT_S) == ("g1", True)
        assert registry.silent == {}
        await registry.destroy(await registry.create(G1))


async def test_a_host_takes_so_many_guests_and_no_more(short_directory: Path) -> None:
    async with opened(short_directory, max_guests=1) as registry:
        guest = await registry.create(G1)
        with pytest.raises(NoRoomError, match="there are 1 guests on this host"):
            await registry.create(GuestRequest("g2", 2 << 20))
        await registry.destroy(guest)
        await registry.destroy(await registry.create(GuestRequest("g2", 2 << 20)))


async def test_a_guest_that_comes_in_needs_a_name_a_uuid_and_a_driver_of_its_own(guests: GuestRegistry) -> None:
    here = await (await guests.create(G1)).vmm.describe()
    for changes, reason, code in (
        ({"name": "g2"}, "is already on this host, as 'g1'", ErrorCode.GUEST_EXISTS),
        ({"uuid": OTHER}, "a guest named 'g1' is already on this host", ErrorCode.GUEST_EXISTS),
        (
            {"name": "g2", "uuid": OTHER, "vmm": "other"},
            "driver 'other', which the destination lacks",
            ErrorCode.GUEST_MISMATCH,
        ),
    ):
        with pytest.raises(RefusedError, match=reason) as caught:
            await guests.create_incoming(here.model_copy(update=changes))
        assert Refusal.because_of(caught.value).code is code  # what the source is told
    assert guests.names() == ["g1"]
    came = await guests.create_incoming(here.model_copy(update={"name": "g2", "uuid": OTHER}))
    assert came.summary("paused")["state"] == "incoming"


async def test_a_name_stands_for_two_processes_while_one_takes_over_from_the_other(guests: GuestRegistry) -> None:
    first = await guests.create(G1)
    description = await first.vmm.describe()
    Reservation(first, "a" * 32)
    second = await guests.create_incoming(description, replacement=Replacement())
    assert (first.place, second.place, second.name, guests.names()) == ("g1", "g1~", "g1", ["g1"])
    assert guests.find("g1") is first
    assert (guests.find_at("g1~"), guests.all()) == (second, [first, second])
    with pytest.raises(RefusedError, match="already on this host"):
        await guests.create_incoming(description, replacement=Replacement())
    second.overlay = None  # it runs now
    assert guests.find("g1") is second
    await guests.destroy(first)
    third = await guests.create_incoming(description, replacement=Replacement())
    assert (third.place, guests.find("g1")) == ("g1", second)
    await guests.destroy(third)
    with pytest.raises(RefusedError, match="a guest named 'g1' is already on this host"):
        await guests.create(G1)
