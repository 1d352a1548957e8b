"""The guests of this host: starting them, finding them again after a restart of the daemon, noticing their end.

A guest is a process of its own. Its API socket ``NAME.sock`` in the VMM directory is how it is found; beside it lie
the VMM's log and the run log that it writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import structlog

from migrated.config import ClockConfig, LockConfig, VmmConfig
from migrated.errors import RefusedError, VmmError, VmmGoneError, VmmSilentError
from migrated.tasks import TaskSet
from migrated.vmm import spawn
from migrated.vmm.base import Vmm
from migrated.vmm.sim import SimVmm, incoming_command
from protocol.guest import GuestDescription

log = structlog.get_logger()

Overlay = Literal["incoming", "in-doubt", "retired"]

UNRESPONSIVE: Final = "unresponsive"
"""The state of a guest whose VMM does not answer."""
ANSWER_S: Final = 2.0
"""How long one guest may hold up what concerns all of them."""
_AGAIN_S: Final = 1.0


@dataclass(slots=True)
class Guest:
    """One guest of this host.

    Attributes:
        migration_id: the attempt that has its hands on the guest, None when there is none.
        overlay: what the hand-over says of it beyond what its VMM knows.
    """

    name: str
    uuid: str
    memory_bytes: int
    vmm: Vmm
    api_socket: Path
    migration_id: str | None = None
    overlay: Overlay | None = None
    pidfd: int = -1

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
    """A guest that has not answered since this daemon began: what it is, and what it does, is not known."""

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
        config: where API sockets are and how a VMM is started.
        lock: where ownership locks lie.
        clock: how this host's clocks are shifted; guests started here get the same.
    """

    def __init__(self, config: VmmConfig, clock: ClockConfig, lock: LockConfig) -> None:
        self._config = config
        self._lock = lock
        # A VMM lives on the same host: where the host's clocks are shifted, its are too.
        self._command = [*config.command]
        if clock != ClockConfig():
            self._command += [
                "--hrtime-offset-ns", str(clock.hrtime_offset_ns),
                "--wall-offset-ns", str(clock.wall_offset_ns),
                "--clock-drift-ppm", str(clock.drift_ppm),
            ]  # fmt: skip
        if lock.directory is not None:
            self._command += ["--lock-directory", str(lock.directory)]
        self._guests: dict[str, Guest] = {}
        self._starting: set[str] = set()
        self._ending: dict[str, asyncio.Event] = {}
        self.on_gone: Callable[[Guest], None] = lambda _guest: None
        """Called when a guest's process ended by itself."""
        self.silent: dict[str, SilentGuest] = {}
        """Guests by name that have not answered since ``open``; they are asked until they do."""
        self.on_settled: Callable[[str], None] = lambda _name: None
        """Called when a silent guest has answered, or has ended."""
        self._asking = TaskSet()

    async def open(self) -> None:
        """Find the guests that are running already. One that does not answer holds this up for ANSWER_S at most."""
        self._config.directory.mkdir(parents=True, exist_ok=True)
        if self._lock.directory is not None:
            self._lock.directory.mkdir(parents=True, exist_ok=True)
        await asyncio.gather(*(self._find(path) for path in sorted(self._config.directory.glob("*.sock"))))

    async def _find(self, path: Path) -> None:
        """Take up the guest behind a socket; go on asking in the background if it is silent."""
        try:
            await self._take_up(path, ANSWER_S)
        except VmmSilentError as error:
            log.error("a guest does not answer", guest=path.stem, reason=str(error))
            reason = f"{error}, and has not since the daemon began; it is asked until it does, or its process ends"
            self.silent[path.stem] = SilentGuest(path.stem, error.pid or None, path, reason)
            self._asking.start(self._keep_asking(path))

    async def _take_up(self, path: Path, timeout_s: float | None) -> None:
        """Take up the guest behind a socket, if it is one that can be used.

        Raises:
            VmmSilentError: it did not answer in time.
        """
        try:
            vmm = await SimVmm.attach(path, timeout_s)
            try:
                self._adopt(vmm, await vmm.describe(), path)
            except BaseException:
                await vmm.close()
                raise
            log.info("found a running guest", guest=vmm.name, pid=vmm.pid)
        except VmmGoneError as error:
            log.warning("a stale API socket was left behind", socket=str(path), reason=str(error))
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        except VmmSilentError:
            raise
        except VmmError as error:
            log.error("a guest cannot be used", socket=str(path), reason=str(error))

    async def _keep_asking(self, path: Path) -> None:
        """Wait for as long as it takes until a silent guest answers or ends; one connection waits, none piles up."""
        while True:
            try:
                await self._take_up(path, None)
            except VmmSilentError:
                await asyncio.sleep(_AGAIN_S)
            else:
                break
        del self.silent[path.stem]
        self.on_settled(path.stem)

    async def close(self) -> None:
        """Let go of every guest without touching it."""
        await self._asking.stop()
        for guest in list(self._guests.values()):
            self._forget(guest)
            await guest.vmm.close()

    def names(self) -> list[str]:
        """Names of all guests."""
        return sorted(self._guests)

    def get(self, name: str) -> Guest:
        """One guest.

        Raises:
            UnknownGuestError: there is none of this name.
        """
        guest = self._guests.get(name)
        if guest is None:
            known = ", ".join(self.names()) or "none"
            raise UnknownGuestError(f"there is no guest {name!r} on this host; guests here: {known}")
        return guest

    def find(self, name: str) -> Guest | None:
        """One guest, None when there is none."""
        return self._guests.get(name)

    async def create(self, name: str, arguments: list[str]) -> Guest:
        """Start a new guest.

        Raises:
            RefusedError: the name is taken.
            VmmError: the VMM does not start.
        """
        path = await self._claim(name)
        try:
            command = [*self._command, "--name", name, "--api-socket", str(path), *arguments]
            return await self._start(command, path)
        finally:
            self._starting.discard(name)

    async def create_incoming(self, description: GuestDescription) -> Guest:
        """Start an empty guest equal to the description, waiting for state.

        Raises:
            RefusedError: the name or the uuid is taken here.
            VmmError: the VMM does not start or cannot be such a guest.
        """
        for guest in self._guests.values():
            if guest.uuid == description.uuid:
                raise RefusedError(
                    f"the guest with uuid {description.uuid} is already on the destination, as {guest.name!r}"
                )
        path = await self._claim(description.name)
        try:
            guest = await self._start(incoming_command(self._command, description, path), path)
            guest.overlay = "incoming"
            return guest
        finally:
            self._starting.discard(description.name)
            with contextlib.suppress(FileNotFoundError):
                path.with_suffix(".incoming").unlink()

    async def destroy(self, guest: Guest) -> None:
        """End a guest and forget it. When this returns its process is gone.

        Raises:
            VmmError: the process does not end.
        """
        self._forget(guest)
        ended = self._ending[guest.name] = asyncio.Event()
        try:
            await guest.vmm.destroy()
        finally:
            del self._ending[guest.name]
            ended.set()

    def ever_ran(self, name: str, epoch: int) -> bool | None:
        """Whether a guest of this name ran on this host in this epoch, by the run log that its VMM wrote first; None
        when its VMM kept none."""
        try:
            lines = (self._config.directory / f"{name}.runlog").read_bytes().splitlines()
        except FileNotFoundError:
            return None
        for line in lines:
            with contextlib.suppress(ValueError, KeyError):
                entry = json.loads(line)
                if entry["event"] == "run" and entry["epoch"] == epoch:
                    return True
        return False

    async def _claim(self, name: str) -> Path:
        """Reserve a name; one whose process is just ending becomes free first."""
        while (ending := self._ending.get(name)) is not None:
            await ending.wait()
        path = self._config.directory / f"{name}.sock"
        if name in self._guests or name in self._starting or name in self.silent:
            raise RefusedError(f"a guest named {name!r} is already on this host; choose another name or destroy it")
        self._starting.add(name)
        return path

    async def _start(self, command: list[str], path: Path) -> Guest:
        vmm = await SimVmm.start(command, path, self._config.start_timeout_s)
        try:
            return self._adopt(vmm, await vmm.describe(), path)
        except BaseException:
            with contextlib.suppress(VmmError):
                await vmm.destroy()
            raise

    def _adopt(self, vmm: Vmm, description: GuestDescription, path: Path) -> Guest:
        guest = Guest(description.name, description.uuid, description.memory_bytes, vmm, path)
        try:
            guest.pidfd = os.pidfd_open(vmm.pid)
        except ProcessLookupError as error:
            raise VmmGoneError(f"the VMM of guest {vmm.name} ended") from error
        asyncio.get_running_loop().add_reader(guest.pidfd, self._ended, guest)
        self._guests[guest.name] = guest
        return guest

    def _ended(self, guest: Guest) -> None:
        self._forget(guest)
        spawn.reap(guest.vmm.pid)
        log.error("a guest's process ended by itself", guest=guest.name, pid=guest.vmm.pid)
        self.on_gone(guest)

    def _forget(self, guest: Guest) -> None:
        if guest.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(guest.pidfd)
            os.close(guest.pidfd)
            guest.pidfd = -1
        if self._guests.get(guest.name) is guest:
            del self._guests[guest.name]
