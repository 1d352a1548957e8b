"""The listening side: accepts connections and hands each over with its first message, which tells what it is.

    accept -> a place? -> handshake, prefaces, first message within _STRANGER_S -> may it? -> handler

Nothing of a stranger is kept: what does not tell what it is makes room for the next, oldest first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import structlog

from migrated.base.errors import LinkLostError, RefusedError
from migrated.base.tasks import TaskSet
from migrated.link import sockets
from migrated.link.budgets import Allowance, Places
from migrated.link.security import LinkSecurity
from migrated.link.sockets import OUR_MAX_PAYLOAD_BYTES, Connection, Wire
from migrated.link.tls import READ_BYTES, TlsError
from migrated.settings.config import Address, LimitsConfig
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.messages import Message
from protocol.versions import MAJOR, pack_preface

log = structlog.get_logger()

_STRANGER_S: Final = 10.0
"""A connection that has not told what it is by then is dropped."""
_NOT_ACCEPTED_S: Final = 0.1
"""Pause after a connection that could not be accepted."""
_FAREWELL_S: Final = 1.0
"""How long a peer that is told why it is refused may take to hear it."""
_LOG_LINES: Final = 50
_LOG_LINES_PER_S: Final = 2.0
"""Refusals that are logged; all are counted."""

_TLS_ONLY: Final = "this destination takes TLS only: set [tls] certificate, key and authority on the source too"

Handler = Callable[[Message, Connection], Coroutine[Any, Any, None]]
Refusal: TypeAlias = Literal["full", "slow", "tls", "authorisation", "protocol"]
"""Why a connection was not taken: no place, not told in time what it is, no TLS, not allowed, broken protocol."""


def bind(address: Address) -> socket.socket:
    """A socket that is bound to an address, for ``Listener.start``. Nobody can connect to it yet.

    Raises:
        OSError: the address cannot be bound, or is none.
    """
    family, kind, number, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
    except BaseException:
        sock.close()
        raise
    return sock


class Listener:
    """Accepts migration connections.

    Args:
        handler: called with the first message of each connection; owns the connection from then on. When it raises
            ``RemoteProtocolError`` the peer is told and the connection closed.
        limits: how many connections, and for how long.
        security: TLS, and who may come.
        on_refused: called for each connection that is not taken, with the kind of the reason.
    """

    def __init__(
        self,
        handler: Handler,
        limits: LimitsConfig,
        security: LinkSecurity,
        on_refused: Callable[[Refusal], None] = lambda _: None,
    ) -> None:
        self._handler = handler
        self._limits = limits
        self._security = security
        self._on_refused = on_refused
        self._sockets: list[socket.socket] = []
        self._tasks = TaskSet()
        self._places = Places(limits.max_connections, limits.max_connections_per_address)
        self._strangers: dict[asyncio.Task[None], str] = {}
        """Connections that have not told what they are, with their addresses, oldest first."""
        self._lines = Allowance(_LOG_LINES, _LOG_LINES_PER_S)
        self.address: Address | None = None

    def start(self, bound: socket.socket) -> None:
        """Listen on a socket that is bound to an address (``bind``), owned from here on.

        Raises:
            OSError: it cannot listen.
            PlainRefusedError: other hosts could come without TLS, and nobody has allowed it.
        """
        host, port = bound.getsockname()[:2]
        try:
            self._security.check_listen(host)
            self._begin(bound)
        except BaseException:
            bound.close()
            raise
        self.address = Address(host, port)

    def start_unix(self, path: Path) -> None:
        """Listen on a unix socket that this user alone may open, in place of one that a daemon left behind.

        Raises:
            OSError: it cannot be bound, or there is something else.
        """
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise FileExistsError(errno.EEXIST, "there is something that is not a socket")
            if _is_served(path):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            path.unlink()
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)  # a chmod after bind would leave a moment in which anyone may connect
        try:
            sock.bind(str(path))
        except BaseException:
            sock.close()
            raise
        finally:
            os.umask(before)
        self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.listen(128)
        self._sockets.append(sock)
        self._watch(sock)

    async def stop(self) -> None:
        """Stop listening; connections that were handed over go on."""
        while self._sockets:
            sock = self._sockets.pop()
            asyncio.get_running_loop().remove_reader(sock)
            if sock.family == socket.AF_UNIX:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(sock.getsockname())
            sock.close()
        await self._tasks.stop()

    @property
    def connections(self) -> int:
        """Number of connections that are held, those included that have not told what they are."""
        return self._places.held

    def _watch(self, listening: socket.socket) -> None:
        """Accept what comes. By callback, not by a task: one that is cancelled as it accepts would lose the connection,
        open."""
        if listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, where = listening.accept()
        except BlockingIOError:
            return  # it is gone again
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refused("full", "this daemon has no file descriptor left; raise its LimitNOFILE", "anybody")
            else:
                self._refused("full", f"a connection could not be accepted: {error.strerror}", "anybody")
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening)
            loop.call_later(_NOT_ACCEPTED_S, self._watch, listening)  # some may be freed until then
            return
        sock.setblocking(False)
        local = sock.family == socket.AF_UNIX
        address = "this host" if local else str(where[0])
        if (full := self._places.why_full(address)) is not None:
            reason = f"this host takes no more connections: {full} ([limits] max_connections)"
            self._refused("full", reason, address)
            self._turn_away(sock, reason)
            return
        self._places.take(address)
        self._make_room(address)
        tls = None if local else self._security.accepting(str(Address(*where[:2])))
        wire = Wire(sock, tls, partial(self._places.give_back, address))
        task = self._tasks.start(self._welcome(wire, address))
        self._strangers[task] = address
        task.add_done_callback(self._known)
        task.add_done_callback(partial(_close_if_cancelled, wire))

    def _make_room(self, address: str) -> None:
        """Drop the oldest stranger, of this address or of all, when there are as many as may be: who is honest tells
        what it is within milliseconds."""
        same = [task for task, its in self._strangers.items() if its == address]
        if len(same) >= self._limits.max_handshakes_per_address:
            oldest = same[0]
        elif len(self._strangers) >= self._limits.max_handshakes:
            oldest = next(iter(self._strangers))
        else:
            return
        its_address = self._strangers.pop(oldest)
        oldest.cancel()
        self._refused("slow", "it made room for newer ones before it told what it is", its_address)

    def _known(self, task: asyncio.Task[Any] | None) -> None:
        """A connection has told what it is, or is gone."""
        if task is not None:
            self._strangers.pop(task, None)

    async def _welcome(self, wire: Wire, address: str) -> None:
        connection: Connection | None = None
        first: Message | None = None
        handed_over = False
        try:
            wire.sock.setblocking(False)
            sockets.tune(wire.sock, self._limits.tcp_user_timeout_s)
            async with asyncio.timeout(_STRANGER_S):
                await wire.secure()
                connection = Connection(wire, await sockets.exchange_prefaces(wire))
                first = await sockets.read_first(connection)
            self._known(asyncio.current_task())
            self._security.check_peer(wire.names, wire.peer)
            if isinstance(first, messages.Hello):
                self._security.check_accept(wire.names, first.guest.name)
            await self._handler(first, connection)
            handed_over = True
        except RemoteProtocolError as error:
            self._refused("protocol", str(error), address)
            await _farewell(wire, connection, messages.Error.about(error))
        except RefusedError as error:
            self._refused("authorisation", str(error), address)
            await _farewell(wire, connection, _no(first, str(error)))
        except TlsError as error:
            self._refused("tls", str(error), address)
            await _farewell(wire, None, messages.Error(code=int(ErrorCode.AUTH), text=_TLS_ONLY))
        except TimeoutError:
            self._refused("slow", f"it did not tell what it is within {_STRANGER_S:g} s", address)
        except (LinkLostError, OSError) as error:
            log.debug("a connection ended before it told what it is", reason=str(error) or repr(error))
        finally:
            if not handed_over:
                wire.close()

    def _turn_away(self, sock: socket.socket, reason: str) -> None:
        """Close a connection that has no place, and say why where that costs nothing."""
        with sock, contextlib.suppress(OSError):
            if self._security.credentials is None:
                sock.setblocking(False)
                sock.send(_plain(messages.Error(code=int(ErrorCode.BUSY), text=reason)))
                sock.shutdown(socket.SHUT_WR)

    def _refused(self, kind: Refusal, reason: str, address: str) -> None:
        """Count a connection that is not taken, and log it unless there are too many."""
        self._on_refused(kind)
        if self._lines.take(1, time.monotonic()):
            log.warning("a connection was refused", reason=reason, kind=kind, peer=address)


def _close_if_cancelled(wire: Wire, task: asyncio.Task[None]) -> None:
    """Close a connection whose task was cancelled: one that had not begun could not do so itself."""
    if task.cancelled():
        wire.close()


def _is_served(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(str(path)) != errno.ECONNREFUSED


def _no(first: Message | None, reason: str) -> Message:
    """The answer to a peer that may not do what it wants."""
    if isinstance(first, messages.Hello):
        return messages.Refuse(code=int(ErrorCode.AUTH), reason=reason[:2000])
    return messages.Error(code=int(ErrorCode.AUTH), text=reason[:2000])


def _plain(message: Message) -> bytes:
    """A preface and a first frame, for a peer whose own preface was not read."""
    return pack_preface(OUR_MAX_PAYLOAD_BYTES) + messages.frame_head(MAJOR, message, sequence=0)


async def _farewell(wire: Wire, connection: Connection | None, message: Message) -> None:
    """Tell a peer why it is refused, as far as it can be told, and wait until it has heard it: a socket that is closed
    with something unread resets the connection, and the last words could be lost with it."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, TimeoutError, LinkLostError):
        async with asyncio.timeout(_FAREWELL_S):
            if connection is not None:
                await sockets.send_first(connection, message)
            elif wire.tls is not None and wire.tls.plain_peer:
                await loop.sock_sendall(wire.sock, _plain(message))
            wire.sock.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(wire.sock, READ_BYTES):
                pass
