"""QEMU's guest agent, for one thing: to set the wall clock of a guest that has just moved.

guest-sync        what an earlier client left unread is skipped
guest-get-time    how far the guest's clock is behind, and how long a question takes
guest-set-time    this host's time, and half of that
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import Any

from migrated.base.errors import VmmError


async def set_wall_clock(agent_socket: Path, timeout_s: float) -> int:
    """Set the guest's wall clock to this host's. Returns by how much it was behind (ns), negative when ahead.

    Args:
        agent_socket: the unix socket of the agent's port.
        timeout_s: bound of all of it; the guest may have no agent running, or an agent that is slow to answer.

    Raises:
        VmmError: the agent does not answer, or refuses; the sentence says which.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(str(agent_socket))
            try:
                await _synchronise(reader, writer)
                asked_ns = time.time_ns()
                guest_ns = await _call(reader, writer, "guest-get-time")
                leg_ns = (time.time_ns() - asked_ns) // 2
                if type(guest_ns) is not int:
                    raise VmmError("the guest agent answered guest-get-time with something that is no time")
                await _call(reader, writer, "guest-set-time", time=time.time_ns() + leg_ns)
                return asked_ns + leg_ns - guest_ns
            finally:
                writer.close()
    except TimeoutError as error:
        raise VmmError(
            f"the guest agent behind {agent_socket} did not answer within {timeout_s:g} s: is qemu-guest-agent running "
            "in the guest?"
        ) from error
    except (OSError, ValueError) as error:
        raise VmmError(f"the guest agent behind {agent_socket} cannot be asked: {error}") from error


async def _synchronise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    number = secrets.randbelow(1 << 31)
    _send(writer, "guest-sync", id=number)
    while await _answer(reader) != {"return": number}:
        pass


async def _call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str, **arguments: Any) -> Any:
    _send(writer, command, **arguments)
    answer = await _answer(reader)
    if not isinstance(answer, dict) or "return" not in answer:
        raise VmmError(f"the guest agent refused {command}: {str(answer)[:200]}")
    return answer["return"]


def _send(writer: asyncio.StreamWriter, command: str, **arguments: Any) -> None:
    writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")


async def _answer(reader: asyncio.StreamReader) -> Any:
    line = await reader.readline()
    if not line:
        raise VmmError("the guest agent's port was closed")
    return json.loads(line)
