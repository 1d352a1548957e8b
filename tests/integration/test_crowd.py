"""Twenty clients on each control socket, one of which asks without end and reads nothing, while a guest migrates.

The migration completes, the daemon answers the others meanwhile, all of them hear of everything in order, and what is
kept for the one that does not read is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.control.client import ControlClient
from scripts.basics import MIB
from scripts.rig.pair import Pair

READERS = 19
ANSWER_S = 5.0
"""A daemon that works answers within milliseconds; this machine may be busy with other things."""
FLOOD_BYTES = 64 * MIB
IN_FLIGHT_BYTES = 8 * MIB
GROWTH_BYTES = 48 * MIB


class Deaf:
    """A client that negotiates, then sends requests of both kinds for as long as anybody takes them."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.sendall(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n')
        self._socket.setblocking(False)
        self.sent_bytes = 0

    async def ask(self, request: bytes, quiet_s: float) -> None:
        """Send it again and again, until nothing was taken for so long, or FLOOD_BYTES were."""
        loop = asyncio.get_running_loop()
        block = request * (MIB // len(request))
        with contextlib.suppress(TimeoutError):
            while self.sent_bytes < FLOOD_BYTES:
                await asyncio.wait_for(loop.sock_sendall(self._socket, block), quiet_s)
                self.sent_bytes += len(block)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def deaf(pair: Pair) -> Iterator[list[Deaf]]:
    """One on each host."""
    clients = [Deaf(host.socket) for host in pair.hosts]
    yield clients
    for client in clients:
        client.close()


async def pinged(clients: list[ControlClient], ended: asyncio.Event) -> list[float]:
    """Ask in turn until it is enough. Returns how long every answer took (s)."""
    took = []
    while not ended.is_set():
        for client in clients:
            begin = time.monotonic()
            await asyncio.wait_for(client.command("query-version"), ANSWER_S)
            took.append(time.monotonic() - begin)
    return took


async def statuses(client: ControlClient) -> list[str]:
    """What a client hears of a migration, to its end."""
    heard: list[str] = []
    async for event in client.events():
        if event["event"] == "MIGRATION":
            heard.append(event["data"]["status"])
            if heard[-1] in ("completed", "failed", "cancelled"):
                break
    return heard


@pytest.mark.parametrize(
    "request_", [b'{"execute": "query-commands"}\n', b'{"exec-oob": "migrate_cancel", "arguments": {"guest": "no"}}\n']
)
async def test_a_crowd_with_one_that_does_not_read_changes_nothing(
    pair: Pair, deaf: list[Deaf], request_: bytes
) -> None:
    await pair.a.create_guest("g1", 64, workload="hot-cold", dirty_rate_bytes_per_s=20 * MIB)
    async with contextlib.AsyncExitStack() as stack:
        crowds: list[list[ControlClient]] = [
            [await stack.enter_async_context(await ControlClient.connect(host.socket)) for _ in range(READERS)]
            for host in pair.hosts
        ]
        before = [host.anonymous_bytes() for host in pair.hosts]
        await asyncio.gather(*(client.ask(request_, 1.0) for client in deaf))
        assert all(client.sent_bytes < IN_FLIGHT_BYTES for client in deaf), "reading has stopped"
        ended = asyncio.Event()
        asking = [asyncio.create_task(pinged(crowd[:3], ended)) for crowd in crowds]
        hearing = [asyncio.create_task(statuses(client)) for crowd in crowds for client in crowd]
        record: dict[str, Any] = await pair.a.migrate("g1", pair.b, downtime_limit=20_000)
        heard = await asyncio.wait_for(asyncio.gather(*hearing), ANSWER_S)
        ended.set()
        answers = await asyncio.gather(*asking)
    assert record["outcome"] == "completed", record["reason"]
    assert (await pair.b.verify())["ok"]
    assert all(len(took) >= 3 for took in answers)
    for index in range(READERS):
        assert heard[index] == ["active", "device", "completed"]
        assert heard[READERS + index][-2:] == ["device", "completed"]
    grown = [host.anonymous_bytes() - held for host, held in zip(pair.hosts, before, strict=True)]
    assert all(bytes_ < GROWTH_BYTES for bytes_ in grown), grown
