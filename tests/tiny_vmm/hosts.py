"""Whole hosts in the process of a test: the real ``MigrationHost`` with tiny guests, behind its control socket and its
listener. What a test says to them goes the way it goes in a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import pytest
import uvloop

from migrated.control.access import Access
from migrated.control.operations import GuestSpec
from migrated.control.server import ControlServer
from migrated.guests.registry import Guest
from migrated.host.migration_host import MigrationHost
from migrated.kernel import userfault
from migrated.link.listener import Handler, Listener, bind
from migrated.link.security import LinkSecurity
from migrated.observe.logs import LogCollector
from migrated.record.model import Record
from migrated.record.terms import Role
from migrated.settings.config import (
    Address,
    AuthorisationConfig,
    Config,
    ControlConfig,
    FleetConfig,
    LimitsConfig,
    StateConfig,
    TlsConfig,
    VmmConfig,
)
from migrated.settings.parameters import MigrationParameters
from migrated.state.history import History
from migrated.state.journal import Journal
from migrated.vmm import spawn
from protocol.handover import Decision
from scripts.rig.waiting import until

TINY: Final = "tests.tiny_vmm.driver:TinyDriver"
_GUEST_BYTES: Final = 2 << 20
_PATIENCE_S: Final = 60.0
_LONG_S: Final = 600.0
"""A wait that no test reaches the end of."""

T = TypeVar("T")


def need_write_tracking() -> None:
    """Skip the test where no tiny guest can be moved, with the reason."""
    try:
        uffd = userfault.open_userfaultfd()
        try:
            userfault.enable_write_tracking(uffd)
        finally:
            os.close(uffd)
    except OSError as error:
        pytest.skip(f"this kernel has no asynchronous write protection, or we may not use it: {error}")


class TinyHost:
    """One host. Commands reach it through ``socket``, guests of other hosts at ``uri``.

    Args:
        directory: everything of its own is below it; what an earlier host left there is found again.
        access: who may use the control socket.
        fleet: the fleet that the host belongs to; none unless given.
        limits: further ``[limits]``.
    """

    def __init__(
        self, directory: Path, access: Access | None = None, fleet: FleetConfig | None = None, **limits: Any
    ) -> None:
        self.socket = directory / "control.sock"
        config = Config(
            control=ControlConfig(socket=self.socket),
            state=StateConfig(directory=directory / "state"),
            vmm=VmmConfig(directory=directory / "guests", driver="tiny", drivers=(TINY,)),
            limits=LimitsConfig(**({"connect_timeout_s": _LONG_S} | limits)),
            fleet=fleet or FleetConfig(),
        )
        self.operations = MigrationHost(config, "host", LogCollector())
        self.uri = ""
        self.directory = directory
        self._state = config.state.directory
        self._up = False
        self._control = ControlServer(self.operations, self.socket, access or Access())
        self._listener = Listener(self.operations.connected, config.limits, self.operations.security)

    async def __aenter__(self) -> Self:
        self._up = True
        try:
            await self._control.start()
            await self.operations.start()
            self._listener.start(bind(Address("127.0.0.1", 0)))
            self.operations.listening(self._listener.address)
        except BaseException:
            await self.__aexit__()
            raise
        self.uri = f"tcp:{self._listener.address}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._up:
            return
        pids = [guest["pid"] for guest in await self.operations.guest_list()]
        await self.let_go()
        for pid in pids:
            assert await spawn.make_sure_gone(pid, _PATIENCE_S)

    async def let_go(self) -> None:
        """Stop as a daemon stops: guests run on, for the next host in this directory."""
        self._up = False
        await self._listener.stop()
        await self._control.close()
        await self.operations.stop()

    async def add_guest(self, name: str = "g1", *, paused: bool = False) -> int:
        """Start a guest. Returns the id of its process."""
        spec = GuestSpec(name=name, memory_bytes=_GUEST_BYTES, paused=paused)
        return int((await self.operations.guest_create(spec))["pid"])

    def guest(self, name: str) -> Guest:
        """A guest as the host knows it."""
        return self.operations._env.guests.get(name)

    async def state_of(self, name: str) -> str:
        """What a guest does."""
        return str((await self.operations.guest_show(name))["state"])

    async def until_status(self, guest: str, status: str) -> None:
        """Wait until the guest's last migration has a status."""

        async def reached() -> bool:
            return self.operations.progress(guest)[-1].status == status

        await until(f"migration of {guest} {status}", reached, _PATIENCE_S)

    def remember(self, record: Record) -> None:
        """Put a record into the history, as if an earlier daemon had written it."""
        with contextlib.closing(History(self._state)) as history:
            history.add(record, "source")


def leave_attempt(directory: Path, guest: str, role: Role, *decisions: Decision, epoch: int = 1, **facts: Any) -> str:
    """Write into a host's journal what a killed daemon would have left there. Returns the migration id.

    Args:
        directory: of a host that is not up.
        facts: what was known at the beginning, beyond the usual; None leaves one of the usual out.
    """
    migration_id = secrets.token_hex(16)
    usual = {
        "driver": "tiny",
        "peer": "tcp:127.0.0.1:9",
        "paused": False,
        "started_at": datetime.now(UTC).isoformat(),
        "parameters": MigrationParameters().model_dump(mode="json"),
    }
    known = {name: value for name, value in (usual | facts).items() if value is not None}
    with contextlib.closing(Journal(directory / "state")) as journal:
        journal.begin(migration_id, epoch, guest, role, known)
        for decision in decisions:
            journal.decide(migration_id, role, decision)
    return migration_id


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Meanwhile a guest's process answers nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def damage(guest: dict[str, Any]) -> None:
    """Change a byte in the memory of a paused guest."""
    with socket.socket(socket.AF_UNIX) as vmm:
        vmm.connect(guest["api_socket"])
        vmm.sendall(b'{"op": "memory"}\n')
        with vmm.makefile("rb") as answer:
            address = json.loads(answer.readline())["ok"]["address"]
    with Path(f"/proc/{guest['pid']}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"\xff")


class TinyHosts:
    """Host ``a``, and ``b`` once somebody asks for it, in an event loop of their own thread: commands bring theirs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._stack = contextlib.AsyncExitStack()

    def __enter__(self) -> Self:
        self._thread.start()
        self.a = self.host("a")
        self.socket = self.a.socket
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    def host(self, name: str, **limits: Any) -> TinyHost:
        """Start a host."""

        async def start() -> TinyHost:
            return await self._stack.enter_async_context(TinyHost(self._directory / name, **limits))

        return self.do(start())

    def doubt(self, guest: str) -> str:
        """Start host ``a`` again, after a daemon that was killed between COMMIT and the answer. Returns the migration
        id; nobody answers where the guest went."""

        async def restart() -> str:
            await self.a.let_go()
            migration_id = leave_attempt(self.a.directory, guest, "source", Decision.COMMIT)
            self.a = await self._stack.enter_async_context(TinyHost(self.a.directory))
            await self.a.until_status(guest, "in-doubt")
            return migration_id

        return self.do(restart())

    def listen(self, handler: Handler) -> str:
        """Let a test answer what is sent to a host. Returns where."""

        async def start() -> str:
            limits, security = LimitsConfig(), LinkSecurity(TlsConfig(), AuthorisationConfig())
            listener = Listener(handler, limits, security)
            listener.start(bind(Address("127.0.0.1", 0)))
            self._stack.push_async_callback(listener.stop)
            return f"tcp:{listener.address}"

        return self.do(start())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the hosts' event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_S)
