"""Sockets that a service manager passes: taken over where they can be listened on, else a sentence."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest

PASSED = """
import os, sys
for position, fd in enumerate(map(int, sys.argv[3:])):
    os.dup2(fd, 100 + position)
for position in range(len(sys.argv) - 3):
    os.dup2(100 + position, 3 + position)
os.environ.update(LISTEN_PID=sys.argv[1].replace("own", str(os.getpid())), LISTEN_FDS=sys.argv[2], LISTEN_FDNAMES="x")
from migrated.service.activation import ActivationError, inherited_socket
try:
    sock = inherited_socket()
except ActivationError as error:
    print(error)
else:
    print(sock and (sock.fileno(), sock.getsockname()[1], sock.get_inheritable()), "LISTEN_PID" in os.environ)
"""
"""Passes descriptors to itself from 3 on and says what becomes of them."""


def told(sockets: Sequence[socket.socket], *, pid: str = "own", count: str | None = None) -> str:
    fds = [sock.fileno() for sock in sockets]
    command = [sys.executable, "-c", PASSED, pid, str(len(fds)) if count is None else count, *map(str, fds)]
    done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_listening_socket_is_taken_and_children_do_not_get_it(family: socket.AddressFamily) -> None:
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    with socket.create_server(("", 0), family=family) as server:
        assert told([server]) == f"(3, {server.getsockname()[1]}, False) False"


def test_what_is_for_another_process_or_nothing_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert told([server], pid="1") == "None True"
        assert told([server], pid="") == "None True"
        assert told([server], count="0") == "None False"
        assert told([server], count="junk") == "None False"


def test_what_cannot_be_listened_on_is_a_sentence() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket() as deaf,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind("")
        local.listen()
        for passed in ([server, server], [deaf], [datagrams], [local]):
            assert told(passed).startswith(
                f"the service manager passed {len(passed)} sockets and not one listening TCP"
            )
        assert "LISTEN_FDS announces 5 sockets" in told([server], count="5")
