"""The service manager holds the listening socket: migrations arrive at it, and a restart turns nobody away.

systemd     listen ----- pass as fd 3 ----------------------------- pass again
daemon               start, READY=1 ... STOPPING=1, exit            start, READY=1
source                    migrate g1              migrate g2 waits in the backlog ... completes
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.basics import ROOT
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.ports import free_port
from scripts.rig.waiting import until

AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.close(int(sys.argv[1]))
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="migrated@host.socket")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Passes a descriptor as systemd does: as number 3 alone, and announced to the process that will be the daemon."""

PATIENT = {"handshake_timeout_s": 60.0, "connect_timeout_s": 30.0}
"""A daemon on a busy machine may need its time to start."""


class Manager:
    """What a service manager is to a daemon: it holds the listening socket, and is told how the daemon is."""

    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        self.listening = socket.create_server((address, 0))
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notifications.bind(str(directory / "notify"))

    @property
    def uri(self) -> str:
        """Where guests are sent to arrive at the socket."""
        return f"tcp:127.0.0.1:{self.listening.getsockname()[1]}"

    def start(self, host: Host) -> subprocess.Popen[bytes]:
        """Start the daemon of a host with the socket."""
        fd = self.listening.fileno()
        daemon = [sys.executable, "-m", "migrated", host.role, "--config", str(host.write_config())]
        with (host.directory / "stderr").open("ab") as stderr:
            return subprocess.Popen(
                [sys.executable, "-c", AS_SYSTEMD, str(fd), *daemon],
                cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stderr, pass_fds=[fd], start_new_session=True,
                env={**os.environ, "NOTIFY_SOCKET": self._notifications.getsockname()},
            )  # fmt: skip

    def told(self, timeout_s: float = 60.0) -> str:
        """The first line of the next thing that the daemon says."""
        self._notifications.settimeout(timeout_s)
        return self._notifications.recv(4096).decode().partition("\n")[0]

    def somebody_waits(self, timeout_s: float = 10.0) -> bool:
        """Whether a connection is in the backlog."""
        return bool(select.select([self.listening], [], [], timeout_s)[0])

    def close(self) -> None:
        """Let go of both sockets."""
        self.listening.close()
        self._notifications.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as opened:
        yield opened


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A source that runs, and a destination that only a service manager starts."""
    made = Pair(limits=PATIENT)
    made.b.role = "destination"
    try:
        made.a.start()
        yield made
        print(made.log_tail())  # noqa: T201 - shown when the test failed
        assert made.a.bugs() + made.b.bugs() == []
    finally:
        made.close()


@contextlib.contextmanager
def ended_at_last(daemon: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield daemon
    finally:
        if daemon.poll() is None:
            daemon.kill()
        daemon.wait()


def sockets_of(pid: int) -> set[str]:
    """The sockets that a process holds."""
    links = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    return {link for link in links if link.startswith("socket:")}


async def test_guests_arrive_at_the_passed_socket_and_a_restart_turns_nobody_away(pair: Pair, manager: Manager) -> None:
    for name in ("g1", "g2"):
        await pair.a.create_guest(name, 16)
    begun = manager.start(pair.b)
    with ended_at_last(begun):
        assert manager.told() == "READY=1"
        (ready,) = [entry for entry in pair.b.log() if entry["event"] == "ready"]
        assert ready["listen"] == manager.uri.removeprefix("tcp:"), "[listen] address does not count"
        record = await pair.a.migrate("g1", manager.uri, downtime_limit=20_000)
        assert record["outcome"] == "completed", record["reason"]
        assert (await pair.b.verify())["ok"]

        (guest,) = pair.b.vmm_pids()
        held = os.readlink(f"/proc/self/fd/{manager.listening.fileno()}")
        assert held in sockets_of(begun.pid)
        assert held not in sockets_of(guest), "a guest must not keep the port busy"
        assert b"LISTEN_" not in Path(f"/proc/{guest}/environ").read_bytes()

        begun.send_signal(signal.SIGHUP)
        assert [manager.told(), manager.told()] == ["RELOADING=1", "READY=1"]
        begun.send_signal(signal.SIGTERM)
        assert manager.told() == "STOPPING=1"
        assert await asyncio.to_thread(begun.wait, 30) == 0

    migration_id = await pair.a.begin_migration("g2", manager.uri, downtime_limit=20_000)
    assert await asyncio.to_thread(manager.somebody_waits)
    with ended_at_last(manager.start(pair.b)):
        assert manager.told() == "READY=1"
        record = await pair.a.wait(migration_id)
        assert record["outcome"] == "completed", record["reason"]
        assert (await pair.b.verify("g2"))["ok"]
        assert set(await pair.b.guests()) == {"g1", "g2"}


def start_activator(address: str, host: Host, words: Path) -> subprocess.Popen[bytes]:
    """Let systemd listen and start the daemon of a host when somebody comes; what it says goes to ``words``."""
    daemon = [sys.executable, "-m", "migrated", host.role, "--config", str(host.write_config())]
    command = ["systemd-socket-activate", f"--listen={address}", *daemon]
    with words.open("wb") as stderr:
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stderr)


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
async def test_systemd_starts_the_daemon_for_the_first_migration(pair: Pair) -> None:
    await pair.a.create_guest("g1", 16)
    address = f"127.0.0.1:{free_port()}"
    words = pair.directory / "systemd"
    activator = start_activator(address, pair.b, words)

    async def listens() -> bool:
        assert activator.poll() is None, words.read_text()
        return f"Listening on {address}" in words.read_text()

    with ended_at_last(activator):
        await until("systemd listens", listens)
        assert not pair.b.socket.exists(), "nothing runs before somebody comes"
        record = await pair.a.migrate("g1", f"tcp:{address}", downtime_limit=20_000)
        assert record["outcome"] == "completed", record["reason"]
        assert (await pair.b.verify())["ok"]
        activator.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(activator.wait, 30) == 0


async def test_a_host_of_a_fleet_does_not_tell_the_others_of_an_address_that_stands_for_all(tmp_path: Path) -> None:
    """They would connect to themselves."""
    with (
        tempfile.TemporaryDirectory(prefix="activation-") as directory,  # short enough for the path of a socket
        contextlib.closing(Manager(tmp_path, "0.0.0.0")) as manager,
    ):
        host = Host(Path(directory), "a", role="host")
        host.configure(fleet={"endpoints": ["http://127.0.0.1:9"]}, tls={"insecure": True})
        with ended_at_last(manager.start(host)) as daemon:
            assert await asyncio.to_thread(daemon.wait, 60) == 1
        (entry,) = [entry for entry in host.log() if entry["event"] == "the daemon cannot start"]
        assert "[fleet] address must say where other hosts reach this one: the socket from the" in entry["reason"]
