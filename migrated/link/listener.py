"""The listening side: accepts connections and hands each over with its first message, which tells what it is."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from migrated.config import Address
from migrated.errors import LinkLostError
from migrated.link import sockets
from migrated.link.sockets import Agreed
from migrated.tasks import TaskSet
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.messages import Message

log = structlog.get_logger()

_STRANGER_S = 10.0
"""A connection that has not told what it is by then is dropped."""

Handler = Callable[[Message, socket.socket, Agreed], Coroutine[Any, Any, None]]


class Listener:
    """Accepts migration connections.

    Args:
        handler: called with the first message of each connection; owns the socket from then on. When it raises
            ``RemoteProtocolError`` the peer is told and the connection closed.
        user_timeout_s: TCP user timeout of accepted connections.
    """

    def __init__(self, handler: Handler, user_timeout_s: float) -> None:
        self._handler = handler
        self._user_timeout_s = user_timeout_s
        self._socket: socket.socket | None = None
        self._tasks = TaskSet()
        self.address: Address | None = None

    async def start(self, address: Address, inherited: socket.socket | None = None) -> None:
        """Listen.

        Args:
            inherited: a socket from the service manager, used instead of binding one.

        Raises:
            OSError: the address cannot be bound.
        """
        if inherited is not None:
            sock = inherited
        else:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            family, kind, number, _, where = found[0]
            sock = socket.socket(family, kind, number)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(where)
            except BaseException:
                sock.close()
                raise
        sock.setblocking(False)
        sock.listen(128)
        self._socket = sock
        host, port = sock.getsockname()[:2]
        self.address = Address(host, port)
        self._tasks.start(self._accept(sock))

    async def stop(self) -> None:
        """Stop listening; connections that were handed over go on."""
        await self._tasks.stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
            except OSError as error:
                log.error("a connection could not be accepted", reason=error.strerror)
                await asyncio.sleep(0.1)  # out of descriptors: let some be freed
                continue
            self._tasks.start(self._welcome(sock))

    async def _welcome(self, sock: socket.socket) -> None:
        agreed: Agreed | None = None
        handed_over = False
        try:
            sock.setblocking(False)
            sockets.tune(sock, self._user_timeout_s)
            async with asyncio.timeout(_STRANGER_S):
                agreed = await sockets.accept_preface(sock)
                first = await sockets.read_first(sock, agreed)
            await self._handler(first, sock, agreed)
            handed_over = True
        except RemoteProtocolError as error:
            log.warning("a connection was refused", reason=str(error))
            if agreed is not None:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(1.0):
                        await sockets.send_first(sock, agreed, messages.Error.about(error))
        except (LinkLostError, OSError, TimeoutError) as error:
            log.debug("a connection ended before it told what it is", reason=str(error) or repr(error))
        finally:
            if not handed_over:
                sock.close()
