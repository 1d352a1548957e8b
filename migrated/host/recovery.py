"""Recovery after a restart: open attempts of the journal, and abandoned incoming guests.

Nothing is decided about a guest of which nothing is known: the attempts of a guest that does not answer wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from migrated.base.errors import VmmError
from migrated.base.tasks import TaskSet
from migrated.destination.origin import Origin
from migrated.destination.recovery import RecoveredTakeover
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.link.reply import Nobody
from migrated.observe.progress import Progress
from migrated.source.recovery import RecoveredHandover
from migrated.state.journal import Attempt
from protocol.answers import newer_epoch

log = structlog.get_logger()


class Recovery:
    """The attempts that were taken up again.

    Args:
        env: the daemon.
        tasks: where they run.
    """

    def __init__(self, env: Environment, tasks: TaskSet) -> None:
        self._env = env
        self._tasks = tasks
        self._postponed: list[Attempt] = []
        self._outgoing: dict[str, RecoveredHandover] = {}
        self._incoming: dict[str, RecoveredTakeover] = {}

    async def start(self) -> None:
        """Finish or undo the open attempts, once the guests that run have been found."""
        guests, journal = self._env.guests, self._env.journal
        current, overtaken = journal.open_attempts()
        for attempt in overtaken:
            log.warning("an attempt that a later one has overtaken is closed", migration_id=attempt.migration_id)
            journal.close_attempt(attempt.migration_id, attempt.role, overtaken=True)
        for attempt in current:
            if attempt.place in guests.silent:
                log.error("an open attempt waits for its guest to answer", guest=attempt.guest, role=attempt.role)
                self._postponed.append(attempt)
            else:
                self._take_up(attempt)
        await asyncio.gather(*(self._discard_abandoned(guest) for guest in guests.all()))

    def guest_settled(self, place: str) -> None:
        """A guest that was silent when this daemon began has answered, or ended."""
        waiting = [attempt for attempt in self._postponed if attempt.place == place]
        self._postponed = [attempt for attempt in self._postponed if attempt.place != place]
        for attempt in waiting:
            self._take_up(attempt)
        if (guest := self._env.guests.find_at(place)) is not None:
            self._tasks.start(self._discard_abandoned(guest))

    def postponed_of(self, place: str) -> str | None:
        """The id of an open attempt that waits for the guest at a place to answer, None when there is none."""
        return next((attempt.migration_id for attempt in self._postponed if attempt.place == place), None)

    def takeover(self, migration_id: str) -> RecoveredTakeover | None:
        """An incoming attempt that was taken up again, None when it is not one."""
        return self._incoming.get(migration_id)

    def sources_of(self, guest: str) -> list[Origin]:
        """The hosts that a guest was coming from when the last daemon ended, where that is not decided yet."""
        return [recovered.source for recovered in self._incoming.values() if recovered.is_open_for(guest)]

    async def end_older(self, guest: str, epoch: int) -> None:
        """End every older attempt of a guest that is offered with a newer epoch."""
        for recovered in self._incoming.values():
            if recovered.is_older_than(guest, epoch) and (event := newer_epoch(recovered.state)) is not None:
                await recovered.take(event, Nobody())

    async def resolve(self, migration_id: str, run_here: bool) -> bool:
        """End an outgoing attempt by the operator's word. Returns False when it is not one that is in doubt here."""
        recovered = self._outgoing.get(migration_id)
        return recovered is not None and await recovered.resolve(run_here)

    def progress(self) -> list[Progress]:
        """A snapshot of every outgoing attempt."""
        return [recovered.progress() for recovered in self._outgoing.values()]

    async def close(self) -> None:
        """Stop asking; the journal keeps the open attempts."""
        for recovered in self._outgoing.values():
            await recovered.close()

    def _take_up(self, attempt: Attempt) -> None:
        guest = self._env.guests.find_at(attempt.place)
        if attempt.role == "source":
            outgoing = self._outgoing[attempt.migration_id] = RecoveredHandover(self._env, attempt, guest)
            self._tasks.start(outgoing.run())
        else:
            incoming = self._incoming[attempt.migration_id] = RecoveredTakeover(self._env, attempt, guest)
            self._tasks.start(incoming.run())

    async def _discard_abandoned(self, guest: Guest) -> None:
        """End an incoming guest that no attempt knows of: its daemon ended before it journaled the attempt."""
        with contextlib.suppress(VmmError):
            if guest.migration_id is None and (await guest.vmm.status()).state == "incoming":
                log.warning("an incoming guest of a migration that never began is discarded", guest=guest.name)
                await self._env.guests.destroy(guest)
