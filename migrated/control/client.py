"""A client of the control socket, as migratectl uses it: commands, out-of-band commands, and events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

MAX_REPLY_BYTES: Final = 1 << 30
CONNECT_TIMEOUT_S: Final = 5.0
EVENTS_KEPT: Final = 4096
"""Events kept while nobody asks for them; the oldest go first."""


class DaemonUnreachableError(Exception):
    """No daemon answers at the control socket, or it hung up before it answered."""


class CommandError(Exception):
    """The daemon's error reply.

    Attributes:
        kind: QMP's error class.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ControlClient:
    """One connection to a daemon. Commands may run side by side; each gets its own answer."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._arrived = asyncio.Event()
        self._lost: DaemonUnreachableError | None = None
        self._receiving: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path, timeout: float = CONNECT_TIMEOUT_S) -> Self:
        """Connect and negotiate.

        Raises:
            DaemonUnreachableError: nobody listens there, we may not, or no QMP greeting comes in time.
        """
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(path, limit=MAX_REPLY_BYTES)
                client = cls(path, reader, writer)
                try:
                    await client._negotiate()
                except BaseException:
                    await client.close()
                    raise
        except (OSError, ValueError, TimeoutError) as error:
            raise DaemonUnreachableError(_unreachable(path, error)) from error
        return client

    async def _negotiate(self) -> None:
        if "QMP" not in json.loads(await self._reader.readline() or b"{}"):
            raise ValueError("what answers there does not speak QMP")
        self._receiving = asyncio.create_task(self._receive())
        await self.command("qmp_capabilities", {"enable": ["oob"]})

    async def command(self, name: str, arguments: dict[str, Any] | None = None, *, oob: bool = False) -> Any:
        """Execute a command and return its result.

        Args:
            oob: execute out of band: at once, past the commands that are queued.

        Raises:
            CommandError: the daemon's error reply.
            DaemonUnreachableError: the daemon hung up.
        """
        if self._lost is not None:
            raise self._lost
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        request = {"exec-oob" if oob else "execute": name, "arguments": arguments or {}, "id": number}
        try:
            self._writer.write(json.dumps(request).encode() + b"\n")
            return await answer
        finally:
            self._pending.pop(number, None)

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Events from the connection's begin on, as they come; several iterators share them out.

        Raises:
            DaemonUnreachableError: the daemon hung up.
        """
        while True:
            while self._events:
                yield self._events.popleft()
            if self._lost is not None:
                raise self._lost
            self._arrived.clear()
            await self._arrived.wait()

    async def close(self) -> None:
        """Hang up. Commands in flight fail; closing twice is fine."""
        if self._receiving is not None:
            self._receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiving
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _receive(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self._events.append(message)
                    self._arrived.set()
                else:
                    self._answer(message)
        except (ConnectionError, ValueError):
            pass
        finally:
            self._lost = DaemonUnreachableError(
                f"The daemon at {self._path} closed the connection before it answered; see its log, start it again if "
                "it stopped, and ask for the outcome with 'migratectl status' or 'migratectl history'."
            )
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(self._lost)
            self._arrived.set()

    def _answer(self, message: dict[str, Any]) -> None:
        answer = self._pending.get(message.get("id", 0))
        if answer is None or answer.done():
            return
        if "error" in message:
            error = message["error"]
            answer.set_exception(CommandError(error["class"], error["desc"]))
        else:
            answer.set_result(message["return"])


def _unreachable(path: Path, error: Exception) -> str:
    match error:
        case FileNotFoundError():
            reason, action = "there is no such socket", "start the daemon, or name its socket"
        case ConnectionRefusedError() if not path.is_socket():
            reason, action = "it is no socket", "name the daemon's socket"
        case ConnectionRefusedError():
            reason, action = "nobody listens there", "start the daemon"
        case PermissionError():
            reason, action = "permission denied", "run as the daemon's user or a member of its group"
        case TimeoutError():
            reason, action = "it does not answer", "look at the daemon's log"
        case OSError():
            reason, action = str(error.strerror or error), "name the daemon's socket"
        case _:
            reason, action = str(error), "name the daemon's socket"
    return f"The daemon is not reachable at {path}: {reason}; {action} (--socket PATH or $MIGRATED_SOCKET)."
