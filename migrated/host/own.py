"""Connections of a daemon to itself, over which a guest gets another VMM on the same host: the one daemon is source and
destination then, and both go by the same messages as two daemons would.

    source: OwnPlace.open -> one end | the other end -> prefaces, first message -> IncomingAttempts.connected
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

import structlog

from migrated.base.errors import LinkLostError
from migrated.base.tasks import TaskSet
from migrated.host.incoming import IncomingAttempts
from migrated.link import sockets
from migrated.link.sockets import Connection, Wire
from migrated.vmm.seam import Replacement
from protocol.errors import RemoteProtocolError

log = structlog.get_logger()

_FIRST_S: Final = 10.0
"""How long this daemon may take to send itself a first message."""


class OwnConnections:
    """Takes what this daemon sends itself.

    Args:
        incoming: gets each connection with its first message.
        tasks: where connections wait for that.
    """

    def __init__(self, incoming: IncomingAttempts, tasks: TaskSet) -> None:
        self._incoming = incoming
        self._tasks = tasks

    def open(self, replacement: Replacement) -> socket.socket:
        """Connect. Returns the source's end, non-blocking.

        Args:
            replacement: what is wanted of the new VMM, should a guest be offered.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._tasks.start(self._take(Wire(theirs, None), replacement))
        return ours

    async def _take(self, wire: Wire, replacement: Replacement) -> None:
        handed_over = False
        try:
            async with asyncio.timeout(_FIRST_S):
                connection = Connection(wire, await sockets.exchange_prefaces(wire))
                first = await sockets.read_first(connection)
            await self._incoming.connected(first, connection, replacement)
            handed_over = True
        except (RemoteProtocolError, LinkLostError, OSError, TimeoutError) as error:
            log.warning("a connection of this daemon to itself ended early", reason=str(error) or repr(error))
        finally:
            if not handed_over:
                with contextlib.suppress(OSError):
                    wire.close()
