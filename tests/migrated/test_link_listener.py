"""The listener over real TCP without TLS: first frames, whole, in pieces and damaged, and the places of connections.

a plain socket ---- real TCP on loopback ---- Listener -> what came first
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from migrated.base.errors import LinkLostError
from migrated.link import sockets
from migrated.link.listener import Listener, bind
from migrated.link.security import THIS_HOST
from migrated.link.sockets import Connection
from migrated.settings.config import Address, LimitsConfig
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import MAX_PAYLOAD_BYTES, FrameParser
from protocol.messages import Message
from protocol.versions import MAJOR, PREFACE_BYTES, pack_preface
from scripts.rig.waiting import until
from tests.migrated.listeners import ASK, PLAIN, WAIT_S, Server, listening, refusal

JOIN = messages.Join(migration_id="1" * 32, token=bytes(16), channel=3)
PREFACE = pack_preface(MAX_PAYLOAD_BYTES)


def first(message: Message, sequence: int = 0, payload: bytes = b"") -> bytes:
    """A first frame."""
    return messages.frame_head(MAJOR, message, sequence, payload_bytes=len(payload)) + payload


@dataclass
class Caller:
    """A connection to a listener, in the hands of the test."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def told(self) -> Message | None:
        """The one message that the listener sends before it hangs up, None when it says nothing."""
        data = await asyncio.wait_for(self.reader.read(), WAIT_S)
        found = list(FrameParser(MAJOR).receive(data[PREFACE_BYTES:]))
        assert len(found) <= 1
        return messages.decode(found[0].type, found[0].meta) if found else None


