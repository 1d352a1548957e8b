"""The guests of this host: starting them, finding them again after a restart of the daemon, noticing their end.

A guest is a process of its own. Its API socket, named after its place, is how the driver that started it finds it
again. Which driver starts a guest is decided by ``[vmm] driver``, or by the description of one that comes in.

A name stands for two processes for a moment when a guest gets another VMM on this host. So guests are kept by place:

    g1     the process that a guest named g1 began with here
    g1~    the one that took over from it; the one after that is at g1 again

The module is longer than others because adding, finding, replacing and ending share the table of places.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import structlog

from migrated.base.errors import GuestHereError, NoRoomError, RefusedError, VmmError, VmmGoneError, VmmSilentError
from migrated.base.tasks import TaskSet
from migrated.kernel.scheduling import give_back_all
from migrated.settings.config import Config
from migrated.vmm import spawn
from migrated.vmm.seam import Driver, GuestRequest, Incoming, Replacement, VmmGuest
from protocol.guest import GuestDescription

log = structlog.get_logger()

Overlay = Literal["incoming", "in-doubt", "retired"]

_STANDING: Final[Mapping[Overlay | None, int]] = {None: 0, "in-doubt": 1, "incoming": 2, "retired": 3}
"""Which of two processes of one name a command means: the lowest."""
_TWIN: Final = "~"
"""Ends the place of a process beside another of the same name; no guest's name has it."""


def name_at(place: str) -> str:
    """The name of the guest at a place."""
    return place.removesuffix(_TWIN)


UNRESPONSIVE: Final = "unresponsive"
"""The state of a guest whose VMM does not answer."""
ANSWER_S: Final = 2.0
"""How long one guest that does not answer may delay a command on all guests."""
_AGAIN_S: Final = 1.0


@dataclass(slots=True)
class Guest:
    """One guest of this host.

    Attributes:
        migration_id: the attempt that has reserved the guest, None when there is none.
        overlay: the state that the hand-over gives the guest, in place of the VMM's; None for none.
    """

    name: str
    uuid: str
    memory_bytes: int
    vmm: VmmGuest
    api_socket: Path
    migration_id: str | None = None
    overlay: Overlay | None = None
    pidfd: int = -1
    ended: bool = False

    @property
    def place(self) -> str:
        """The name of its socket and files: no other process on this host has it."""
        return self.api_socket.stem

    def summary(self, state: str) -> dict[str, Any]:
        """The guest as ``guest list`` shows it."""
        return {
            "name": self.name,
            "state": self.overlay or state,
            "memory_bytes": self.memory_bytes,
            "api_socket": str(self.api_socket),
            "pid": self.vmm.pid,
            "uuid": self.uuid,
            "migration_id": self.migration_id,
        }


@dataclass(frozen=True, slots=True)
class SilentGuest:
    """A guest that has not answered since this daemon began: nothing but its name and process is known."""

    name: str
    pid: int | None
    api_socket: Path
    reason: str

    def summary(self, migration_id: str | None) -> dict[str, Any]:
        """The guest as ``guest list`` shows it."""
        return {
            "name": self.name,
            "state": UNRESPONSIVE,
            "memory_bytes": None,
            "api_socket": str(self.api_socket),
            "pid": self.pid,
            "uuid": None,
            "migration_id": migration_id,
            "reason": self.reason,
        }


class UnknownGuestError(Exception):
    """There is no guest of this name; the sentence lists those there are."""


