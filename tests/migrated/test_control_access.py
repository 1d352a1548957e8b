"""Who may use the control socket and for what, by what the kernel says of each client; and what no client may do to the
others, whoever it is."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from migrated.control.access import Access, AccessError, Peer
from migrated.control.client import CommandError, ControlClient
from migrated.control.server import MAX_CLIENTS, MAX_READERS
from tests.tiny_vmm.hosts import TinyHost

OPERATORS, READERS, NOBODY = 54321, 54322, 65534
ANSWER_S = 20.0

CLIENT = """
import json, os, socket, sys
user, groups = int(sys.argv[2]), json.loads(sys.argv[3])
os.setgroups(groups)
os.setgid(user)
os.setuid(user)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
stream = connection.makefile("rw", newline="")
print(stream.readline().strip())
for command in sys.argv[4:]:
    stream.write(json.dumps({"execute": command}) + "\\n")
    stream.flush()
    print(stream.readline().strip())
"""

CROWD = """
import os, socket, sys
user, group = int(sys.argv[2]), int(sys.argv[3])
os.setgroups([group])
os.setgid(user)
os.setuid(user)
crowd = []
for _ in range(int(sys.argv[4])):
    crowd.append(socket.socket(socket.AF_UNIX))
    crowd[-1].connect(sys.argv[1])
    said = crowd[-1].makefile().readline()
