"""The way of an answer: the session's control channel, or the fresh connection that asked for an outcome."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from migrated.link.sockets import Connection, send_first
from protocol.messages import Message


class Reply(Protocol):
    """Takes one message for the peer."""

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Send a message. Raises LinkLostError when the peer cannot be reached."""


class Nobody:
    """Takes answers that nobody waits for."""

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Drop the answer."""


class OneAnswer:
    """A fresh connection that asked for an outcome: it gets the first message that is sent to it, and is closed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Take the answer; only the first counts."""
        del payload  # an outcome has none
        if not self._answer.done():
            self._answer.set_result(message)

    async def deliver(self, timeout_s: float) -> None:
        """Wait for the answer, at most ``timeout_s``, send it and close the connection."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._answer
                with contextlib.suppress(OSError):
                    await send_first(self._connection, message)
        except TimeoutError:
            pass  # no answer yet: the source asks again
        finally:
            self._connection.wire.close()
