"""A real etcd for tests, demo and proof: members as processes of their own, in a directory that goes with them.

with EtcdCluster(3) as cluster:
    store = EtcdStore(cluster.endpoints, 5.0)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from scripts.rig.started import Started
from scripts.rig.waiting import RigError

ETCD_PACKAGE: Final = "etcd-server"
_START_S: Final = 60.0


def why_no_etcd() -> str | None:
    """A sentence when this machine has no etcd, else None."""
    if shutil.which("etcd") is None:
        return f"etcd is not installed; the package {ETCD_PACKAGE} has it"
    return None


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Member:
    """One member of a cluster.

    Attributes:
        name: of the member.
        endpoint: URL for clients.
        peer: URL for the other members.
    """

    def __init__(self, directory: Path, name: str, address: str, enter: Sequence[str]) -> None:
        self.name = name
        self.endpoint = f"http://{address}:{_free_port('127.0.0.1')}"
        self.peer = f"http://{address}:{_free_port('127.0.0.1')}"
        self._directory = directory
        self._enter = enter
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, cluster: str) -> None:
        """Start its process, for the first time or again."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._enter, "etcd", "--name", self.name, "--data-dir", str(self._directory / "data"),
                    "--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint,
                    "--listen-peer-urls", self.peer, "--initial-advertise-peer-urls", self.peer,
                    "--initial-cluster", cluster, "--heartbeat-interval", "100", "--election-timeout", "1000",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def signal(self, number: int) -> None:
        """Send its process a signal (SIGSTOP, SIGCONT)."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill its process, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def status(self) -> dict[str, Any] | None:
        """Return what the member says of itself, None when it does not answer."""
        try:
            return self._post("/v3/maintenance/status")
        except (OSError, ValueError):
            return None

    def _post(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.endpoint + path, data=b"{}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=2.0) as response:
            return dict(json.load(response))

    def log_tail(self) -> str:
        """The end of its log, for people."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join((self._directory / "log").read_text(errors="replace").splitlines()[-20:])
        return ""


class EtcdCluster(Started):
    """Members of one cluster on this machine.

    Args:
        size: how many.
        addresses: an address for each; all on loopback unless given.
        enter: for each the words that enter its network namespace (``ip netns exec NAME``).
    """

    def __init__(self, size: int, *, addresses: Sequence[str] = (), enter: Sequence[Sequence[str]] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-"))
        self.members = [
            Member(
                self.directory / f"m{number}",
                f"m{number}",
                addresses[number] if addresses else "127.0.0.1",
                enter[number] if enter else (),
            )
            for number in range(size)
        ]

    @property
    def endpoints(self) -> list[str]:
        """URLs of all members for clients."""
        return [member.endpoint for member in self.members]

    def start(self) -> None:
        """Start all members and wait until they have a leader.

        Raises:
            RigError: they never have.
        """
        for member in self.members:
            self.start_member(member)
        deadline = time.monotonic() + _START_S
        while self.leader() is None:
            if time.monotonic() > deadline:
                raise RigError("etcd did not start:\n" + "\n".join(member.log_tail() for member in self.members))
            time.sleep(0.05)

    def start_member(self, member: Member) -> None:
        """Start one member, for the first time or again."""
        member.start(",".join(f"{one.name}={one.peer}" for one in self.members))

    def leader(self) -> Member | None:
        """The member that leads, None while there is none."""
        for member in self.members:
            status = member.status()
            if status is not None and status.get("leader") == status["header"]["member_id"]:
                return member
        return None

    def pause(self) -> None:
        """Let all members stand still, as if etcd were away."""
        for member in self.members:
            member.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let all members go on."""
        for member in self.members:
            member.signal(signal.SIGCONT)

    def close(self) -> None:
        """End all members and remove the directory."""
        for member in self.members:
            member.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
