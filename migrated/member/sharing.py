"""Gives the idle shares of this host's link to migrations of jobs that are in their first round
(``migrated.fleet.shares``).

    while a migration of a job runs, every 50 ms: stages, promises -> paces of the first rounds
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from migrated.base.tasks import TaskSet
from migrated.fleet.shares import Promised, first_round_paces
from migrated.member.follower import Follower
from migrated.member.local import LocalHost

_LOOK_AGAIN_S: Final = 0.05
"""Longest time for which a migration that begins to send finds its share used by another one."""


class _Share(NamedTuple):
    """A migration's share of the link to its destination."""

    destination: str
    bytes_per_s: int


class LinkSharing:
    """The shares of this host's link.

    Args:
        local: this host.
        follower: the mirror.
        host: this host's name in the fleet.
    """

    def __init__(self, local: LocalHost, follower: Follower, host: str) -> None:
        self._local = local
        self._follower = follower
        self._host = host
        self._shares: dict[str, _Share] = {}
        """By migration id, the first to begin first."""
        self._tasks = TaskSet()
        self._pacing: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def share(self, migration_id: str, destination: str, bytes_per_s: int) -> Iterator[None]:
        """Know of the share of a migration that runs meanwhile."""
        self._shares[migration_id] = _Share(destination, bytes_per_s)
        if self._pacing is None or self._pacing.done():
            self._pacing = self._tasks.start(self._pace())
        try:
            yield
        finally:
            del self._shares[migration_id]

    async def close(self) -> None:
        """Stop; migrations keep the pace that they have."""
        await self._tasks.stop()

    async def _pace(self) -> None:
        """Pace first rounds until no migration is left."""
        told: dict[str, int] = {}
        while self._shares:
            promised = {
                name: Promised(share.destination, share.bytes_per_s, self._local.stage(name))
                for name, share in self._shares.items()
            }
            paces = first_round_paces(self._follower.mirror, self._host, promised)
            for name, pace in paces.items():
                if told.get(name) != pace:
                    self._local.pace_first_round(name, pace)
            told = paces
            await asyncio.sleep(_LOOK_AGAIN_S)
