"""The control channel over real TCP: silence, damage, a peer that does not read, and what each side is told.

ControlChannel ---- real TCP on loopback ---- a plain socket, or a second ControlChannel
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from migrated.base.clock import HostClock
from migrated.base.errors import LinkLostError
from migrated.link.control import ControlChannel
from migrated.link.sockets import OUR_MAX_PAYLOAD_BYTES, Agreed, Connection, Wire
from protocol import messages
from protocol.frames import FrameParser
from protocol.messages import Message
from protocol.versions import MAJOR

WAIT_S = 60.0
LONG_S = 600.0
"""A heartbeat that no test hears."""
DONE = messages.RoundDone(round=1, bytes=2, digest=3)
MIB = 1 << 20


def frame(message: Message, sequence: int, payload: bytes = b"") -> bytes:
    return messages.frame_head(MAJOR, message, sequence, payload_bytes=len(payload)) + payload


@dataclass
class Peer:
    """The other end, in the hands of the test."""

    sock: socket.socket

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def hear_all(self) -> list[Message]:
        """Everything that the channel sends until it ends the connection."""
        parser = FrameParser(MAJOR, OUR_MAX_PAYLOAD_BYTES)
        heard: list[Message] = []
        async with asyncio.timeout(WAIT_S):
            while data := await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16):
                heard += [messages.decode(found.type, found.meta) for found in parser.receive(data)]
        return heard


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of one TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    for end in (one, other):
        end.setblocking(False)
    return one, other


def channel_over(sock: socket.socket, interval_s: float = LONG_S, timeout_s: float = LONG_S) -> ControlChannel:
    connection = Connection(Wire(sock, None), Agreed(MAJOR, OUR_MAX_PAYLOAD_BYTES))
    return ControlChannel(connection, HostClock(), heartbeat_interval_s=interval_s, heartbeat_timeout_s=timeout_s)


@asynccontextmanager
async def facing(**heartbeat: Any) -> AsyncIterator[tuple[ControlChannel, Peer]]:
    """A channel and its peer."""
    ours, theirs = connected()
    channel = channel_over(ours, **heartbeat)
    await channel.start()
    with theirs:
        yield channel, Peer(theirs)
        await asyncio.wait_for(channel.close(), WAIT_S)


async def why_lost(channel: ControlChannel) -> str:
    """The sentence with which the channel ends; it stays the same however often one asks."""
    with pytest.raises(LinkLostError) as first:
        await asyncio.wait_for(channel.receive(), WAIT_S)
    with pytest.raises(LinkLostError) as again:
        await asyncio.wait_for(channel.receive(), WAIT_S)
    with pytest.raises(LinkLostError) as sending:
        channel.send(DONE)
    assert str(first.value) == str(again.value) == str(sending.value) == str(channel.lost)
    return str(first.value)


async def test_messages_arrive_in_order_with_the_instants_of_their_reading() -> None:
    async with facing() as (channel, peer):
        before_ns = HostClock().hrtime_ns()
        await peer.send(frame(DONE, 0) + frame(messages.Record(), 1, b"{}"))
        first, second = await channel.receive(), await channel.receive()
        assert (first.message, first.payload) == (DONE, b"")
        assert (second.message, second.payload) == (messages.Record(), b"{}")
        assert before_ns <= first.read_at_hrtime_ns <= second.read_at_hrtime_ns <= HostClock().hrtime_ns()


async def test_a_peer_that_stays_silent_is_asked_and_then_lost() -> None:
    lost: list[Exception] = []
    async with facing(interval_s=0.02, timeout_s=0.2) as (channel, peer):
        channel.on_lost = lost.append
        heard = asyncio.create_task(peer.hear_all())
        assert re.search(r"has been silent for \d+\.\d s", await why_lost(channel))
        assert channel.max_silence_s > 0.2
        assert lost == [channel.lost]
        asked = await heard
        assert asked
        assert {type(message) for message in asked} == {messages.ClockAsk}


async def test_two_channels_that_only_beat_stand_and_know_each_others_clock() -> None:
    """Nothing but heartbeats for many times the interval; the time-out is longer than any stall of the machine."""
    one, other = (channel_over(end, 0.01, WAIT_S) for end in connected())
    await one.start()
    await other.start()
    assert one.offset() is None
    await one.measure(WAIT_S)
    offset = one.offset()
    assert offset is not None
    before_ns = HostClock().hrtime_ns()
    interval = offset.at(before_ns)
    assert interval.lower_ns <= 0 <= interval.upper_ns  # both read one clock
    assert one.typical_round_trip_ns() <= one.round_trip_ns()
    await other.measure(WAIT_S)
    assert (one.lost, other.lost) == (None, None)
    closing = asyncio.create_task(one.close())
    assert "closed the control channel" in await why_lost(other)
    await closing
    await other.close()


DAMAGE = {
    "no frame at all": (b"GET / HTTP/1.1\r\nHost: example\r\nAccept: */*\r\n\r\n" * 4, "magic b'GET '"),
    "zeros": (bytes(4096), "the stream does not continue with a frame"),
    "a bit of the meta": (
        bytes([*frame(DONE, 0)[:-1], frame(DONE, 0)[-1] ^ 1]),
        "the checksum of its meta does not match",
    ),
    "a frame that was left out": (frame(DONE, 1), "frame number 1 arrived, expected 0"),
    "a frame that comes twice": (frame(DONE, 0) * 2, "frame number 0 arrived, expected 1"),
    "a payload where there is none": (frame(DONE, 0, b"x"), "message ROUND_DONE has no payload"),
}


@pytest.mark.parametrize(("sent", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
async def test_damage_ends_the_channel_and_the_peer_is_told_why(sent: bytes, reason: str) -> None:
    async with facing() as (channel, peer):
        await peer.send(sent)
        (*_, last) = await peer.hear_all()
        assert isinstance(last, messages.Error)
        assert reason in last.text
        while channel.lost is None:
            await asyncio.wait_for(channel.receive(), WAIT_S)
        assert last.text == str(channel.lost)


async def test_a_peer_that_writes_on_after_its_damage_hears_why_the_channel_ended() -> None:
    async with facing() as (channel, peer):
        await peer.send(frame(DONE, 7))
        why = await why_lost(channel)
        for number in range(1, 4):
            await peer.send(frame(DONE, number))  # fails where the connection is reset
        (said,) = await peer.hear_all()
        assert isinstance(said, messages.Error)
        assert said.text == why


async def test_a_peer_that_answers_no_clocks_is_named() -> None:
    async with facing() as (channel, _):
        with pytest.raises(LinkLostError, match=r"did not answer exchanges of clocks within 0\.05 s"):
            await channel.measure(0.05)


async def test_a_connection_that_ends_inside_a_frame_is_damage_and_between_two_it_is_not() -> None:
    async with facing() as (channel, peer):
        await peer.send(frame(DONE, 0)[:-1])
        peer.sock.shutdown(socket.SHUT_WR)
        (said,) = await peer.hear_all()
        assert isinstance(said, messages.Error)
        assert "the connection ended inside the body of frame 0" in said.text
    async with facing() as (channel, peer):
        await peer.send(frame(DONE, 0))
        peer.sock.shutdown(socket.SHUT_WR)
        assert (await channel.receive()).message == DONE
        assert await why_lost(channel) == f"{channel.peer} closed the control channel"


async def test_stamps_that_no_clock_can_have_made_end_the_channel() -> None:
    async with facing(interval_s=0.01) as (channel, peer):
        loop = asyncio.get_running_loop()
        parser = FrameParser(MAJOR, OUR_MAX_PAYLOAD_BYTES)
        (asked, *_) = list(parser.receive(await asyncio.wait_for(loop.sock_recv(peer.sock, 1 << 16), WAIT_S)))
        ask = messages.decode(asked.type, asked.meta)
        assert isinstance(ask, messages.ClockAsk)
        await peer.send(frame(messages.ClockReply(nonce=ask.nonce, t2_ns=10**15, t3_ns=0), 0))
        assert "answered 1000000000000000 ns before it heard the question" in await why_lost(channel)


async def test_an_error_of_the_peer_is_passed_on() -> None:
    async with facing() as (channel, peer):
        await peer.send(frame(messages.Error(code=1, text="my disk is full"), 0))
        assert await why_lost(channel) == f"{channel.peer} ended the migration: my disk is full"


async def test_a_peer_that_stops_reading_is_lost_and_costs_a_bounded_amount() -> None:
    async with facing() as (channel, _):
        sent = 0
        while channel.lost is None and sent < 64:  # beside our 8 MiB there are the kernel's buffers
            with contextlib.suppress(LinkLostError):
                channel.send(messages.Record(), bytes(MIB))
            sent += 1
        assert sent > 8
        assert "does not read what it is sent: more than 8 MiB wait for it" in await why_lost(channel)


async def test_a_channel_whose_peer_does_not_read_still_closes() -> None:
    ours, theirs = connected()
    channel = channel_over(ours)
    await channel.start()
    with theirs:
        for _ in range(7):
            channel.send(messages.Record(), bytes(MIB))
        assert channel.lost is None
        await asyncio.wait_for(channel.close(), WAIT_S)
        with pytest.raises(LinkLostError, match="is closed"):
            channel.send(DONE)
