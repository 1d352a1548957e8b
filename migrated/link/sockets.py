"""Socket options and the opening of a connection, on raw non-blocking sockets.

A connection tells with its first frame what it is: HELLO or OUTCOME_ASK make it a control channel on the event loop,
JOIN makes it a data channel in a thread. So the preface and the first frame are read here to the byte, and only then
is the socket wrapped one way or the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import Final

from migrated.errors import LinkLostError
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, check_meta, unpack_header
from protocol.messages import Message
from protocol.versions import PREFACE_BYTES, Preface, agree_version, pack_preface, unpack_preface

UNSENT_BYTES: Final = 256 << 10
DATA_BUFFER_BYTES: Final = 4 << 20
OUR_MAX_PAYLOAD_BYTES: Final = MAX_PAYLOAD_BYTES


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the prefaces settled: the version and the largest payload that the peer takes (bytes)."""

    version: int
    peer_max_payload_bytes: int


def tune(sock: socket.socket, user_timeout_s: float) -> None:
    """Options that every connection gets: no delay, keep-alive, and an end to unacknowledged data after a while."""
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


async def connect(host: str, port: int, timeout_s: float, user_timeout_s: float) -> tuple[socket.socket, Agreed]:
    """Open a connection and exchange prefaces.

    Raises:
        LinkLostError: nobody answers there, or what answers is not a migrated daemon; the sentence names the address.
    """
    loop = asyncio.get_running_loop()
    where = f"{host}:{port}"
    try:
        async with asyncio.timeout(timeout_s):
            addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol_number, _, address = addresses[0]
            sock = socket.socket(family, kind, protocol_number)
            try:
                sock.setblocking(False)
                tune(sock, user_timeout_s)
                await loop.sock_connect(sock, address)
                await loop.sock_sendall(sock, pack_preface(OUR_MAX_PAYLOAD_BYTES))
                return sock, _agree(unpack_preface(await read_exactly(sock, PREFACE_BYTES)))
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        raise LinkLostError(f"{where} did not answer within {timeout_s:g} s; is the destination running?") from error
    except socket.gaierror as error:
        raise LinkLostError(f"the host name {host!r} cannot be resolved: {error.strerror}") from error
    except OSError as error:
        raise LinkLostError(
            f"{where} cannot be reached: {error.strerror or error}; is `migrated destination` listening there?"
        ) from error
    except RemoteProtocolError as error:
        raise LinkLostError(f"{where}: {error}") from error


async def accept_preface(sock: socket.socket) -> Agreed:
    """The listening side of the preface exchange.

    Raises:
        RemoteProtocolError, LinkLostError: see ``connect``.
    """
    await asyncio.get_running_loop().sock_sendall(sock, pack_preface(OUR_MAX_PAYLOAD_BYTES))
    return _agree(unpack_preface(await read_exactly(sock, PREFACE_BYTES)))


def _agree(theirs: Preface) -> Agreed:
    return Agreed(agree_version(theirs), theirs.max_payload_bytes)


async def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Read ``count`` bytes from a non-blocking socket.

    Raises:
        LinkLostError: the connection ended before.
    """
    loop = asyncio.get_running_loop()
    data = bytearray(count)
    view = memoryview(data)
    filled = 0
    while filled < count:
        got = await loop.sock_recv_into(sock, view[filled:])
        if not got:
            raise LinkLostError(f"the peer closed the connection after {filled} of {count} expected bytes")
        filled += got
    return bytes(data)


async def read_first(sock: socket.socket, agreed: Agreed) -> Message:
    """Read the peer's first frame of a connection and not a byte more. It must have no payload.

    Raises:
        RemoteProtocolError: it is damaged, not the first, or no message of the catalogue.
        LinkLostError: the connection ended before.
    """
    head = await read_exactly(sock, HEADER_BYTES)
    header = unpack_header(head, agreed.version, max_payload_bytes=0)
    meta = await read_exactly(sock, header.meta_bytes)
    check_meta(meta, header)
    if header.sequence:
        raise RemoteProtocolError(f"the first frame of a connection has number {header.sequence}, expected 0")
    return messages.decode(header.type, meta)


async def send_first(sock: socket.socket, agreed: Agreed, message: Message) -> None:
    """Send the first frame of a connection from a non-blocking socket."""
    await asyncio.get_running_loop().sock_sendall(sock, messages.frame_head(agreed.version, message, sequence=0))


async def ask_first(sock: socket.socket, agreed: Agreed, question: Message, timeout_s: float) -> Message:
    """Send the first frame of a connection from a non-blocking socket and return the peer's first frame.

    Raises:
        RemoteProtocolError, LinkLostError: see ``read_first``.
        OSError: the connection broke.
        TimeoutError: there was no answer in time.
    """
    async with asyncio.timeout(timeout_s):
        await send_first(sock, agreed, question)
        return await read_first(sock, agreed)
