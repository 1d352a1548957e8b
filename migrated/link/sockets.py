"""Socket options and the opening of a connection, on raw non-blocking sockets.

    connect or accept -> TLS handshake (in a thread) -> prefaces -> first frame -> control or data channel, or an answer

A connection tells with its first frame what it is: HELLO or OUTCOME_ASK make it a control channel on the event loop,
JOIN makes it a data channel in a thread. So everything up to the first frame is read here to the byte, and only then
is the socket wrapped one way or the other.

On this host a connection may also be a unix socket, or one of this daemon to itself: no TLS then, since whoever may
open the socket may do what it is for, and the first frame may bring descriptors (SCM_RIGHTS).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from migrated.base.errors import LinkLostError
from migrated.link.security import THIS_HOST, LinkSecurity, Names
from migrated.link.tls import READ_BYTES, TlsSession, opens_with_tls
from migrated.settings.config import Address
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, check_meta, unpack_header
from protocol.messages import Message
from protocol.versions import PREFACE_BYTES, agree_version, pack_preface, unpack_preface

UNSENT_BYTES: Final = 256 << 10
DATA_BUFFER_BYTES: Final = 4 << 20
OUR_MAX_PAYLOAD_BYTES: Final = MAX_PAYLOAD_BYTES
_AFTER_RESETS_S: Final = (0.05, 0.1, 0.2, 0.4)
"""Pauses before a connection that was reset is tried again."""
_HANDSHAKES: Final = ThreadPoolExecutor(1, "tls-handshake")
"""Signatures and their checks take a millisecond, which the event loop has other uses for."""
_MOST_DESCRIPTORS: Final = 64
"""Descriptors that may come with one first frame: a guest has at most so many regions of memory."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """The result of the two prefaces: the version, and the largest payload that the peer takes (bytes)."""

    version: int
    peer_max_payload_bytes: int


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """This daemon itself, as a place to connect to. ``open`` makes a connection and returns one end of it; the daemon
    takes the other as it takes those that come from elsewhere."""

    open: Callable[[], socket.socket]

    def __str__(self) -> str:
        return "this daemon"


Place: TypeAlias = Address | Path | OwnPlace
"""Where a daemon listens: on TCP, on a unix socket, or in this process."""


def tune(sock: socket.socket, user_timeout_s: float) -> None:
    """Options that every TCP connection gets: no delay, keep-alive, and an end to unacknowledged data after a while."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout_s * 1000))


