"""The control channel: small messages on the event loop, never behind page data.

The channel answers clock asks by itself and asks regularly, which measures the peer's clock and the round trip, and
is the heartbeat: a peer that stays silent for too long is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from migrated.base.clock import HostClock
from migrated.base.errors import LinkLostError
from migrated.link.budgets import Allowance
from migrated.link.security import Names
from migrated.link.sockets import OUR_MAX_PAYLOAD_BYTES, Connection
from migrated.link.tls import READ_BYTES
from protocol import messages
from protocol.clock import ClockError, OffsetEstimate
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import HEADER_BYTES, FrameParser
from protocol.messages import ClockAsk, ClockReply, Message
from protocol.peer_clock import PeerClock

_LEAVE_S: Final = 0.5
"""How long a peer is waited for that does not close its side."""
_OPENING_EXCHANGES: Final = 8
_MAX_UNREAD_BYTES: Final = 8 << 20
"""A peer for which more waits to be sent does not read: the largest message has half of it."""
_MESSAGES_AT_ONCE: Final = 4096
_MESSAGES_PER_S: Final = 500.0
"""Messages that a peer may send at once, and per second from then on: a DOWNTIME per device, of which there are at most
1024, and a few per round."""
_BYTES_AT_ONCE: Final = 16 << 20
_BYTES_PER_S: Final = float(1 << 20)
_FRAMES_AT_ONCE: Final = 16
_WITH_PAYLOAD: Final = (messages.Report, messages.Record, messages.DeviceState)


@dataclass(frozen=True, slots=True)
class Received:
    """A message with its payload and the instants at which it was read: raw clock and monotonic clock (ns)."""

    message: Message
    payload: bytes
    read_at_hrtime_ns: int
    read_at_ns: int


class ControlChannel:
    """One control channel, either end.

    Args:
        connection: owned from here on.
        clock: this host's clocks.
        heartbeat_interval_s: how often to ask the peer's clock.
        heartbeat_timeout_s: silence after which the peer is lost.
        sent, received: frames that already went each way.
    """

    def __init__(
        self,
        connection: Connection,
        clock: HostClock,
        *,
        heartbeat_interval_s: float,
        heartbeat_timeout_s: float,
        sent: int = 0,
        received: int = 0,
    ) -> None:
        self.peer = connection.wire.peer
        self.max_silence_s = 0.0
        self._wire = connection.wire
        self._version = connection.agreed.version
        self._clock = clock
        self._interval_s = heartbeat_interval_s
        self._timeout_s = heartbeat_timeout_s
        self._sequence = itertools.count(sent)
        self._parser = FrameParser(self._version, OUR_MAX_PAYLOAD_BYTES, received)
        self._inbox: asyncio.Queue[Received | Exception] = asyncio.Queue()
        self._messages_left = Allowance(_MESSAGES_AT_ONCE, _MESSAGES_PER_S)
        self._bytes_left = Allowance(_BYTES_AT_ONCE, _BYTES_PER_S)
        self._peer_clock = PeerClock()
        self._answered = asyncio.Event()
        self._heard_at = time.monotonic()
        self._failure: Exception | None = None
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._writer: asyncio.StreamWriter | None = None
        self.on_lost: Callable[[Exception], None] | None = None

    async def start(self) -> None:
        """Begin to read and to keep the heartbeat."""
        open_stream = asyncio.open_unix_connection if self._wire.local else asyncio.open_connection
        reader, self._writer = await open_stream(sock=self._wire.sock)
        transport = self._writer.transport
        transport.set_write_buffer_limits(high=0)  # so that drain means: in the kernel's hands
        self._tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._beat())]

    def send(self, message: Message, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Write a message at once; it leaves this process before the call returns unless the peer's window is full.

        Args:
            descriptors: go with the first message of a channel over a unix socket.

        Raises:
            LinkLostError: the channel is gone.
        """
        if self._failure is not None:
            raise LinkLostError(str(self._failure)) from self._failure
        if self._writer is None or self._closed or self._writer.transport.is_closing():
            raise LinkLostError(f"the control channel to {self.peer} is closed")
        head = messages.frame_head(self._version, message, next(self._sequence), payload_bytes=len(payload))
        tls = self._wire.tls
        data = head + payload if tls is None else tls.encrypt(head, payload)
        if descriptors:
            data = data[self._send_descriptors(data, descriptors) :]
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            error = LinkLostError(
                f"{self.peer} does not read what it is sent: more than {_MAX_UNREAD_BYTES >> 20} MiB wait for it"
            )
            self._lose(error)
            raise error

    def _send_descriptors(self, data: bytes, descriptors: Sequence[int]) -> int:
        """Begin to send data with descriptors. Returns the bytes that went."""
        try:
            return self._wire.send_with_descriptors(data, descriptors)
        except OSError as error:
            lost = LinkLostError(f"memory could not be handed to {self.peer}: {error.strerror or error}")
            self._lose(lost)
            raise lost from error

    async def receive(self) -> Received:
        """The next message.

        Raises:
            LinkLostError: the channel is gone, the peer broke the protocol, or reported an error.
        """
        item = await self._inbox.get()
        if isinstance(item, Exception):
            self._inbox.put_nowait(item)  # every later call learns it too
            raise LinkLostError(str(item)) from item
        return item

    @property
    def names(self) -> Names:
        """Names of the peer in its certificate, empty on a plain connection."""
        return self._wire.names

    @property
    def local(self) -> bool:
        """Whether the peer is on this host, at the other end of a unix socket."""
        return self._wire.local

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Descriptors that came with the peer's first message; they are closed with the channel."""
        return tuple(self._wire.descriptors)

    @property
    def lost(self) -> Exception | None:
        """The error that ended the channel, None while it stands."""
        return self._failure

    async def measure(self, timeout_s: float) -> None:
        """Exchange clocks a few times now, so that legs and offset are known before they are needed.

        Raises:
            LinkLostError: the channel is gone, or the peer does not answer in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(_OPENING_EXCHANGES):
                    self._answered.clear()
                    self._ask()
                    await self._answered.wait()
                    if self._failure is not None:
                        raise LinkLostError(str(self._failure)) from self._failure
        except TimeoutError as error:
            raise LinkLostError(f"{self.peer} did not answer exchanges of clocks within {timeout_s:g} s") from error

    async def measure_anew(self, timeout_s: float) -> None:
        """``measure``, and forget all exchanges before: those of a time in which others kept this process waiting say
        nothing of one in which it goes before them."""
        await self.measure(timeout_s)
        self._peer_clock.forget_but(_OPENING_EXCHANGES)

    def round_trip_ns(self) -> int:
        """Return the longest round trip of the recent exchanges (ns), 0 before the first: for reserves."""
        return self._peer_clock.round_trip_ns()

    def typical_round_trip_ns(self) -> int:
        """Return the median round trip of the recent exchanges (ns), 0 before the first: for predictions."""
        return self._peer_clock.typical_round_trip_ns()

    def offset(self) -> OffsetEstimate | None:
        """Return the bounds of the peer's raw clock; None before an exchange, or when exchanges exclude each other."""
        try:
            return self._peer_clock.offset()
        except ClockError:
            return None

    def transit_upper_ns(self, sent_at_peer_ns: int, read_at_ns: int) -> int:
        """Return an upper bound of the transit of a message that the peer stamped (raw clocks, ns): from the offset
        where one is known, else the longest round trip."""
        try:
            return self._peer_clock.transit_upper_ns(sent_at_peer_ns, read_at_ns)
        except ClockError:
            return self.round_trip_ns()

    async def flush(self, timeout_s: float) -> None:
        """Wait until what was sent is in the kernel's hands, at most ``timeout_s``."""
        if self._writer is None:
            return
        with contextlib.suppress(TimeoutError, ConnectionError, OSError):
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()

    async def close(self) -> None:
        """End the channel; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.on_lost = None
        await self.flush(1.0)
        if self._writer is not None and not self._writer.transport.is_closing():
            await self._take_leave(self._writer)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError, OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._writer.wait_closed()
        self._wire.close()

    async def _take_leave(self, writer: asyncio.StreamWriter) -> None:
        """Say that nothing more comes, and read on until the peer has said so too. A socket that is closed with
        something unread resets the connection, and our last message, a record maybe, could be lost with it."""
        with contextlib.suppress(OSError):
            writer.write_eof()
        await asyncio.wait(self._tasks[:1], timeout=_LEAVE_S)

    def _lose(self, error: Exception) -> None:
        """Give the channel up at once."""
        if self._failure is None:
            self._fail(error)
            if self._writer is not None:
                self._writer.transport.abort()

    def _fail(self, error: Exception) -> None:
        """From here on the channel takes no message, and everybody here knows why."""
        self._failure = error
        self._inbox.put_nowait(error)
        self._answered.set()
        if self.on_lost is not None:
            self.on_lost(error)

    async def _end_by(self, error: RemoteProtocolError, reader: asyncio.StreamReader) -> None:
        """Tell the peer what it did wrong, give the channel up, and wait for a moment until the peer has heard it."""
        with contextlib.suppress(LinkLostError):
            self.send(messages.Error.about(error))
            await self.flush(1.0)
        if self._failure is None and self._writer is not None:
            self._fail(error)
            with contextlib.suppress(OSError, TimeoutError):
                self._writer.write_eof()
                async with asyncio.timeout(_LEAVE_S):
                    while await reader.read(READ_BYTES):
                        pass
            self._writer.transport.abort()

    def _ask(self) -> None:
        self.send(self._peer_clock.ask(secrets.randbits(63), self._clock.hrtime_ns()))

    async def _beat(self) -> None:
        """Ask regularly; declare the peer lost after a silence."""
        while True:
            await asyncio.sleep(self._interval_s)
            silence_s = time.monotonic() - self._heard_at
            self.max_silence_s = max(self.max_silence_s, silence_s)
            if silence_s > self._timeout_s:
                self._lose(LinkLostError(f"{self.peer} has been silent for {silence_s:.1f} s"))
                return
            try:
                self._ask()
            except LinkLostError as error:
                self._lose(error)
                return

    async def _read(self, reader: asyncio.StreamReader) -> None:
        tls = self._wire.tls
        try:
            data = tls.decrypt(b"") if tls is not None else b""  # what came together with the first frame
            await self._hear(data)
            while data := await reader.read(READ_BYTES):
                await self._hear(data if tls is None else tls.decrypt(data))
            self._parser.receive_eof()
            self._lose(LinkLostError(f"{self.peer} closed the control channel"))
        except RemoteProtocolError as error:
            await self._end_by(error, reader)
        except LinkLostError as error:
            self._lose(error)
        except OSError as error:
            self._lose(LinkLostError(f"the control channel to {self.peer} broke: {error.strerror or error}"))

    async def _hear(self, data: bytes) -> None:
        """Take the frames that are complete now, and let others have the event loop between them."""
        read_at_hrtime_ns, read_at_ns = self._clock.hrtime_ns(), time.monotonic_ns()
        self._heard_at = time.monotonic()
        for count, frame in enumerate(self._parser.receive(data), 1):
            now_s = time.monotonic()
            size_bytes = HEADER_BYTES + len(frame.meta) + len(frame.payload)
            if not (self._messages_left.take(1, now_s) and self._bytes_left.take(size_bytes, now_s)):
                raise RemoteProtocolError(
                    "more was sent on the control channel than any migration needs", ErrorCode.TOO_LARGE
                )
            message = messages.decode(frame.type, frame.meta)
            if frame.payload and not isinstance(message, _WITH_PAYLOAD):
                raise RemoteProtocolError(f"message {message.TYPE.name} has no payload", ErrorCode.TOO_LARGE)
            self._take(Received(message, frame.payload, read_at_hrtime_ns, read_at_ns))
            if count % _FRAMES_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _take(self, received: Received) -> None:
        match received.message:
            case ClockAsk(nonce=nonce):
                with contextlib.suppress(LinkLostError):
                    self.send(ClockReply(nonce=nonce, t2_ns=received.read_at_hrtime_ns, t3_ns=self._clock.hrtime_ns()))
            case ClockReply() as reply:
                try:
                    if self._peer_clock.hear(reply, received.read_at_hrtime_ns):
                        self._answered.set()
                except ClockError as error:
                    raise RemoteProtocolError(str(error), ErrorCode.TIME) from error
            case messages.Error(text=text):
                self._lose(LinkLostError(f"{self.peer} ended the migration: {text}"))
            case _:
                self._inbox.put_nowait(received)