@contextlib.asynccontextmanager
async def calling(port: int, data: bytes = b"", address: str = "127.0.0.1") -> AsyncIterator[Caller]:
    """Connect from an address of the loopback network, and send some bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    writer.write(data)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def handed_over(server: Server) -> tuple[Message, Connection]:
    return await asyncio.wait_for(server.taken.get(), WAIT_S)


async def until_held(server: Server, count: int) -> None:
    """Wait until the listener holds so many connections."""

    async def held() -> bool:
        return server.listener.connections == count

    await until(f"{count} connections are held", held, WAIT_S)


@pytest.mark.parametrize("message", [ASK, JOIN], ids=lambda message: message.TYPE.name)
async def test_a_connection_is_handed_over_with_its_first_message_and_not_a_byte_more(message: Message) -> None:
    async with listening(PLAIN) as server, calling(server.port, PREFACE + first(message) + b"and more") as caller:
        taken, connection = await handed_over(server)
        assert taken == message
        assert await asyncio.wait_for(connection.wire.read_exactly(8), WAIT_S) == b"and more"
        assert await caller.reader.readexactly(PREFACE_BYTES) == PREFACE
        connection.wire.close()


async def test_a_first_message_may_come_byte_by_byte() -> None:
    async with listening(PLAIN) as server, calling(server.port) as caller:
        caller.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in PREFACE + first(ASK):
            caller.writer.write(bytes([byte]))
            await caller.writer.drain()
            assert server.taken.empty()
        taken, connection = await handed_over(server)
        assert taken == ASK
        connection.wire.close()


DAMAGE = {
    "another protocol": (b"GET / HTTP/1.1\r\n\r\n" + bytes(64), None),
    "no frame behind the preface": (PREFACE + bytes(64), "the stream does not continue with a frame"),
    "a second frame first": (PREFACE + first(ASK, sequence=1), "the first frame of a connection has number 1"),
    "a payload": (PREFACE + first(ASK, payload=bytes(8)), "payload"),
    "a damaged meta": (PREFACE + bytes([*first(ASK)[:-1], first(ASK)[-1] ^ 1]), "the checksum of its meta"),
}


@pytest.mark.parametrize(("sent", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
async def test_damage_in_the_opening_is_refused_and_the_peer_is_told(sent: bytes, reason: str | None) -> None:
    async with listening(PLAIN) as server, calling(server.port, sent) as caller:
        assert await refusal(server) == "protocol"
        said = await caller.told()
        if reason is None:  # its version is not known, so nothing that it could read can be said
            assert said is None
        else:
            assert isinstance(said, messages.Error)
            assert reason in said.text
        assert server.taken.empty()
        caller.writer.close()
        await until_held(server, 0)


async def test_a_peer_that_hangs_up_early_is_no_refusal_and_frees_its_place() -> None:
    async with listening(PLAIN) as server:
        for sent in (b"", PREFACE, PREFACE + first(ASK)[:-1]):
            async with calling(server.port, sent):
                await until_held(server, 1)
            await until_held(server, 0)
        assert server.refused.empty()
        assert server.taken.empty()


async def test_what_the_handler_does_not_take_is_told_and_frees_its_place() -> None:
    refused: asyncio.Queue[str] = asyncio.Queue()

    async def handler(_first: Message, _connection: Connection) -> None:
        raise RemoteProtocolError("this token was used before", ErrorCode.AUTH)

    listener = Listener(handler, LimitsConfig(), PLAIN, refused.put_nowait)
    listener.start(bind(Address("127.0.0.1", 0)))
    assert listener.address is not None
    async with calling(listener.address.port, PREFACE + first(JOIN)) as caller:
        said = await caller.told()
        assert said == messages.Error(code=int(ErrorCode.AUTH), text="this token was used before")
        assert refused.get_nowait() == "protocol"
    await listener.stop()
    assert listener.connections == 0


async def test_a_host_without_a_place_says_so_until_one_is_free() -> None:
    """Eight places in all; no address has more than it may."""
    async with listening(PLAIN, max_connections=8) as server, contextlib.AsyncExitStack() as callers:
        held: list[Connection] = []
        for number in range(8):
            caller = calling(server.port, PREFACE + first(ASK), f"127.0.0.{number + 1}")
            await callers.enter_async_context(caller)
            held.append((await handed_over(server))[1])
        async with calling(server.port, address="127.0.0.9") as late:
            said = await late.told()
            assert isinstance(said, messages.Error)
            assert said.code == ErrorCode.BUSY
            assert "this host takes no more connections: there are 8" in said.text
            assert await refusal(server) == "full"
        held.pop().wire.close()
        async with calling(server.port, PREFACE + first(JOIN), "127.0.0.9"):
            taken, connection = await handed_over(server)
            assert taken == JOIN
            connection.wire.close()
        for one in held:
            one.wire.close()
        assert server.listener.connections == 0


async def test_strangers_of_one_address_do_not_push_out_those_of_another() -> None:
    limits: dict[str, Any] = {"max_handshakes": 4, "max_handshakes_per_address": 2}
    async with listening(PLAIN, **limits) as server, contextlib.AsyncExitStack() as callers:
        honest = await callers.enter_async_context(calling(server.port))
        await until_held(server, 1)
        flood = [await callers.enter_async_context(calling(server.port, address="127.0.0.2")) for _ in range(6)]
        for _ in range(4):
            assert await refusal(server) == "slow"
        for pushed_out in flood[:4]:
            assert await pushed_out.told() is None
        await until_held(server, 3)
        honest.writer.write(PREFACE + first(ASK))
        taken, connection = await handed_over(server)
        assert taken == ASK
        assert connection.wire.peer.startswith("127.0.0.1:")
        connection.wire.close()


async def test_a_connection_that_comes_as_the_listener_stops_keeps_no_place() -> None:
    for turns in range(8):  # of the event loop between the connection and the stop
        async with listening(PLAIN) as server:
            with socket.create_connection(("127.0.0.1", server.port)):
                for _ in range(turns):
                    await asyncio.sleep(0)
                await server.listener.stop()
                await asyncio.sleep(0)
                assert server.listener.connections == 0, turns


@pytest.mark.parametrize("resets", [1, 4, 5])
async def test_a_connection_that_is_reset_is_tried_again_a_few_times(resets: int) -> None:
    """A crowd of strangers may push an honest connection out before it has told what it is."""
    came = 0

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        came += 1
        if came <= resets:
            writer.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
            return
        writer.write(PREFACE)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        if resets == 5:
            with pytest.raises(LinkLostError, match="cannot be reached: Connection reset by peer"):
                await sockets.connect(address, WAIT_S, 5.0, PLAIN)
        else:
            connection = await sockets.connect(address, WAIT_S, 5.0, PLAIN)
            assert connection.agreed.version == MAJOR
            connection.wire.close()
    assert came == min(resets + 1, 5)


async def test_descriptors_come_with_a_first_frame_over_a_unix_socket(short_directory: Path) -> None:
    server, path = Server(PLAIN), short_directory / "listen.sock"
    server.listener.start_unix(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="in use"):
        Server(PLAIN).listener.start_unix(path)
    connection = await sockets.connect(path, WAIT_S, 5.0, PLAIN)
    reading, writing = os.pipe()
    connection.wire.send_with_descriptors(first(ASK), [writing])
    os.close(writing)
    asked, accepted = await asyncio.wait_for(server.taken.get(), WAIT_S)
    assert (asked, accepted.wire.names, len(accepted.wire.descriptors)) == (ASK, THIS_HOST, 1)
    os.write(accepted.wire.descriptors[0], b"through")
    assert os.read(reading, 7) == b"through"
    accepted.wire.close()
    assert os.read(reading, 1) == b""  # the last descriptor for writing went with the connection
    os.close(reading)
    connection.wire.close()
    await server.listener.stop()
    assert not path.exists()
