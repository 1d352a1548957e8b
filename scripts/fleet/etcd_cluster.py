"""A real etcd for tests, demo and proof: members as processes of their own, in a directory that goes with them.

    with EtcdCluster(3) as cluster:
        store = EtcdStore(cluster.endpoints, 5.0)

With an authority members speak TLS only, to each other and to clients, and ask for certificates; with a login, clients
must be that user, who may read and write below one prefix.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from migrated.fleet.etcd import Login
from scripts.authority import Authority, HostFiles
from scripts.rig.ports import free_port
from scripts.rig.started import Started
from scripts.rig.waiting import RigError

ETCD_PACKAGE: Final = "etcd-server"
_START_S: Final = 60.0
_ROOT: Final = Login("root", "root")
"""The administrator; etcd wants one of this name before it asks for users."""


def why_no_etcd() -> str | None:
    """A sentence when this machine has no etcd, else None."""
    if shutil.which("etcd") is None:
        return f"etcd is not installed; the package {ETCD_PACKAGE} has it"
    return None


class Member:
    """One member of a cluster.

    Attributes:
        name: of the member.
        endpoint: URL for clients.
        peer: URL for the other members.
    """

    def __init__(self, directory: Path, name: str, address: str, enter: Sequence[str], files: HostFiles | None) -> None:
        scheme = "http" if files is None else "https"
        self.name = name
        self.endpoint = f"{scheme}://{address}:{free_port()}"
        self.peer = f"{scheme}://{address}:{free_port()}"
        self._directory = directory
        self._enter = enter
        self._files = files
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
                    *self._tls(),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _tls(self) -> list[str]:
        if self._files is None:
            return []
        found = []
        for prefix in ("", "peer-"):
            found += [
                f"--{prefix}cert-file", str(self._files.certificate), f"--{prefix}key-file", str(self._files.key),
                f"--{prefix}trusted-ca-file", str(self._files.authority), f"--{prefix}client-cert-auth",
            ]  # fmt: skip
        return found

    @property
    def pid(self) -> int:
        """Its process.

        Raises:
            RigError: it does not run.
        """
        if self._process is None:
            raise RigError(f"the member {self.name} of etcd does not run")
        return self._process.pid

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
            return self.ask("/v3/maintenance/status")
        except (OSError, ValueError):
            return None

    def ask(self, path: str, token: str = "", **wanted: Any) -> dict[str, Any]:
        """Make a call of the JSON gateway and return its answer.

        Args:
            token: of a user, where etcd asks for one.

        Raises:
            OSError, ValueError: there was none, or a refusal.
        """
        headers = {"Authorization": token} if token else {}
        request = urllib.request.Request(self.endpoint + path, data=json.dumps(wanted).encode(), headers=headers)
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self._files is not None:
            context = ssl.create_default_context(cafile=str(self._files.authority))
            context.load_cert_chain(str(self._files.certificate), str(self._files.key))
            handlers.append(urllib.request.HTTPSHandler(context=context))
        with urllib.request.build_opener(*handlers).open(request, timeout=5.0) as response:
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
        authority: certifies the members; None for members without TLS.
        login: the user that clients must be; None where anybody may do anything.
        prefix: below which that user may read and write.
    """

    def __init__(
        self,
        size: int,
        *,
        addresses: Sequence[str] = (),
        enter: Sequence[Sequence[str]] = (),
        authority: Authority | None = None,
        login: Login | None = None,
        prefix: str = "/migrated/",
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-"))
        self.members = []
        for number in range(size):
            name, address = f"m{number}", addresses[number] if addresses else "127.0.0.1"
            files = authority.host(name, address, common_name=False) if authority is not None else None
            place = enter[number] if enter else ()
            self.members.append(Member(self.directory / name, name, address, place, files))
        self._login = login
        self._prefix = prefix

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
        if self._login is not None:
            self._ask_for_users(self._login)

    def _ask_for_users(self, login: Login) -> None:
        """Make the administrator and the user, and let members ask for them from now on."""
        first = self.members[0]
        for user in (_ROOT, login):
            first.ask("/v3/auth/user/add", name=user.user, password=user.password)
            first.ask("/v3/auth/role/add", name=user.user)
            first.ask("/v3/auth/user/grant", user=user.user, role=user.user)
        begin = self._prefix.encode()
        end = begin[:-1] + bytes([begin[-1] + 1])
        key, range_end = (base64.b64encode(one).decode() for one in (begin, end))
        permission = {"permType": "READWRITE", "key": key, "range_end": range_end}
        first.ask("/v3/auth/role/grant", name=login.user, perm=permission)
        first.ask("/v3/auth/enable")

    def start_member(self, member: Member) -> None:
        """Start one member, for the first time or again."""
        member.start(",".join(f"{one.name}={one.peer}" for one in self.members))

    def read(self, key: str) -> tuple[dict[str, Any], int] | None:
        """A key's document and the revision at which it was written, None when there is no such key."""
        first, token = self.members[0], ""
        if (login := self._login) is not None:
            token = first.ask("/v3/auth/authenticate", name=login.user, password=login.password)["token"]
        answer = first.ask("/v3/kv/range", token, key=base64.b64encode(key.encode()).decode())
        for found in answer.get("kvs", ()):
            return dict(json.loads(base64.b64decode(found["value"]))), int(found["mod_revision"])
        return None

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
