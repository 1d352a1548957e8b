"""Blocking byte streams over an owned socket, plain or with TLS, for the thread of a data channel.

Plain: many buffers go in and out with one system call. TLS: a piece of CHUNK_BYTES is encrypted, then sent, out of
memory of its own; what arrives is decrypted straight into its place.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Final, Protocol

from migrated.link.tls import TlsSession

MAX_VECTORS: Final = 1024
"""IOV_MAX: the most buffers that one sendmsg or recvmsg takes."""
CHUNK_BYTES: Final = 256 << 10


class StreamEndedError(Exception):
    """The peer closed the connection."""


class Stream(Protocol):
    """Sends and reads whole byte views. Every method raises OSError when the connection breaks."""

    def send_all(self, views: Sequence[memoryview]) -> None:
        """Send the concatenation of the views."""

    def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views in order.

        Raises:
            StreamEndedError: the peer closed the connection before.
        """


def stream_of(sock: socket.socket, tls: TlsSession | None) -> Stream:
    """The stream of a blocking socket."""
    return PlainStream(sock) if tls is None else TlsStream(sock, tls)


class PlainStream:
    """A ``Stream`` without TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send_all(self, views: Sequence[memoryview]) -> None:
        """See ``Stream``."""
        pending = list(views)
        while pending:
            pending = _skip(pending, self._sock.sendmsg(pending[:MAX_VECTORS]))

    def read_into(self, views: Sequence[memoryview]) -> None:
        """See ``Stream``."""
        pending = list(views)
        while pending:
            if len(pending) == 1:
                got = self._sock.recv_into(pending[0], 0, socket.MSG_WAITALL)
            else:
                got = self._sock.recvmsg_into(pending[:MAX_VECTORS])[0]
            if not got:
                raise StreamEndedError
            pending = _skip(pending, got)


class TlsStream:
    """A ``Stream`` with TLS."""

    def __init__(self, sock: socket.socket, tls: TlsSession) -> None:
        self._sock = sock
        self._tls = tls
        self._received = memoryview(bytearray(CHUNK_BYTES))

    def send_all(self, views: Sequence[memoryview]) -> None:
        """See ``Stream``."""
        pending = list(views)
        while pending:
            chunk, pending = _cut(pending, CHUNK_BYTES)
            self._sock.sendall(self._tls.encrypt(*chunk))

    def read_into(self, views: Sequence[memoryview]) -> None:
        """See ``Stream``. Raises also TlsError when it cannot be decrypted."""
        pending = [view for view in views if len(view)]
        while pending:
            if got := self._tls.read_into(pending[0]):
                pending = _skip(pending, got)
            elif received := self._sock.recv_into(self._received):
                self._tls.receive(self._received[:received])
            else:
                raise StreamEndedError


def _skip(views: list[memoryview], count: int) -> list[memoryview]:
    """Return the views without their first ``count`` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def _cut(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``count`` bytes of the views, and what is left."""
    for index, view in enumerate(views):
        if count < len(view):
            return [*views[:index], view[:count]], [view[count:], *views[index + 1 :]]
        count -= len(view)
    return views, []
