"""A case, with well-behaved migrations on the same daemons beside it, and what it cost those.

attack           |------------------------|
a guest          a -> b -> a -> b ...     |    each within its limit, verified at the end
both daemons     watched: how late they answer, and their memory
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

from migrated.control.client import CommandError
from scripts.basics import MIB
from scripts.hostile.ground import LIMIT_MS, Case, Ground, NotHeldError
from scripts.hostile.watch import Watched, watching
from scripts.rig.waiting import RigError

HONEST: Final = "honest"
HONEST_MIB: Final = 32
_DIRTY_BYTES_PER_S: Final = 10 * MIB
_TIMEOUT_S: Final = 30
_CASE_S: Final = 60.0


@dataclass(slots=True)
class Found:
    """What became of a case and of the migrations beside it.

    Attributes:
        wrong: sentences for everything that did not hold.
        downtimes_ms: of the migrations beside it.
        watched: by the name of the host.
    """

    name: str
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    downtimes_ms: list[float] = field(default_factory=list)
    watched: dict[str, Watched] = field(default_factory=dict)

    @property
    def lag_p99_ms(self) -> float:
        """Of the daemon that answered later."""
        return max((watched.lag_p99_ms for watched in self.watched.values()), default=0.0)

    def memory_ratio(self, undisturbed: Found) -> float:
        """The most memory of a daemon by what it has without an attack, for the daemon that took more."""
        return max(
            (watched.peak_bytes / undisturbed.watched[name].peak_bytes for name, watched in self.watched.items()),
            default=0.0,
        )


async def create_honest(ground: Ground) -> None:
    """Start the guest that migrates beside the cases."""
    await ground.pair.a.create_guest(HONEST, HONEST_MIB, workload="hot-cold", dirty_rate_bytes_per_s=_DIRTY_BYTES_PER_S)


async def migrate_honest(ground: Ground, limit_ms: int = LIMIT_MS) -> dict[str, Any]:
    """Migrate it to the other host, under a limit of its downtime. Returns the record."""
    pair = ground.pair
    here = pair.a if HONEST in await pair.a.guests() else pair.b
    return await here.migrate(HONEST, pair.other(here), downtime_limit=limit_ms, timeout_s=_TIMEOUT_S)


async def undisturbed(ground: Ground, migrations: int) -> Found:
    """The same migrations with nothing beside them."""
    found = Found("undisturbed")
    async with watching(ground.pair.hosts) as watched:
        for _ in range(migrations):
            await move(ground, found)
    found.watched = {host.name: shown for host, shown in watched.items()}
    return found


async def move(ground: Ground, found: Found, limit_ms: int = LIMIT_MS) -> None:
    """One migration beside a case, with its figures."""
    record = await migrate_honest(ground, limit_ms)
    if record["outcome"] != "completed":
        found.wrong.append(f"a migration beside it is {record['outcome']}: {record['reason']}")
    else:
        found.downtimes_ms.append(record["downtime"]["measured_ns"] / 1e6)


async def _beside(ground: Ground, case: Case, limit_ms: int) -> Found:
    """Run a case, with at least one migration that begins after it."""
    found = Found(case.name)

    async def attack() -> None:
        try:
            async with asyncio.timeout(_CASE_S):
                await case.attack(ground)
        except (NotHeldError, RigError, CommandError, TimeoutError) as error:
            found.wrong.append(str(error) or f"the attack did not end within {_CASE_S:g} s")

    attacking = asyncio.create_task(attack())
    if case.alone:
        await attacking
    try:
        await move(ground, found, limit_ms)
        while not attacking.done():
            await move(ground, found, limit_ms)
    finally:
        await attacking
    if found.downtimes_ms and max(found.downtimes_ms) > limit_ms:
        found.wrong.append(f"a migration beside it stood still for {max(found.downtimes_ms):.0f} ms")
    return found


async def run_case(ground: Ground, case: Case, limit_ms: int = LIMIT_MS, *, watch: bool = False) -> Found:
    """Run a case beside well-behaved migrations, and look at what became of both, and at what is left.

    Args:
        limit_ms: of the downtime of the migrations beside it.
        watch: whether to watch both daemons meanwhile; those of a case that breaks a host are restarted in it, and
            never watched.
    """
    begin_s = time.monotonic()
    if watch and not case.alone:
        async with watching(ground.pair.hosts) as watched:
            found = await _beside(ground, case, limit_ms)
        found.watched = {host.name: shown for host, shown in watched.items()}
    else:
        found = await _beside(ground, case, limit_ms)
    found.wrong += await ground.pair.leftovers()
    host = ground.pair.a if HONEST in await ground.pair.a.guests() else ground.pair.b
    if not (verdict := await host.verify(HONEST))["ok"]:
        found.wrong.append(f"the guest beside it is damaged: {verdict['message']}")
    found.seconds = time.monotonic() - begin_s
    return found
