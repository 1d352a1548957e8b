"""A data channel: one blocking socket, used by one thread. It moves frames and knows nothing of guests."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import struct
from collections.abc import Sequence
from typing import Final, Protocol

from migrated.base.errors import LinkLostError
from migrated.link.sockets import OUR_MAX_PAYLOAD_BYTES, UNSENT_BYTES, Connection, tune_data
from migrated.link.streams import StreamEndedError, stream_of
from protocol import messages
from protocol.frames import HEADER_BYTES, Header, SequenceCheck, check_meta, unpack_header
from protocol.messages import Message

SO_MAX_PACING_RATE: Final = 47
_NO_PACING: Final = (1 << 64) - 1


class FrameSink(Protocol):
    """The target of one thread's frames: a data channel, or a file."""

    number: int

    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that it takes."""

    def pace(self, bytes_per_s: int) -> None:
        """Cap the rate; 0 lifts the cap."""

    def send(self, message: Message, payload: Sequence[memoryview] = (), round_number: int = 0) -> int:
        """Send one frame whose payload is the concatenation of byte views. Returns its size in bytes.

        Raises:
            MigrationError: it cannot be sent.
        """

    def room_bytes(self) -> int:
        """How much can be sent now, at least, without waiting; 0 where nobody knows."""

    def interrupt(self) -> None:
        """End every call under way, from any thread."""

    def close(self) -> None:
        """Let go of it, when its thread has ended."""


class FrameSource(Protocol):
    """The origin of one thread's frames: a data channel, or a file."""

    number: int
    received_bytes: int

    def read_header(self) -> tuple[Header, Message]:
        """Read the header and meta of the next frame; its payload must be read next with ``read_into``.

        Raises:
            MigrationError: nothing more can be read.
            RemoteProtocolError: the frame is damaged or out of order.
        """

    def read_into(self, views: list[memoryview]) -> None:
        """Fill byte views with the payload, in order."""

    def interrupt(self) -> None:
        """End every call under way, from any thread."""

    def close(self) -> None:
        """Let go of it, when its thread has ended."""


class DataChannel:
    """Blocking frame I/O over an owned socket: a ``FrameSink`` and a ``FrameSource``.

    ``interrupt`` may be called from any thread; the calls under way then raise ``LinkLostError``. Everything else
    belongs to the channel's thread.

    Args:
        connection: JOIN done; owned from here on.
        number: channel number.
    """

    def __init__(self, connection: Connection, number: int) -> None:
        sock = connection.wire.sock
        sock.setblocking(True)
        tune_data(sock)
        self.number = number
        self.sent_bytes = 0
        self.received_bytes = 0
        self._wire = connection.wire
        self._agreed = connection.agreed
        self._stream = stream_of(sock, connection.wire.tls)
        self._sent = itertools.count(1)
        self._received = SequenceCheck(1)
        self._head = bytearray(HEADER_BYTES)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that the peer takes."""
        return self._agreed.peer_max_payload_bytes

    def pace(self, bytes_per_s: int) -> None:
        """Cap this channel's rate in the kernel; 0 lifts the cap. A unix socket has none."""
        if self._wire.local:
            return
        rate = _NO_PACING if bytes_per_s == 0 else bytes_per_s
        self._wire.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("=Q", rate))

    def send(self, message: Message, payload: Sequence[memoryview] = (), round_number: int = 0) -> int:
        """Send one frame whose payload is the concatenation of byte views. Returns the bytes on the wire.

        Raises:
            LinkLostError: the connection is gone.
        """
        payload_bytes = sum(len(view) for view in payload)
        head = messages.frame_head(
            self._agreed.version, message, next(self._sent), payload_bytes=payload_bytes, round_number=round_number
        )
        try:
            self._stream.send_all([memoryview(head), *payload])
        except OSError as error:
            raise self._lost(error) from error
        total = len(head) + payload_bytes
        self.sent_bytes += total
        return total

    def room_bytes(self) -> int:
        """How much can be sent now, at least, without waiting, while nobody else sends. The kernel calls a socket
        writable when a third of its buffer is free, and no more than half of UNSENT_BYTES waits; the buffer also holds
        what describes the data."""
        if not any(ready == select.POLLOUT for _, ready in self._writable.poll(0)):
            return 0
        return min(self._wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), UNSENT_BYTES) // 4

    def read_header(self) -> tuple[Header, Message]:
        """Read the header and meta of the next frame; its payload must be read next with ``read_into``.

        Raises:
            LinkLostError: the connection is gone or ended.
            RemoteProtocolError: the frame is damaged or out of order.
        """
        self._read([memoryview(self._head)])
        header = unpack_header(self._head, self._agreed.version, OUR_MAX_PAYLOAD_BYTES)
        meta = bytearray(header.meta_bytes)
        self._read([memoryview(meta)])
        check_meta(meta, header)
        self._received.accept(header.sequence)
        self.received_bytes += HEADER_BYTES + header.meta_bytes + header.payload_bytes
        return header, messages.decode(header.type, meta)

    def read_into(self, views: list[memoryview]) -> None:
        """Fill byte views with the payload, in order.

        Raises:
            LinkLostError: the connection is gone or ended.
        """
        self._read(views)

    def interrupt(self) -> None:
        """End every call under way, from any thread."""
        with contextlib.suppress(OSError):
            self._wire.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. Call it when the channel's thread has ended."""
        self._wire.close()

    def _read(self, views: list[memoryview]) -> None:
        try:
            self._stream.read_into(views)
        except StreamEndedError as error:
            raise LinkLostError(f"data channel {self.number} was closed by the peer") from error
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> LinkLostError:
        return LinkLostError(f"data channel {self.number} broke: {error.strerror or error}")