print(said.strip(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
async def guarded(short_directory: Path) -> AsyncIterator[TinyHost]:
    """A host with a group that may do everything and one that may look."""
    async with TinyHost(short_directory / "a", Access(str(OPERATORS), str(READERS))) as host:
        (short_directory / "a").chmod(0o755)
        yield host


async def ask_as(path: Path, groups: list[int], *commands: str) -> list[dict[str, Any]]:
    """What the server says to a process of an unprivileged user with these groups, line by line."""
    arguments = [sys.executable, "-c", CLIENT, str(path), str(NOBODY), json.dumps(groups), *commands]
    ran = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines() if line]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
class TestGroups:
    """Clients are real processes that became another user before they connected."""

    async def test_who_is_in_no_group_is_told_so_and_hung_up_on(self, guarded: TinyHost) -> None:
        (told,) = await ask_as(guarded.socket, [])
        assert "Access denied: user 65534 is in no group" in told["error"]["desc"]

    async def test_a_reader_may_look_and_is_refused_the_rest(self, guarded: TinyHost) -> None:
        await guarded.add_guest("g1")
        commands = (
            "qmp_capabilities",
            "x-migrated-guest-list",
            "stop",
            "quit",
            "x-migrated-estimate",
            "x-migrated-guest-verify",
        )
        _, _, listed, *refused = await ask_as(guarded.socket, [READERS], *commands)
        assert [guest["name"] for guest in listed["return"]] == ["g1"]
        assert all("is for operators" in reply["error"]["desc"] for reply in refused)
        assert not guarded.operations.stopping.is_set()

    async def test_readers_leave_places_to_operators(self, guarded: TinyHost) -> None:
        """Whoever may only look could keep everybody else out by connecting often enough."""
        arguments = [sys.executable, "-c", CROWD, str(guarded.socket), str(NOBODY), str(READERS), str(MAX_CLIENTS)]
        crowd = await asyncio.create_subprocess_exec(
            *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert crowd.stdout is not None
            said = json.loads(await asyncio.wait_for(crowd.stdout.readline(), ANSWER_S))
            assert f"{MAX_READERS} clients that may only look" in said["error"]["desc"]
            async with await ControlClient.connect(guarded.socket) as client:
                assert await client.command("x-migrated-guest-list") == []
        finally:
            await crowd.communicate(b"")  # its end of input

    async def test_an_operator_may_do_everything(self, guarded: TinyHost) -> None:
        *_, reply = await ask_as(guarded.socket, [READERS, OPERATORS], "qmp_capabilities", "quit")
        assert reply == {"return": {}}
        assert guarded.operations.stopping.is_set()

    async def test_the_daemons_own_user_needs_no_group(self, guarded: TinyHost) -> None:
        async with await ControlClient.connect(guarded.socket) as client:
            assert await client.command("x-migrated-guest-list") == []


def test_without_groups_whoever_can_open_the_socket_may_do_everything() -> None:
    assert Access().right_of(None) == "everything"


def test_a_client_of_which_the_kernel_says_nothing_may_do_nothing() -> None:
    access = Access(operators=str(OPERATORS))
    assert access.right_of(None) == "nothing"
    assert access.right_of(Peer(1, NOBODY, frozenset({READERS}))) == "nothing"
    assert access.right_of(Peer(1, NOBODY, frozenset({OPERATORS}))) == "everything"


def test_a_group_that_does_not_exist_is_a_sentence() -> None:
    with pytest.raises(AccessError, match=r"\[control\] readers names the group 'no-such-group', which does not exist"):
        Access(readers="no-such-group")


async def test_a_number_that_no_reply_can_hold_costs_no_place(control_socket: Path) -> None:
    """An id of 1e999 was read as infinity, which the reply cannot hold: the client was served by nobody for ever."""
    for _ in range(MAX_CLIENTS + 1):
        reader, writer = await asyncio.open_unix_connection(control_socket)
        writer.write(b'{"execute": "qmp_capabilities"} {"execute": "query-commands", "id": 1e999}')
        writer.write_eof()
        replies = (await asyncio.wait_for(reader.read(), ANSWER_S)).splitlines()
        assert "number 1e999 is out of range" in json.loads(replies[-1])["error"]["desc"]
        writer.close()
        await writer.wait_closed()
    async with await ControlClient.connect(control_socket) as client:
        assert await client.command("query-version")


@pytest.mark.parametrize("name", ["a\\ud800b", "a\\u0000b"])
async def test_what_is_no_text_is_refused_with_a_sentence(control_socket: Path, name: str) -> None:
    reader, writer = await asyncio.open_unix_connection(control_socket)
    writer.write(b'{"execute": "qmp_capabilities"}')
    writer.write(b'{"execute": "x-migrated-guest-show", "arguments": {"guest": "%s"}}' % name.encode())
    writer.write_eof()
    replies = (await asyncio.wait_for(reader.read(), ANSWER_S)).splitlines()
    assert json.loads(replies[-1])["error"]["desc"] == "Parameter 'guest' holds a character that no text has"
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_floods_leaves_the_others_their_turn(control_socket: Path) -> None:
    """The flood is read as fast as it is answered, and another client is answered in the middle of it."""
    flood = 20_000
    reader, writer = await asyncio.open_unix_connection(control_socket, limit=1 << 24)
    answered = 0

    async def count() -> None:
        nonlocal answered
        while answered < flood:
            await reader.readline()
            answered += 1

    writer.write(b'{"execute": "qmp_capabilities"}' + b"[] " * flood)
    counting = asyncio.create_task(count())
    async with await ControlClient.connect(control_socket) as client:
        for _ in range(3):
            await asyncio.wait_for(client.command("query-version"), ANSWER_S)
        assert answered < flood
    await asyncio.wait_for(counting, 60)
    writer.close()
    await writer.wait_closed()


async def test_a_full_disk_is_a_sentence_and_no_traceback(
    daemon: TinyHost, control_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_space(_spec: object) -> dict[str, Any]:
        raise OSError(28, "No space left on device", "/run/guests/g1.log")

    monkeypatch.setattr(daemon.operations, "guest_create", no_space)
    async with await ControlClient.connect(control_socket) as client:
        with pytest.raises(CommandError, match=r"No space left on device at /run/guests/g1\.log; look at disk space"):
            await client.command("x-migrated-guest-create", {"guest": "g1", "memory-bytes": 1 << 24})


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        (
            "x-migrated-replace",
            {"guest": "g1", "vmm": ["vmm\0sim"]},
            "Parameter 'vmm' holds a character that no text has",
        ),
        ("migrate", {"uri": "\ud800"}, "Parameter 'uri' holds a character that no text has"),
        (
            "migrate",
            {"channels": [{"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": "/\0"}}]},
            "Parameter 'channels' holds a character that no text has",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": [], "state": True}]},
            "Invalid parameter type for 'capability', expected: string",
        ),
        ("x-migrated-history-stats", {"last": (1 << 64) - 1}, "Parameter 'last' must be less than"),
    ],
)
async def test_an_argument_that_nothing_can_be_done_with_is_no_fault_of_the_daemon(
    control_socket: Path, command: str, arguments: dict[str, Any], sentence: str
) -> None:
    async with await ControlClient.connect(control_socket) as client:
        with pytest.raises(CommandError) as refusal:
            await client.command(command, arguments)
    assert str(refusal.value).startswith(sentence)
