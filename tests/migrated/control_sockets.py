"""A client of the control socket that sends and reads exactly what a test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

TIMEOUT_S = 20.0


class Raw:
    """A client that sends and reads exactly what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, message: Any) -> None:
        self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode())

    async def receive(self) -> Any:
        line = await asyncio.wait_for(self.reader.readline(), TIMEOUT_S)
        assert line.endswith(b"\r\n"), line
        assert line.isascii()
        return json.loads(line)

    async def reply(self) -> Any:
        """The next message that is no event."""
        while "event" in (message := await self.receive()):
            pass
        return message

    async def ask(self, name: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        self.send({"execute": name, "arguments": arguments or {}} | more)
        return await self.reply()

    async def closed(self) -> bytes:
        """What is left until the server hangs up."""
        return await asyncio.wait_for(self.reader.read(), TIMEOUT_S)


@contextlib.asynccontextmanager
async def connected(path: Path, *, negotiate: bool = True, oob: bool = False) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 26)
    client = Raw(reader, writer)
    try:
        if negotiate:
            assert "QMP" in await client.receive()
            arguments = {"enable": ["oob"]} if oob else {}
            assert await client.ask("qmp_capabilities", arguments) == {"return": {}}
        yield client
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def error(kind: str, description: str) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": description}}
