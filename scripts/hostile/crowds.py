"""Many honest ones at once: idle peers, idle clients, migrations side by side."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from migrated.base.errors import LinkLostError
from migrated.control.client import ControlClient
from scripts.hostile.ground import SIDE_BY_SIDE, Case, Ground, NotHeldError, addresses
from scripts.rig.hostile import Hostile

PEERS: Final = 200
CLIENTS: Final = 100
_LIMIT_MS: Final = 1000
"""Eight guests that stand still at once share two processors."""
_HOLD_S: Final = 4.0


async def idle_peers(ground: Ground) -> None:
    """Two hundred certified peers that have finished their handshakes and say nothing."""
    held: list[Hostile] = []
    try:
        for address in addresses(PEERS):
            with contextlib.suppress(LinkLostError, OSError, TimeoutError):
                held.append(await ground.connect(address))
        await asyncio.sleep(_HOLD_S)
    finally:
        for peer in held:
            peer.wire.close()
    if len(held) < PEERS:
        raise NotHeldError(f"{PEERS - len(held)} of {PEERS} peers could not finish their handshake")


async def idle_clients(ground: Ground) -> None:
    """A hundred clients of each control socket that listen to events."""
    async with contextlib.AsyncExitStack() as stack:
        for host in ground.pair.hosts:
            for _ in range(CLIENTS):
                await stack.enter_async_context(await ControlClient.connect(host.socket))
        await asyncio.sleep(_HOLD_S)


async def side_by_side(ground: Ground) -> None:
    """Eight guests that migrate at the same time, there and back."""
    names = [f"side{number}" for number in range(SIDE_BY_SIDE)]
    here, there = ground.pair.hosts
    for name in names:
        await here.create_guest(name, 32, workload="idle")
    try:
        for _ in range(2):
            records = await asyncio.gather(
                *(here.migrate(name, there, downtime_limit=_LIMIT_MS, timeout_s=60) for name in names)
            )
            for record in records:
                if record["outcome"] != "completed":
                    raise NotHeldError(f"one of eight at once is {record['outcome']}: {record['reason']}")
            here, there = there, here
        for name in names:
            if not (await here.verify(name))["ok"]:
                raise NotHeldError(f"guest {name} is damaged")
    finally:
        for host in ground.pair.hosts:
            for name in set(names) & set(await host.guests()):
                await host.command("x-migrated-guest-destroy", {"guest": name})


CASES: Final = (
    Case("200 idle peers", idle_peers, brief=False),
    Case("100 idle clients on each control socket", idle_clients, brief=False),
    Case("8 migrations at once", side_by_side, brief=False, most_memory=2.0),  # they have the buffers of eight
)