def tune_data(sock: socket.socket) -> None:
    """Large buffers for a data channel; the kernel caps them at its own limits. What is not sent yet stays small, so
    that channels that share their work end at the same time: a slow one must not have taken more than it sends."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, DATA_BUFFER_BYTES)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class Wire:
    """One connection on a raw non-blocking socket, plain or with TLS, from which exactly as much is read as is asked
    for. Whoever takes the connection over takes ``sock`` and ``tls`` on, and ``close``s the wire at the end.

    Args:
        sock: connected and non-blocking; owned from here on.
        tls: TLS of the connection, None for a plain one; ``secure`` does its handshake.
        on_close: called once, when it is closed.

    Attributes:
        descriptors: those that came with what was read here; closed with the wire.
    """

    def __init__(
        self, sock: socket.socket, tls: TlsSession | None, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self.sock = sock
        self.tls = tls
        self.peer = _name_of(sock)
        self.descriptors: list[int] = []
        self._on_close = on_close
        self._closed = False

    @property
    def names(self) -> Names:
        """Names of the peer in its certificate, empty on a plain connection."""
        if self.local:
            return THIS_HOST
        return self.tls.peer_names() if self.tls is not None else ()

    @property
    def local(self) -> bool:
        """Whether it is a unix socket: both ends are on this host."""
        return self.sock.family == socket.AF_UNIX

    async def secure(self) -> None:
        """Do the TLS handshake, either side; nothing on a plain connection.

        Raises:
            TlsError: it failed; the peer was told as TLS tells it.
            LinkLostError: the connection ended before.
        """
        if self.tls is None:
            return
        loop = asyncio.get_running_loop()
        received, done = b"", False
        while not done:
            try:
                done = await loop.run_in_executor(_HANDSHAKES, self.tls.handshake, received)
            finally:
                if to_send := self.tls.to_send():
                    await loop.sock_sendall(self.sock, to_send)
            if not done and not (received := await loop.sock_recv(self.sock, READ_BYTES)):
                raise LinkLostError(
                    f"{self.peer} closed the connection during the TLS handshake: its log says why, or it is no "
                    "migrated daemon"
                )

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        await asyncio.get_running_loop().sock_sendall(self.sock, self.tls.encrypt(data) if self.tls else data)

    async def read_exactly(self, count: int) -> bytes:
        """Read ``count`` bytes.

        Raises:
            LinkLostError: the connection ended before.
        """
        loop = asyncio.get_running_loop()
        data = bytearray(count)
        view = memoryview(data)
        filled = 0
        while filled < count:
            if self.local:
                got = await self._receive_with_descriptors(view[filled:])
                ended = not got
            elif self.tls is None:
                got = await loop.sock_recv_into(self.sock, view[filled:])
                ended = not got
            elif ended := not (got := self.tls.read_into(view[filled:])):
                received = await loop.sock_recv(self.sock, READ_BYTES)
                self.tls.receive(received)
                ended = not received
            if ended:
                raise LinkLostError(f"the peer closed the connection after {filled} of {count} expected bytes")
            filled += got
        return bytes(data)

    async def _receive_with_descriptors(self, view: memoryview) -> int:
        """Receive into a view what is there, and keep the descriptors that come with it. Returns the bytes."""
        loop, space = asyncio.get_running_loop(), socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
        while True:
            try:
                got, ancillary, flags, _ = self.sock.recvmsg_into([view], space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                readable = loop.create_future()
                loop.add_reader(self.sock, _set, readable)
                try:
                    await readable
                finally:
                    loop.remove_reader(self.sock)
                continue
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    came = array.array("i")
                    came.frombytes(data[: len(data) - len(data) % came.itemsize])
                    self.descriptors.extend(came)
            if flags & socket.MSG_CTRUNC or len(self.descriptors) > _MOST_DESCRIPTORS:
                raise RemoteProtocolError(
                    f"more than {_MOST_DESCRIPTORS} descriptors came with one frame", ErrorCode.TOO_LARGE
                )
            return got

    def send_with_descriptors(self, data: bytes, descriptors: Sequence[int]) -> int:
        """Send what fits at once, with descriptors, over a unix socket to which nothing else is being sent. Returns the
        bytes that went.

        Raises:
            OSError: it cannot be sent.
        """
        return socket.send_fds(self.sock, [data], list(descriptors))

    def close(self) -> None:
        """Close the socket and the descriptors that came with it; idempotent."""
        self.sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())
        if not self._closed:
            self._closed = True
            self._on_close()


@dataclass(frozen=True, slots=True)
class Connection:
    """An open connection whose prefaces are exchanged."""

    wire: Wire
    agreed: Agreed


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def connect(place: Place, timeout_s: float, user_timeout_s: float, security: LinkSecurity) -> Connection:
    """Open a connection, secure it and exchange prefaces. Where the other side resets it meanwhile, this is tried a few
    times: a daemon to which a crowd of strangers connects drops the oldest that has not told what it is yet.

    Raises:
        LinkLostError: nobody answers there, what answers is not a migrated daemon, or there is no TLS with it; the
            sentence names the address.
        RefusedError: this host may not talk to that one.
    """
    where = str(place)
    try:
        async with asyncio.timeout(timeout_s):
            for wait_s in _AFTER_RESETS_S:
                with contextlib.suppress(ConnectionResetError):
                    return await _connect_once(place, user_timeout_s, security)
                await asyncio.sleep(wait_s)
            return await _connect_once(place, user_timeout_s, security)
    except TimeoutError as error:
        raise LinkLostError(f"{where} did not answer within {timeout_s:g} s; is the destination running?") from error
    except socket.gaierror as error:
        raise LinkLostError(f"the host name in {where} cannot be resolved: {error.strerror}") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise LinkLostError(
                f"no connection to {where}: this daemon has no file descriptor left; raise its LimitNOFILE"
            ) from error
        raise LinkLostError(
            f"{where} cannot be reached: {error.strerror or error}; is `migrated destination` listening there?"
        ) from error
    except RemoteProtocolError as error:
        raise LinkLostError(f"{where}: {error}") from error


async def _connect_once(place: Place, user_timeout_s: float, security: LinkSecurity) -> Connection:
    wire = await _reach(place, user_timeout_s, security)
    try:
        await wire.secure()
        security.check_peer(wire.names, str(place))
        return Connection(wire, await exchange_prefaces(wire))
    except BaseException:
        wire.close()
        raise


async def _reach(place: Place, user_timeout_s: float, security: LinkSecurity) -> Wire:
    """Connect to a place."""
    loop = asyncio.get_running_loop()
    address: tuple[object, ...] | str
    tls: TlsSession | None
    match place:
        case OwnPlace():
            return Wire(place.open(), None)
        case Path():
            sock, address, tls = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(place), None
        case Address(host=host, port=port):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, number, _, address = found[0]
            tls = security.connecting(host, str(address[0]), str(place))
            sock = socket.socket(family, kind, number)
    try:
        sock.setblocking(False)
        tune(sock, user_timeout_s)
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return Wire(sock, tls)


async def exchange_prefaces(wire: Wire) -> Agreed:
    """Say what this side speaks and hear what the other does; both sides do the same.

    Raises:
        RemoteProtocolError: the other side is no migrated daemon, uses TLS where this one does not, or speaks no
            version of ours.
        LinkLostError: the connection ended before.
    """
    await wire.send(pack_preface(OUR_MAX_PAYLOAD_BYTES))
    opening = await wire.read_exactly(PREFACE_BYTES)
    if opens_with_tls(opening):
        raise RemoteProtocolError(
            "the peer opened with TLS and [tls] is not set here: set [tls] certificate, key and authority on both "
            "hosts",
            ErrorCode.AUTH,
        )
    theirs = unpack_preface(opening)
    return Agreed(agree_version(theirs), theirs.max_payload_bytes)


def _name_of(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return "the peer"
    if sock.family == socket.AF_UNIX:
        return "this host"
    return str(Address(*name[:2])) if isinstance(name, tuple) else "the peer"


async def read_first(connection: Connection) -> Message:
    """Read the peer's first frame of a connection and not a byte more. It must have no payload.

    Raises:
        RemoteProtocolError: it is damaged, not the first, or no message of the catalogue.
        LinkLostError: the connection ended before.
    """
    wire = connection.wire
    header = unpack_header(await wire.read_exactly(HEADER_BYTES), connection.agreed.version, max_payload_bytes=0)
    meta = await wire.read_exactly(header.meta_bytes)
    check_meta(meta, header)
    if header.sequence:
        raise RemoteProtocolError(f"the first frame of a connection has number {header.sequence}, expected 0")
    return messages.decode(header.type, meta)


async def send_first(connection: Connection, message: Message) -> None:
    """Send the first frame of a connection."""
    await connection.wire.send(messages.frame_head(connection.agreed.version, message, sequence=0))


async def ask_first(connection: Connection, question: Message, timeout_s: float) -> Message:
    """Send the first frame of a connection and return the peer's first frame.

    Raises:
        RemoteProtocolError: see ``read_first``.
        LinkLostError: the connection broke or ended before, or the peer reported an error.
        TimeoutError: there was no answer in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError):  # who has hung up already may have said why
                await send_first(connection, question)
            answer = await read_first(connection)
    except ConnectionError as error:
        raise LinkLostError(f"{connection.wire.peer} broke the connection: {error.strerror or error}") from error
    if isinstance(answer, messages.Error):
        raise LinkLostError(f"{connection.wire.peer} ended the connection: {answer.text}")
    return answer
