"""The control socket over a real unix socket, driven byte by byte; what the commands do is in test_control_commands.

client                       server
  | <------- greeting ---------|
  |--- qmp_capabilities ------>|   nothing else before
  | <------- return -----------|
  |--- execute (8 at most) --->|   answered in order
  |--- exec-oob -------------->|   answered at once
  | <------- events -----------|
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import structlog

from migrated.control.framing import MAX_REQUEST_BYTES
from migrated.control.operations import EVENTS_KEPT, EVENTS_LOST
from migrated.control.server import MAX_CLIENTS, MAX_IN_FLIGHT, ControlServer, ControlSocketError
from tests.migrated.control_sockets import TIMEOUT_S, connected, error
from tests.tiny_vmm.hosts import TinyHost, standing_still


async def test_the_greeting_is_qmps(control_socket: Path) -> None:
    async with connected(control_socket, negotiate=False) as client:
        assert await client.receive() == {
            "QMP": {
                "version": {"qemu": {"micro": 0, "minor": 1, "major": 0}, "package": "migrated 0.1.0"},
                "capabilities": ["oob"],
            }
        }


async def test_nothing_but_the_negotiation_works_before_it(daemon: TinyHost, control_socket: Path) -> None:
    async with connected(control_socket, negotiate=False) as client:
        await client.receive()
        expecting = error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        assert await client.ask("query-status", id=7) == expecting | {"id": 7}
        daemon.operations.events.publish("STOP", {"guest": "unseen"})
        unavailable = error("GenericError", "Capability lasers not available")
        assert await client.ask("qmp_capabilities", {"enable": ["lasers"]}) == unavailable
        assert "is unexpected" in (await client.ask("qmp_capabilities", {"disable": []}))["error"]["desc"]
        assert await client.ask("qmp_capabilities") == {"return": {}}
        again = error("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
        assert await client.ask("qmp_capabilities") == again
        client.send({"execute": "query-commands"})
        first = await client.receive()
        assert "return" in first, "an event from before the negotiation came through"


async def test_negotiation_and_commands_may_be_sent_in_one_go(control_socket: Path) -> None:
    async with connected(control_socket, negotiate=False) as client:
        client.send(
            b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}{"exec-oob":"migrate_cancel","id":1}'
            b'{"execute":"query-commands","id":2}'
        )
        await client.receive()
        assert await client.receive() == {"return": {}}
        replies = {(reply := await client.receive())["id"]: reply for _ in range(2)}
        assert replies[1] == {"return": {}, "id": 1}
        assert {"name": "migrate"} in replies[2]["return"]


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"[1]", error("GenericError", "QMP input must be a JSON object")),
        (b"{}", error("GenericError", "QMP input lacks member 'execute'")),
        (
            b'{"execute": "stop", "extra": 1, "id": "a"}',
            error("GenericError", "QMP input member 'extra' is unexpected") | {"id": "a"},
        ),
        (b'{"exec-oob": "migrate_cancel"}', error("GenericError", "QMP input member 'exec-oob' is unexpected")),
        (b'{"execute": 5}', error("GenericError", "QMP input member 'execute' must be a string")),
        (
            b'{"execute": "stop", "arguments": []}',
            error("GenericError", "QMP input member 'arguments' must be an object"),
        ),
        (
            b'{"execute": "fly", "id": null}',
            error("CommandNotFound", "The command fly has not been found") | {"id": None},
        ),
        (b'{"execute": "stop", "arguments": {"x": 1}}', error("GenericError", "Parameter 'x' is unexpected")),
    ],
)
async def test_a_malformed_request_gets_qemus_sentence(control_socket: Path, request_: bytes, reply: Any) -> None:
    async with connected(control_socket) as client:
        client.send(request_)
        assert await client.reply() == reply


async def test_text_that_is_not_json_is_answered_and_the_next_request_works(control_socket: Path) -> None:
    async with connected(control_socket) as client:
        for text in (b'{"execute": nope}', b"hello\n", b'{"execute": "stop\x1b'):
            client.send(text)
            reply = await client.reply()
            assert reply["error"]["desc"].startswith("JSON parse error, ")
            assert "id" not in reply
        assert "return" in await client.ask("query-commands")


async def test_a_request_beyond_the_cap_ends_the_connection_with_the_reason(control_socket: Path) -> None:
    async with connected(control_socket) as client:
        client.send(b'{"execute": "' + b"x" * MAX_REQUEST_BYTES)
        assert (await client.reply())["error"]["desc"] == f"QMP input is larger than {MAX_REQUEST_BYTES} bytes"
        assert await client.closed() == b""


@pytest.mark.parametrize("identity", [7, "seven", None, {"a": [1, {}]}, [], 1.5, True])
async def test_the_id_comes_back_as_it_was(control_socket: Path, identity: Any) -> None:
    async with connected(control_socket) as client:
        assert (await client.ask("query-commands", id=identity))["id"] == identity
        assert (await client.ask("no-such-thing", id=identity))["id"] == identity


async def test_an_operations_error_keeps_its_class_and_sentence(daemon: TinyHost, control_socket: Path) -> None:
    async with connected(control_socket) as client:
        reply = await client.ask("x-migrated-guest-show", {"guest": "g1"})
        assert reply == error("DeviceNotFound", "there is no guest 'g1' on this host; guests here: none")
        assert (await client.ask("x-migrated-show", {"migration-id": "zz"}))["error"]["class"] == "DeviceNotFound"
        await daemon.add_guest("g1")
        reply = await client.ask("migrate", {"uri": "exec:/x"})
        assert reply["error"]["class"] == "GenericError"
        assert "tcp:HOST:PORT" in reply["error"]["desc"]


async def test_a_command_that_fails_unexpectedly_answers_and_the_next_one_works(
    daemon: TinyHost, control_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def beyond_json() -> list[dict[str, Any]]:
        return [{"name": "g1", "state": float("nan")}]

    monkeypatch.setattr(daemon.operations, "guest_list", beyond_json)
    async with connected(control_socket) as client:
        with structlog.testing.capture_logs() as logs:
            reply = await client.ask("x-migrated-guest-list")
        assert "failed at x-migrated-guest-list" in reply["error"]["desc"]
        assert logs[0]["log_level"] == "error"
        assert "return" in await client.ask("query-commands")
    monkeypatch.undo()


async def test_changing_commands_are_logged_with_who_called(daemon: TinyHost, control_socket: Path) -> None:
    await daemon.add_guest("g1")
    async with connected(control_socket) as client:
        with structlog.testing.capture_logs() as logs:
            await client.ask("query-status")
            await client.ask("stop", {"guest": "g1"})
    assert [(line["event"], line["guest"], line["uid"], line["pid"]) for line in logs] == [
        ("Control command stop", "g1", os.getuid(), os.getpid())
    ]


async def test_events_reach_every_negotiated_client_in_order_with_a_timestamp(
    daemon: TinyHost, control_socket: Path
) -> None:
    async with (
        connected(control_socket) as one,
        connected(control_socket) as two,
        connected(control_socket, negotiate=False) as mute,
    ):
        await mute.receive()
        for number in (1, 2, 3):
            daemon.operations.events.publish("MIGRATION_PASS", {"pass": number})
        daemon.operations.events.publish("STOP")
        for client in (one, two):
            got = [await client.receive() for _ in range(4)]
            assert [event.get("data", {}).get("pass") for event in got] == [1, 2, 3, None]
            assert "data" not in got[3]
            assert set(got[0]["timestamp"]) == {"seconds", "microseconds"}
        mute.send({"execute": "query-status"})
        assert "error" in await mute.receive()


async def test_oob_jumps_the_queue_and_only_where_allowed(daemon: TinyHost, control_socket: Path) -> None:
    pid = await daemon.add_guest("g1")
    async with connected(control_socket, oob=True) as client:
        with standing_still(pid):
            client.send({"execute": "stop", "id": "slow"})
            client.send({"execute": "query-commands", "id": "queued"})
            client.send({"exec-oob": "migrate_cancel", "id": "cancel"})
            assert (await client.reply())["id"] == "cancel"
            client.send({"exec-oob": "stop", "id": "no"})
            refused = await client.reply()
            assert (refused["id"], refused["error"]["desc"]) == ("no", "The command stop does not support OOB")
        assert [(await client.reply())["id"] for _ in range(2)] == ["slow", "queued"]


async def test_waiting_out_of_band_leaves_the_connection_usable(
    daemon: TinyHost, control_socket: Path, silent_uri: str
) -> None:
    await daemon.add_guest("g1")
    async with connected(control_socket, oob=True) as client:
        begun = (await client.ask("migrate", {"uri": silent_uri}))["return"]
        for number in range(MAX_IN_FLIGHT + 1):
            client.send({"exec-oob": "x-migrated-wait", "arguments": begun, "id": number})
        refused = await client.reply()
        assert (refused["id"], refused["error"]["desc"]) == (
            MAX_IN_FLIGHT,
            "Too many out-of-band commands are in flight",
        )
        client.send({"execute": "migrate_cancel", "id": "cancel"})
        replies = [await client.reply() for _ in range(MAX_IN_FLIGHT + 1)]
        outcomes = {reply["id"]: reply["return"].get("outcome") for reply in replies}
        assert outcomes == {"cancel": None} | dict.fromkeys(range(MAX_IN_FLIGHT), "cancelled")


async def test_at_most_eight_commands_are_taken_and_then_reading_stops(daemon: TinyHost, control_socket: Path) -> None:
    pid = await daemon.add_guest("g1")
    async with connected(control_socket, oob=True) as client:
        with standing_still(pid):
            for number in range(MAX_IN_FLIGHT + 2):
                client.send({"execute": "stop", "id": number})
            client.send({"exec-oob": "migrate_cancel", "id": "behind"})
            daemon.operations.events.publish("MARK")
            assert (await client.receive())["event"] == "MARK"  # the cancel stands behind what is not read yet
        replies = [(await client.reply())["id"] for _ in range(MAX_IN_FLIGHT + 3)]
        assert [reply for reply in replies if reply != "behind"] == list(range(MAX_IN_FLIGHT + 2))
        assert "behind" in replies


async def test_one_client_that_does_not_read_holds_up_nobody(daemon: TinyHost, control_socket: Path) -> None:
    """It loses its oldest events and is told how many; a client beside it gets every one."""
    await daemon.add_guest("g1")
    many = EVENTS_KEPT * 4
    async with connected(control_socket) as deaf, connected(control_socket) as other:
        transport: Any = deaf.writer.transport
        transport.pause_reading()
        heard = 0
        for number in range(many):
            daemon.operations.events.publish("MIGRATION_PASS", {"pass": number, "padding": "x" * 1000})
            if number % 256 == 255:
                for _ in range(256):
                    assert (await other.receive())["data"]["pass"] == heard
                    heard += 1
                assert "return" in await other.ask("query-status")
        transport.resume_reading()
        seen: list[Any] = []
        while len(seen) < 1 or seen[-1]["data"].get("pass") != many - 1:
            seen.append(await deaf.receive())
        lost = [event["data"]["count"] for event in seen if event["event"] == EVENTS_LOST]
        passes = [event["data"]["pass"] for event in seen if event["event"] != EVENTS_LOST]
        assert sum(lost) + len(passes) == many
        assert sum(lost) > 0
        assert passes == sorted(passes)
        assert "return" in await deaf.ask("query-commands")


async def test_a_client_that_goes_away_does_not_undo_what_it_began(daemon: TinyHost, control_socket: Path) -> None:
    pid = await daemon.add_guest("g1")
    async with connected(control_socket) as other:
        with standing_still(pid):
            async with connected(control_socket) as client:
                client.send({"execute": "stop", "arguments": {"guest": "g1"}})
                await other.ask("query-commands")
                client.writer.transport.abort()
        assert (await asyncio.wait_for(other.receive(), TIMEOUT_S))["event"] == "STOP"
        assert await daemon.state_of("g1") == "paused"


async def test_what_was_sent_before_the_client_hung_up_its_half_is_answered(control_socket: Path) -> None:
    async with connected(control_socket, negotiate=False) as client:
        client.send(b'{"execute":"qmp_capabilities"}{"execute":"query-commands","id":1}{"execute":')
        client.writer.write_eof()
        lines = (await client.closed()).splitlines()
        assert [next(iter(json.loads(line))) for line in lines] == ["QMP", "return", "return", "error"]


async def test_quit_is_answered_and_closing_ends_waiting_commands(
    daemon: TinyHost, short_directory: Path, silent_uri: str
) -> None:
    await daemon.add_guest("g1")
    path = short_directory / "own.sock"
    server = ControlServer(daemon.operations, path)
    await server.start()
    async with connected(path) as client, connected(path) as waiting:
        begun = (await client.ask("migrate", {"uri": silent_uri}))["return"]
        waiting.send({"execute": "x-migrated-wait", "arguments": begun, "id": 9})
        assert (await client.ask("quit"))["return"] == {}
        assert daemon.operations.stopping.is_set()
        await server.close()
        told = await waiting.reply()
        assert told["id"] == 9
        assert "is stopping" in told["error"]["desc"]
        assert await waiting.closed() == b""
    assert not path.exists()


async def test_clients_beyond_the_cap_are_told_so(control_socket: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(control_socket)) for _ in range(MAX_CLIENTS)]
        async with connected(control_socket, negotiate=False) as late:
            assert "already" in (await late.receive())["error"]["desc"]
            assert await late.closed() == b""
        assert "return" in await clients[-1].ask("query-commands")


async def test_the_socket_is_for_user_and_group_only(control_socket: Path) -> None:
    assert stat.S_IMODE(control_socket.stat().st_mode) == 0o660


async def test_a_live_daemons_path_cannot_be_taken(daemon: TinyHost, control_socket: Path) -> None:
    thief = ControlServer(daemon.operations, control_socket)
    with pytest.raises(ControlSocketError, match=f"pid {os.getpid()}"):
        await thief.start()
    await thief.close()
    async with connected(control_socket) as client:
        assert "return" in await client.ask("query-commands")


async def test_a_stale_socket_is_replaced_and_another_file_is_not(daemon: TinyHost, tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ControlServer(daemon.operations, path)
    await server.start()
    async with connected(path) as client:
        assert "return" in await client.ask("query-commands")
    await server.close()
    await server.close()
    path.write_text("precious")
    with pytest.raises(ControlSocketError, match="is not a socket"):
        await ControlServer(daemon.operations, path).start()
    assert path.read_text() == "precious"


async def test_a_path_that_cannot_be_created_is_a_sentence(daemon: TinyHost, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.sock", tmp_path / ("x" * 120)):
        with pytest.raises(ControlSocketError, match=r"cannot be created: [^N].*; check the directory"):
            await ControlServer(daemon.operations, path).start()
