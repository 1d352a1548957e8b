"""A guest agent that says what it is told to, where a guest has none of its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

BEHIND_NS: Final = 3_000_000_000
"""How far the clock of its guest is behind."""
Answers: TypeAlias = Mapping[str, Callable[[dict[str, Any]], object]]
RIGHT: Final[Answers] = {
    "guest-sync": lambda arguments: {"return": arguments["id"]},
    "guest-get-time": lambda _: {"return": time.time_ns() - BEHIND_NS},
    "guest-set-time": lambda _: {"return": {}},
}
"""The answers of one that does what it is asked."""


@asynccontextmanager
async def scripted_agent(path: Path, answers: Answers) -> AsyncIterator[list[str]]:
    """An agent that answers these commands, after a line that an earlier client left. Gives what it was asked."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"return": {"left": "over"}}\n')
        while line := await reader.readline():
            request = json.loads(line)
            asked.append(request["execute"])
            answer = answers[request["execute"]](request["arguments"])
            writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        yield asked
