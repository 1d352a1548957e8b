"""The client that migratectl uses, against the real server and against what is not one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from migrated.control.client import CommandError, ControlClient, DaemonUnreachableError
from tests.tiny_vmm.hosts import TinyHost


@asynccontextmanager
async def listening(
    path: Path, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[None]:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(once, path)
    async with server:
        yield


async def test_commands_side_by_side_get_their_own_answers(
    daemon: TinyHost, control_socket: Path, silent_uri: str
) -> None:
    await daemon.add_guest("g1")
    async with await ControlClient.connect(control_socket) as client:
        begun = await client.command("migrate", {"uri": silent_uri})
        waiting = asyncio.create_task(client.command("x-migrated-wait", begun, oob=True))
        assert (await client.command("query-status"))["running"] is True
        assert not waiting.done()
        await client.command("migrate_cancel", oob=True)
        assert (await waiting)["outcome"] == "cancelled"


async def test_events_come_in_order(daemon: TinyHost, control_socket: Path) -> None:
    async with await ControlClient.connect(control_socket) as client:
        for number in range(3):
            daemon.operations.events.publish("MIGRATION_PASS", {"pass": number})
        events = client.events()
        assert [(await anext(events))["data"]["pass"] for _ in range(3)] == [0, 1, 2]
        await events.aclose()


async def test_an_error_reply_keeps_its_class(control_socket: Path) -> None:
    async with await ControlClient.connect(control_socket) as client:
        with pytest.raises(CommandError, match=r"^there is no guest 'g1' on this host; guests here: none$") as caught:
            await client.command("x-migrated-guest-show", {"guest": "g1"})
    assert caught.value.kind == "DeviceNotFound"


async def test_no_socket_there(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="there is no such socket; start the daemon"):
        await ControlClient.connect(tmp_path / "none.sock")


async def test_nobody_behind_the_socket(tmp_path: Path) -> None:
    async with listening(tmp_path / "x.sock", lambda _r, _w: asyncio.sleep(0)):
        pass
    if not (tmp_path / "x.sock").exists():  # asyncio removes it from 3.13 on
        pytest.skip("no stale socket is left behind here")
    with pytest.raises(DaemonUnreachableError, match="nobody listens there"):
        await ControlClient.connect(tmp_path / "x.sock")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may connect everywhere")
async def test_no_permission(control_socket: Path) -> None:
    control_socket.chmod(0)
    with pytest.raises(DaemonUnreachableError, match="permission denied"):
        await ControlClient.connect(control_socket)


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0\r\n", b'{"hello": 1}\r\n', b"[1]\n"])
async def test_something_else_behind_the_socket(tmp_path: Path, greeting: bytes) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)

    async with listening(tmp_path / "x.sock", serve):
        with pytest.raises(DaemonUnreachableError, match=r"not reachable at .*x\.sock: "):
            await ControlClient.connect(tmp_path / "x.sock")


async def test_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    silent = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await silent.wait()

    async with listening(tmp_path / "x.sock", serve):
        with pytest.raises(DaemonUnreachableError, match="it does not answer"):
            await ControlClient.connect(tmp_path / "x.sock", timeout=0.05)
        silent.set()


async def test_a_daemon_that_dies_fails_what_is_in_flight_and_what_comes_after(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {}}\r\n')
        await reader.readline()
        writer.write(b'{"return": {}, "id": 1}\r\n')
        await reader.readline()

    async with listening(tmp_path / "x.sock", serve), await ControlClient.connect(tmp_path / "x.sock") as client:
        for _ in range(2):
            with pytest.raises(DaemonUnreachableError, match="closed the connection before it answered"):
                await client.command("query-status")
        with pytest.raises(DaemonUnreachableError):
            await anext(client.events())
