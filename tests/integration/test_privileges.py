"""A daemon that is started as root and goes on as a user: what it has then, what it lacks, and that it migrates.

root: log, [listen] address, directories | user nobody: certificates, journal, guests, migrations
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.kernel.privileges import NUMBERS
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.reachable import COMMAND
from scripts.rig.waiting import RigError

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
    pytest.mark.asyncio(loop_scope="module"),
]
USER = pwd.getpwnam("nobody")


class LeavingRoot(Host):
    """A host whose user can reach the interpreter."""

    def __init__(self, *arguments: Any, **sections: Any) -> None:
        super().__init__(*arguments, **sections)
        self._enter = list(COMMAND)


class LeavingRootPair(Pair):
    """Two of them."""

    host_type = LeavingRoot


def privileged_port() -> int:
    """A port that only root can bind."""
    for port in range(1023, 512, -1):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RigError("all ports below 1024 are taken")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = LeavingRootPair(process={"user": USER.pw_name})
    pair.directory.chmod(0o711)
    for host in pair.hosts:
        os.chown(host.directory, USER.pw_uid, USER.pw_gid)
    # What is missing below a directory of root's is made for the user.
    pair.a.configure(vmm={"directory": str(pair.directory / "vmms" / "guests")})
    pair.b.port = privileged_port()
    with pair:
        yield pair


def statuses(pid: int) -> Iterator[dict[str, str]]:
    """What the kernel says of each thread of a process."""
    for path in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        yield {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def test_it_migrates_and_has_no_more_than_it_needs(pair: Pair) -> None:
    created = await pair.a.create_guest("g1", 32, workload="hot-cold")
    record = await pair.a.migrate("g1", pair.b)
    assert record["outcome"] == "completed", record["reason"]
    assert record["ram"]["dirty_tracking"] == "pagemap-scan"
    assert (await pair.b.verify("g1"))["ok"]
    assert 0 < pair.b.port < 1024
    nice = 1 << NUMBERS["CAP_SYS_NICE"]
    for host in pair.hosts:
        for status in statuses(host.pid):
            assert status["Uid"].split() == [str(USER.pw_uid)] * 4
            assert status["Gid"].split() == [str(USER.pw_gid)] * 4
            assert int(status["CapEff"], 16) in (0, nice)
            assert int(status["CapPrm"], 16) in (0, nice)
            assert status["CapAmb"] == status["CapInh"] == "0" * 16
        main = next(iter(s for s in statuses(host.pid) if s["Pid"] == str(host.pid)))
        assert int(main["CapBnd"], 16) == int(main["CapPrm"], 16) == nice
        assert main["NoNewPrivs"] == "1"
    guest = (await pair.b.guests())["g1"]
    assert guest["pid"] != created["pid"]
    for status in statuses(guest["pid"]):
        assert status["Uid"].split() == [str(USER.pw_uid)] * 4
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