class GuestRegistry:
    """All guests of one daemon.

    Args:
        config: the directory of the guests' sockets and the driver that starts new ones.
        drivers: all drivers of this host, by name.
    """

    def __init__(self, config: Config, drivers: Mapping[str, Driver]) -> None:
        self._config = config
        self._drivers = drivers
        self._guests: dict[str, Guest] = {}
        """By place, as the next three are."""
        self._starting: set[str] = set()
        self._ending: dict[str, asyncio.Event] = {}
        self.on_gone: Callable[[Guest], None] = lambda _guest: None
        """Called when a guest's process ended by itself."""
        self.silent: dict[str, SilentGuest] = {}
        """Guests that have not answered since ``open``; they are asked until they do."""
        self.on_settled: Callable[[str, bool], None] = lambda _place, _ended: None
        """Called with the place of a silent guest that has answered, or whose process has ended, and which it was."""
        self._asking = TaskSet()
        self._closing = TaskSet()

    async def open(self) -> None:
        """Find the guests that are running already. One that does not answer holds this up for ANSWER_S at most."""
        self._config.vmm.directory.mkdir(parents=True, exist_ok=True)
        if self._config.lock.directory is not None:
            self._config.lock.directory.mkdir(parents=True, exist_ok=True)
        found = [(driver, place) for driver in self._drivers.values() for place in driver.places()]
        await asyncio.gather(*(self._find(driver, place) for driver, place in found))

    async def _find(self, driver: Driver, path: Path) -> None:
        """Take up the guest behind a socket; go on asking in the background if it is silent."""
        try:
            await self._take_up(driver, path, ANSWER_S)
        except VmmSilentError as error:
            log.error("a guest does not answer", guest=path.stem, reason=str(error))
            reason = f"{error}, and has not since the daemon began; it is asked until it does, or its process ends"
            self.silent[path.stem] = SilentGuest(name_at(path.stem), error.pid or None, path, reason)
            self._asking.start(self._keep_asking(driver, path))

    async def _take_up(self, driver: Driver, path: Path, timeout_s: float | None) -> bool:
        """Take up the guest behind a socket, if it is one that can be used. Returns whether its process has ended.

        Raises:
            VmmSilentError: it did not answer in time.
        """
        try:
            vmm = await driver.attach(path, timeout_s)
            try:
                give_back_all(vmm.pid)  # a daemon that was killed in the middle of a blackout could not
                self._adopt(vmm, await vmm.describe())
            except BaseException:
                await vmm.close()
                raise
            log.info("found a running guest", guest=vmm.name, pid=vmm.pid)
        except VmmGoneError as error:
            log.warning("a stale API socket was left behind", socket=str(path), reason=str(error))
            driver.tidy(path)
            return True
        except VmmSilentError:
            raise
        except VmmError as error:
            log.error("a guest cannot be used", socket=str(path), reason=str(error))
        return False

    async def _keep_asking(self, driver: Driver, path: Path) -> None:
        """Wait for as long as it takes until a silent guest answers or ends; one connection waits, none piles up."""
        while True:
            try:
                ended = await self._take_up(driver, path, None)
            except VmmSilentError:
                await asyncio.sleep(_AGAIN_S)
            else:
                break
        del self.silent[path.stem]
        self.on_settled(path.stem, ended)

    async def close(self) -> None:
        """Let go of every guest without touching it."""
        await self._asking.stop()
        await self._closing.stop()
        for guest in list(self._guests.values()):
            self._forget(guest)
            await guest.vmm.close()

    def driver_names(self) -> list[str]:
        """Names of the drivers whose guests this host can run."""
        return sorted(self._drivers)

    async def offers(self) -> frozenset[str]:
        """What this host has for guests of its drivers that not every host has."""
        return frozenset[str]().union(*[await driver.offers() for driver in self._drivers.values()])

    def names(self) -> list[str]:
        """Names of all guests."""
        return sorted({guest.name for guest in self._guests.values()})

    def all(self) -> list[Guest]:
        """All guests, by place: two of one name where one takes over from the other."""
        return [self._guests[place] for place in sorted(self._guests)]

    def get(self, name: str) -> Guest:
        """One guest, as ``find`` finds it.

        Raises:
            UnknownGuestError: there is none of this name.
        """
        guest = self.find(name)
        if guest is None:
            known = ", ".join(self.names()) or "none"
            raise UnknownGuestError(f"there is no guest {name!r} on this host; guests here: {known}")
        return guest

    def find(self, name: str) -> Guest | None:
        """The guest of this name that a command means, None when there is none. Where one process takes over from
        another it is the one that owns the guest."""
        return min(
            (guest for guest in self._guests.values() if guest.name == name),
            key=lambda guest: (_STANDING[guest.overlay], guest.migration_id is not None),
            default=None,
        )

    def find_at(self, place: str) -> Guest | None:
        """The guest at a place, None when there is none."""
        return self._guests.get(place)

    def find_silent(self, name: str) -> SilentGuest | None:
        """A guest of this name that has not answered since ``open``, None when there is none."""
        return next((silent for silent in self.silent.values() if silent.name == name), None)

    def holds(self, name: str) -> bool:
        """Whether a guest of this name is here or is just being started here, also one that does not answer."""
        return any(one in held for one in (name, name + _TWIN) for held in self._held)

    async def create(self, request: GuestRequest, driver_name: str | None = None) -> Guest:
        """Start a new guest with a driver, or with the one that the configuration names.

        Raises:
            RefusedError: the name is taken, or there is no place for one more.
            VmmError: the VMM does not start.
        """
        driver = self._drivers[driver_name or self._config.vmm.driver]
        await self._claim(request.name)
        try:
            return await self._started(await driver.create(request))
        finally:
            self._starting.discard(request.name)

    def takes_memory(self, driver: str) -> bool:
        """Whether guests of a driver can be started here around memory that is handed over."""
        return driver in self._drivers and self._drivers[driver].takes_memory

    async def create_incoming(
        self, description: GuestDescription, memory: tuple[int, ...] = (), replacement: Replacement | None = None
    ) -> Guest:
        """Start a guest equal to the description, waiting for state; or take one that waits here already.

        Args:
            memory: descriptors of memory that is handed over, the caller's own; empty for an empty guest.
            replacement: what is wanted of the new VMM of a guest that is here; None for a guest that comes from
                elsewhere.

        Raises:
            RefusedError: the name or the uuid is taken here, there is no place for one more, or this host lacks the
                guest's driver.
            VmmError: the VMM does not start or cannot be such a guest.
        """
        driver = self._drivers.get(description.vmm)
        if driver is None:
            raise RefusedError(
                f"guest {description.name!r} needs the driver {description.vmm!r}, which the destination lacks; it has "
                f"{', '.join(sorted(self._drivers))}. Configure it there under [vmm] drivers"
            )
        waiting = self.find(description.name)
        if waiting is not None and waiting.migration_id is None and await waiting.vmm.awaits(description):
            if waiting.overlay == "incoming" or waiting.pidfd < 0:
                raise RefusedError(
                    f"the guest {description.name!r} that waited here was taken, or has ended, meanwhile"
                )
            waiting.overlay = "incoming"
            return waiting
        place = description.name
        if replacement is None:
            for guest in self._guests.values():
                if guest.uuid == description.uuid:
                    raise GuestHereError(
                        f"the guest with uuid {description.uuid} is already on this host, as {guest.name!r}"
                    )
        elif place in self._guests:
            place += _TWIN
        await self._claim(place, beside_another=replacement is not None)
        try:
            incoming = Incoming(place, memory, replacement or Replacement())
            guest = await self._started(await driver.create_incoming(description, incoming))
            guest.overlay = "incoming"
            return guest
        finally:
            self._starting.discard(place)

    async def destroy(self, guest: Guest) -> None:
        """End a guest and forget it. When this returns its process is gone, whoever else was ending it already.

        Raises:
            VmmError: the process does not end. The guest stays known, so that its name is not given to another one.
        """
        while (ending := self._ending.get(guest.place)) is not None:
            await ending.wait()
        if guest.ended:
            return
        self._forget(guest)
        ended = self._ending[guest.place] = asyncio.Event()
        try:
            await guest.vmm.destroy()
            guest.ended = True
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # it has ended after all
                self._watch(guest)
            raise
        finally:
            del self._ending[guest.place]
            ended.set()

    def ever_ran(self, driver: str | None, place: str, epoch: int) -> bool | None:
        """Return whether a guest of this driver ran at this place in this epoch, by the log that its VMM writes before
        it runs; None where there is no such log, so that the daemon's own mark must do.

        Args:
            driver: None when it is not known. Then a log of any driver that says so counts; one that does not may be
                another guest's.
        """
        if driver is None:
            return True if any(one.ran(place, epoch) for one in self._drivers.values()) else None
        return self._drivers[driver].ran(place, epoch) if driver in self._drivers else None

    async def _claim(self, place: str, *, beside_another: bool = False) -> None:
        """Reserve a place; one whose process is just ending becomes free first.

        Args:
            beside_another: another process of the guest may be here.
        """
        while (ending := self._ending.get(place)) is not None:
            await ending.wait()
        most = self._config.limits.max_guests
        if (count := len(self._guests) + len(self._starting) + len(self.silent)) >= most:
            raise NoRoomError(f"there are {count} guests on this host, the most that [limits] max_guests allows")
        name = name_at(place)
        if any(place in held for held in self._held) if beside_another else self.holds(name):
            raise GuestHereError(f"a guest named {name!r} is already on this host; choose another name or destroy it")
        self._starting.add(place)

    @property
    def _held(self) -> tuple[Container[str], ...]:
        """The places that are taken."""
        return self._guests, self._starting, self.silent

    async def _started(self, vmm: VmmGuest) -> Guest:
        """Take up a guest that its driver has just started; one that cannot be used is ended."""
        try:
            return self._adopt(vmm, await vmm.describe())
        except BaseException:
            with contextlib.suppress(VmmError):
                await vmm.destroy()
            raise

    def _adopt(self, vmm: VmmGuest, description: GuestDescription) -> Guest:
        if description.name != name_at(vmm.api_socket.stem):
            raise VmmError(
                f"the VMM behind {vmm.api_socket} calls its guest {description.name!r}: commands for that name would "
                "reach this one"
            )
        guest = Guest(description.name, description.uuid, description.memory_bytes, vmm, vmm.api_socket)
        try:
            self._watch(guest)
        except ProcessLookupError as error:
            raise VmmGoneError(f"the VMM of guest {vmm.name} ended") from error
        return guest

    def _watch(self, guest: Guest) -> None:
        """Take a guest into the table, until its process ends. Raises ProcessLookupError when it has ended."""
        guest.pidfd = os.pidfd_open(guest.vmm.pid)
        asyncio.get_running_loop().add_reader(guest.pidfd, self._ended, guest)
        self._guests[guest.place] = guest

    def _ended(self, guest: Guest) -> None:
        self._forget(guest)
        spawn.reap(guest.vmm.pid)
        log.error("a guest's process ended by itself", guest=guest.name, pid=guest.vmm.pid)
        self.on_gone(guest)
        self._closing.start(guest.vmm.close())  # what the daemon holds of it would stay for as long as the daemon runs

    def _forget(self, guest: Guest) -> None:
        if guest.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(guest.pidfd)
            os.close(guest.pidfd)
            guest.pidfd = -1
        if self._guests.get(guest.place) is guest:
            del self._guests[guest.place]
