"""This host as its membership in a fleet uses it (``migrated.member.local.LocalHost``)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from migrated.base.errors import DocumentError, VmmError
from migrated.control.operations import OperationError
from migrated.environment import DaemonRole, Environment
from migrated.host.commands import target_of
from migrated.host.guests import GuestCommands
from migrated.host.incoming import IncomingAttempts
from migrated.host.outgoing import OutgoingAttempts
from migrated.host.records import FinishedRecords
from migrated.member.local import LocalGuest
from migrated.record.model import Record
from migrated.record.reading import read_record
from migrated.record.terms import Stage
from migrated.settings.parameters import MigrationParameters
from migrated.state.history import HistoryQuery
from protocol.handover import Decision

_RECORDS: Final = 50
"""Newest records that tell what the link moves and what guests cost."""


class FleetSide:
    """The parts of a host behind one interface.

    Args:
        env: the daemon.
        role: which directions it serves.
        guests, outgoing, incoming, records: of this host.
    """

    def __init__(
        self,
        env: Environment,
        role: DaemonRole,
        guests: GuestCommands,
        outgoing: OutgoingAttempts,
        incoming: IncomingAttempts,
        records: FinishedRecords,
    ) -> None:
        self._role = role
        self._env = env
        self._guests = guests
        self._outgoing = outgoing
        self._incoming = incoming
        self._records = records
        self._recent: deque[Record] = deque(maxlen=_RECORDS)

    async def load(self) -> None:
        """As ``LocalHost.load``."""
        documents = await asyncio.to_thread(self._records.query, HistoryQuery(last=_RECORDS))
        for document in documents:
            try:
                self._recent.append(read_record(document))
            except DocumentError:
                continue  # a newer version wrote it

    def finished(self, record: Record) -> None:
        """Another attempt has ended."""
        self._recent.appendleft(record)

    @property
    def role(self) -> DaemonRole:
        """As ``LocalHost.role``."""
        return self._role

    @property
    def recent(self) -> Sequence[Record]:
        """As ``LocalHost.recent``."""
        return tuple(self._recent)

    def local_guests(self) -> list[LocalGuest]:
        """As ``LocalHost.local_guests``."""
        return [
            LocalGuest(
                guest.name,
                guest.vmm.driver,
                guest.memory_bytes,
                arriving=guest.overlay == "incoming",
                in_doubt=guest.overlay == "in-doubt",
            )
            for guest in self._env.guests.all()
            if guest.overlay != "retired"
        ]

    async def offers(self) -> frozenset[str]:
        """As ``LocalHost.offers``."""
        return await self._env.guests.offers()

    async def needs(self, guest: str) -> frozenset[str] | None:
        """As ``LocalHost.needs``."""
        found = self._env.guests.find(guest)
        try:
            return await found.vmm.needs() if found is not None else None
        except VmmError:
            return None  # it is asked again

    def attempts(self) -> tuple[int, int]:
        """As ``LocalHost.attempts``."""
        return self._incoming.under_way, len(self._outgoing.running)

    def stage(self, migration_id: str) -> Stage:
        """As ``LocalHost.stage``."""
        return self._outgoing.stage(migration_id)

    def pace_first_round(self, migration_id: str, bytes_per_s: int) -> None:
        """As ``LocalHost.pace_first_round``."""
        self._outgoing.pace_first_round(migration_id, bytes_per_s)

    def parameters(self, guest: str | None) -> MigrationParameters:
        """As ``LocalHost.parameters``."""
        return self._outgoing.parameters(guest)

    async def begin_migration(self, guest: str, uri: str, overrides: dict[str, object], migration_id: str) -> None:
        """As ``LocalHost.begin_migration``."""
        if self._role == "destination":
            raise OperationError("This daemon is a destination only; run `migrated host` to migrate guests away too.")
        await self._outgoing.begin(self._guests.idle(guest), target_of(uri), overrides, migration_id)

    async def outcome(self, migration_id: str) -> dict[str, Any] | None:
        """As ``LocalHost.outcome``."""
        document = await self._outgoing.ended(migration_id)
        if document is None or document["outcome"] == "in-doubt":
            try:
                document = await asyncio.to_thread(self._records.get, migration_id)
            except OperationError as error:
                if error.kind != "DeviceNotFound":
                    raise
                return None
        return document

    def is_open(self, migration_id: str) -> bool:
        """As ``LocalHost.is_open``."""
        attempt = self._env.journal.attempt(migration_id, "source")
        return migration_id in self._outgoing.running or (attempt is not None and not attempt.closed)

    async def fence(self, guest: str, token: int) -> None:
        """As ``LocalHost.fence``."""
        for one in self._env.guests.all():
            lock = one.vmm.lock
            if one.name == guest and one.overlay is None and lock is not None and lock.token != token:
                try:
                    lock.token = token
                    await lock.carry()
                except VmmError as error:
                    lock.token = None
                    raise OperationError(f"The lock of guest {guest!r} does not take its token: {error}") from error

    def is_here(self, guest: str) -> bool:
        """As ``LocalHost.is_here``."""
        return self._env.guests.find(guest) is not None or self._env.guests.find_silent(guest) is not None

    def processes(self) -> dict[str, int]:
        """As ``LocalHost.processes``."""
        guests = self._env.guests
        silent = {one.name: one.pid for one in guests.silent.values() if one.pid is not None}
        return silent | {one.name: one.vmm.pid for one in guests.all() if one.overlay in (None, "in-doubt")}

    def discarded(self, migration_id: str) -> bool:
        """As ``LocalHost.discarded``."""
        attempt = self._env.journal.attempt(migration_id, "destination")
        return attempt is not None and Decision.DISCARD in attempt.decisions

    async def cancel(self, guest: str) -> None:
        """As ``LocalHost.cancel``."""
        await self._outgoing.cancel(guest)
