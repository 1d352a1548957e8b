"""The proxy does the harm that it is asked for, where it is asked for, and no other.

client --- preface, frames ---> proxy ---> server (records what arrives, answers what it is told to)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from protocol import messages
from protocol.frames import HEADER_BYTES
from protocol.messages import FrameType, Message
from protocol.versions import MAJOR, PREFACE_BYTES, pack_preface
from scripts.rig.faults import (
    AtByte,
    AtFrame,
    AtTime,
    Call,
    Corrupt,
    Cut,
    Delay,
    Duplicate,
    Reset,
    Stall,
    Throttle,
    Truncate,
    Way,
)
from scripts.rig.proxy import Proxy

TIMEOUT_S = 20.0
PREFACE = pack_preface(1 << 20)


def frame(message: Message, payload: bytes = b"", sequence: int = 0) -> bytes:
    return messages.frame_head(MAJOR, message, sequence, payload_bytes=len(payload)) + payload


COMMIT = frame(messages.Commit(epoch=3))
ABORT = frame(messages.Abort(epoch=3, reason="no"))
RECORD = frame(messages.Record(), bytes(range(256)) * 4096)


Accepted = asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
"""The server's ends of connections, as they are accepted."""


class Line:
    """A client's connection through the proxy, and the server's end of it."""

    def __init__(self, client: tuple[asyncio.StreamReader, asyncio.StreamWriter], server: Accepted) -> None:
        self.reader, self.writer = client
        self._server = server
        self.there: asyncio.StreamReader
        self.answer: asyncio.StreamWriter

    async def accepted(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            self.there, self.answer = await self._server.get()

    async def arrives(self, count: int) -> bytes:
        """The next bytes at the server."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.there.readexactly(count)

    async def returns(self, count: int) -> bytes:
        """The next bytes at the client."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.reader.readexactly(count)


class Exchange:
    """A server, a proxy in front of it, and lines through it."""

    def __init__(self, proxy: Proxy, accepted: Accepted) -> None:
        self.proxy = proxy
        self._accepted = accepted
        self.lines: list[Line] = []

    async def line(self) -> Line:
        line = Line(await asyncio.open_connection("127.0.0.1", self.proxy.port), self._accepted)
        self.lines.append(line)
        await line.accepted()
        return line

    async def opened(self) -> Line:
        """A line with both prefaces through."""
        line = await self.line()
        line.writer.write(PREFACE)
        line.answer.write(PREFACE)
        assert await line.arrives(PREFACE_BYTES) == await line.returns(PREFACE_BYTES) == PREFACE
        return line


@pytest.fixture
async def exchange() -> AsyncIterator[Exchange]:
    accepted: Accepted = asyncio.Queue()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accepted.put((reader, writer))

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    with Proxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        exchange = Exchange(proxy, accepted)
        yield exchange
        for line in exchange.lines:
            line.writer.close()
            line.answer.close()
    server.close()
    await server.wait_closed()


async def test_without_a_fault_every_byte_and_the_end_arrive_in_both_directions(exchange: Exchange) -> None:
    line = await exchange.opened()
    line.writer.write(COMMIT + RECORD + ABORT)
    assert await line.arrives(len(COMMIT + RECORD + ABORT)) == COMMIT + RECORD + ABORT
    line.answer.write(RECORD)
    assert await line.returns(len(RECORD)) == RECORD
    line.writer.write_eof()
    assert await line.there.read() == b""
    line.answer.write(COMMIT)
    line.answer.write_eof()
    assert await line.reader.read() == COMMIT
    assert [f for f, _ in exchange.proxy.seen] == [
        FrameType.COMMIT,
        FrameType.RECORD,
        FrameType.ABORT,
        FrameType.RECORD,
        FrameType.COMMIT,
    ]


async def test_a_cut_at_a_frame_swallows_it_and_all_that_follows_until_healed(exchange: Exchange) -> None:
    fault = exchange.proxy.arm(AtFrame(FrameType.COMMIT, 2), Cut())
    line = await exchange.opened()
    line.writer.write(COMMIT + ABORT)
    assert await line.arrives(len(COMMIT + ABORT)) == COMMIT + ABORT
    assert not fault.fired_at_ns
    line.writer.write(COMMIT + RECORD)
    assert await asyncio.to_thread(exchange.proxy.wait_fired, fault, TIMEOUT_S)
    line.answer.write(ABORT)
    exchange.proxy.heal()  # what lost bytes is reset, and nothing of the lost bytes ever came
    for reader in (line.there, line.reader):
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(TIMEOUT_S):
                await reader.read()
    again = await exchange.opened()
    again.writer.write(COMMIT)
    assert await again.arrives(len(COMMIT)) == COMMIT


async def test_a_cut_one_way_lets_the_other_way_through(exchange: Exchange) -> None:
    fault = exchange.proxy.arm(AtFrame(FrameType.COMMIT), Cut((Way.TO_DESTINATION,)))
    line = await exchange.opened()
    line.writer.write(COMMIT)
    assert await asyncio.to_thread(exchange.proxy.wait_fired, fault, TIMEOUT_S)
    line.answer.write(ABORT)
    assert await line.returns(len(ABORT)) == ABORT
    line.answer.write_eof()
    assert await line.reader.read() == b""


async def test_the_end_of_a_stream_does_not_come_through_a_cut(exchange: Exchange) -> None:
    line = await exchange.opened()
    exchange.proxy.now(Cut((Way.TO_DESTINATION,)))
    line.writer.write_eof()
    line.answer.write(RECORD)  # proof that the proxy had time to see the end
    assert await line.returns(len(RECORD)) == RECORD
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await line.there.read(1)


async def test_a_reset_reaches_both_ends(exchange: Exchange) -> None:
    exchange.proxy.arm(AtFrame(FrameType.ABORT), Reset())
    line = await exchange.opened()
    line.writer.write(COMMIT)
    assert await line.arrives(len(COMMIT)) == COMMIT
    line.writer.write(ABORT)
    for reader in (line.there, line.reader):
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(TIMEOUT_S):
                await reader.read()


async def test_a_stall_holds_everything_back_and_loses_nothing(exchange: Exchange) -> None:
    fault = exchange.proxy.arm(AtFrame(FrameType.COMMIT), Stall(0.3))
    line = await exchange.opened()
    line.writer.write(COMMIT + RECORD)
    assert await line.arrives(len(COMMIT + RECORD)) == COMMIT + RECORD
    assert time.monotonic_ns() - fault.fired_at_ns >= 0.3e9


async def test_a_delay_counts_in_one_direction_only(exchange: Exchange) -> None:
    exchange.proxy.now(Delay(0.25, Way.TO_SOURCE))
    line = await exchange.line()
    line.writer.write(PREFACE + COMMIT)
    begin = time.monotonic()
    assert await line.arrives(PREFACE_BYTES + len(COMMIT)) == PREFACE + COMMIT
    there_s = time.monotonic() - begin
    begin = time.monotonic()
    line.answer.write(PREFACE + ABORT)
    assert await line.returns(PREFACE_BYTES + len(ABORT)) == PREFACE + ABORT
    assert time.monotonic() - begin >= 0.25 > there_s


async def test_a_throttle_keeps_the_rate(exchange: Exchange) -> None:
    line = await exchange.opened()
    exchange.proxy.now(Throttle(4 << 20, Way.TO_DESTINATION))
    begin = time.monotonic()
    line.writer.write(RECORD + COMMIT)  # 1 MiB: a quarter of a second, but for its last piece
    assert await line.arrives(len(RECORD + COMMIT)) == RECORD + COMMIT
    assert time.monotonic() - begin >= 0.15


@pytest.mark.parametrize("offset", [5, HEADER_BYTES + 2, -1])
async def test_exactly_one_byte_is_corrupted(exchange: Exchange, offset: int) -> None:
    exchange.proxy.arm(AtFrame(FrameType.RECORD), Corrupt(offset))
    line = await exchange.opened()
    line.writer.write(COMMIT + RECORD + ABORT)
    sent = COMMIT + RECORD + ABORT
    got = await line.arrives(len(sent))
    place = len(COMMIT) + offset % len(RECORD)
    assert [i for i in range(len(sent)) if sent[i] != got[i]] == [place]


async def test_a_truncated_frame_ends_the_connection_at_both_ends(exchange: Exchange) -> None:
    exchange.proxy.arm(AtFrame(FrameType.RECORD), Truncate(100))
    line = await exchange.opened()
    line.writer.write(COMMIT + RECORD)
    async with asyncio.timeout(TIMEOUT_S):
        assert await line.there.read() == COMMIT + RECORD[:100]
        assert await line.reader.read() == b""


async def test_a_frame_is_duplicated_once(exchange: Exchange) -> None:
    exchange.proxy.arm(AtFrame(FrameType.COMMIT), Duplicate())
    line = await exchange.opened()
    line.writer.write(ABORT + COMMIT + COMMIT)
    sent = ABORT + COMMIT + COMMIT + COMMIT
    assert await line.arrives(len(sent)) == sent


async def test_a_byte_offset_counts_from_the_beginning_of_its_connection_and_direction(exchange: Exchange) -> None:
    offset = PREFACE_BYTES + len(COMMIT) + 7
    exchange.proxy.arm(AtByte(offset, Way.TO_DESTINATION, connection=1), Cut((Way.TO_DESTINATION,)))
    first, second = await exchange.opened(), await exchange.opened()
    for line in (first, second):
        line.writer.write(COMMIT + ABORT)
    assert await first.arrives(len(COMMIT + ABORT)) == COMMIT + ABORT
    assert await second.arrives(len(COMMIT) + 7) == COMMIT + ABORT[:7]
    exchange.proxy.heal()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await second.arrives(1)


async def test_something_is_done_before_a_frame_goes_on(exchange: Exchange) -> None:
    called: list[float] = []
    exchange.proxy.arm(AtFrame(FrameType.ABORT), Call(lambda: called.append(time.monotonic())))
    line = await exchange.opened()
    line.writer.write(COMMIT)
    await line.arrives(len(COMMIT))
    assert called == []
    line.writer.write(ABORT)
    assert await line.arrives(len(ABORT)) == ABORT
    assert len(called) == 1


async def test_a_time_counts_from_the_first_connection(exchange: Exchange) -> None:
    fault = exchange.proxy.arm(AtTime(0.2), Reset())
    begin_ns = time.monotonic_ns()
    line = await exchange.opened()
    with pytest.raises(ConnectionResetError):
        async with asyncio.timeout(TIMEOUT_S):
            await line.reader.read()
    assert fault.fired_at_ns - begin_ns >= 0.2e9


async def test_a_server_that_is_not_there_is_a_reset(exchange: Exchange) -> None:
    exchange.proxy.target = ("127.0.0.1", 1)

    async def read_from_it() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", exchange.proxy.port)
        try:
            await reader.read()
        finally:
            writer.close()

    # The reset may come while the connection is being opened, or after.
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(read_from_it(), TIMEOUT_S)


async def test_what_acts_on_a_frame_needs_one(exchange: Exchange) -> None:
    with pytest.raises(ValueError, match="AtFrame"):
        exchange.proxy.arm(AtTime(1.0), Duplicate())
