"""The outgoing attempts of this host: begun, watched, cancelled, resolved; and the parameters that they use."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, Final

from migrated.base.errors import MigrationError
from migrated.base.tasks import TaskSet
from migrated.control.operations import OperationError
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.guests.reservation import Reservation
from migrated.host.commands import asked, target_of, with_values
from migrated.observe.progress import Progress
from migrated.record.terms import Stage
from migrated.settings.parameters import MigrationParameters
from migrated.source.estimate import estimate
from migrated.source.migration import OutgoingMigration
from migrated.source.target import Target
from migrated.state.learned import keep_knowledge, keep_resume_costs
from protocol.errors import ProtocolError

_SHOWN_KEPT: Final = 256
"""Guests whose last attempt is still shown after its end."""


class OutgoingAttempts:
    """All attempts to move a guest of this host away.

    Args:
        env: the daemon.
        tasks: where they run.
    """

    def __init__(self, env: Environment, tasks: TaskSet) -> None:
        self._env = env
        self._tasks = tasks
        self._defaults = env.config.migration
        self._guest_parameters: dict[str, MigrationParameters] = {}
        self._beginning: set[str] = set()
        """Places of guests whose attempt is about to begin."""
        self._running: dict[str, OutgoingMigration] = {}
        """By migration id; those in doubt too."""
        self._last: dict[str, Callable[[], Progress]] = {}
        """Snapshots of the last one of each guest since the daemon's start."""

    # Section: attempts

    async def begin(
        self, guest: Guest, target: Target, overrides: dict[str, object], migration_id: str | None = None
    ) -> str:
        """Begin to move an idle guest. Returns the migration id, which is a new one unless it is given."""
        parameters = with_values(self.parameters(guest.name), overrides)
        migration_id = migration_id or secrets.token_hex(16)
        if guest.place in self._beginning:  # a second word to the keeper would make the first one's void
            raise OperationError(f"guest {guest.name!r} is already being migrated: its migration is about to begin")
        self._beginning.add(guest.place)
        try:
            if (keeper := self._env.keeper) is not None:
                refusal = await keeper.begin(guest.name, target.uri, migration_id)
                if refusal is not None:
                    raise OperationError(refusal)
            status = await asked(guest.vmm.status())
        finally:
            self._beginning.discard(guest.place)
        if guest.migration_id is not None:
            raise OperationError(f"guest {guest.name!r} is already being migrated (migration {guest.migration_id})")
        epoch = self._env.journal.next_epoch(guest.name, status.epoch)
        reservation = Reservation(guest, migration_id)
        migration = OutgoingMigration(self._env, guest, reservation, target, parameters, migration_id, epoch)
        self._running[migration_id] = migration
        self._last[guest.name] = migration.progress
        self._tasks.start(self._run(migration, reservation))
        return migration_id

    async def _run(self, migration: OutgoingMigration, reservation: Reservation) -> None:
        try:
            with reservation:
                await migration.run()
        finally:
            self._running.pop(migration.migration_id, None)
            self._show_as_ended(migration)
            if self._env.guests.find(migration.guest_name) is None:
                self.forget_parameters(migration.guest_name)  # the next guest of this name is another one
            directory = self._env.config.state.directory
            await asyncio.to_thread(keep_knowledge, directory, self._env.knowledge)
            await asyncio.to_thread(keep_resume_costs, directory, self._env.resume_costs.document())

    def _show_as_ended(self, migration: OutgoingMigration) -> None:
        """Show the last snapshot from now on, not the attempt, which holds all that it had."""
        last = migration.progress()
        if self._last.get(migration.guest_name) == migration.progress:
            self._last[migration.guest_name] = lambda: last
        ended = [name for name in self._last if not self._of(name)]
        for name in ended[: max(0, len(ended) - _SHOWN_KEPT)]:
            del self._last[name]

    async def estimate(self, guest: Guest, uri: str, overrides: dict[str, object]) -> dict[str, Any]:
        """Predict the cost of moving an idle guest, without moving it."""
        target = target_of(uri)
        parameters = with_values(self.parameters(guest.name), overrides)
        try:
            with Reservation(guest, "estimate"):
                return await estimate(self._env, guest, target, parameters)
        except (MigrationError, ProtocolError, OSError) as error:
            raise OperationError(str(error)) from error

    async def ended(self, migration_id: str) -> dict[str, Any] | None:
        """Wait for the end of an attempt, or for its being in doubt. Returns its record document, None when no such
        attempt is under way."""
        migration = self._running.get(migration_id)
        if migration is None:
            return None
        await migration.decided.wait()
        if migration.record is None:
            raise OperationError(f"migration {migration_id} ended without a record; the daemon's log says why")
        return migration.record.document()

    async def cancel(self, guest: str) -> None:
        """Cancel the attempt of a guest.

        Raises:
            OperationError: it is too late.
        """
        for migration in self._of(guest):
            if not await migration.cancel():
                raise OperationError(
                    f"the migration of {guest!r} cannot be cancelled any more: COMMIT was sent and the destination "
                    f"may run the guest (status {migration.status})"
                )

    async def resolve(self, migration_id: str, run_here: bool) -> bool:
        """End an attempt in doubt by the operator's word. Returns False when it is not one that is in doubt."""
        migration = self._running.get(migration_id)
        return migration is not None and await migration.resolve(run_here)

    def continue_switchover(self, guest: str) -> None:
        """Let a held switchover go on.

        Raises:
            OperationError: none is held.
        """
        if not any(migration.continue_switchover() for migration in self._of(guest)):
            status = self._last[guest]().status if guest in self._last else "none"
            raise OperationError(f"Migration not in expected state: {status}; only a held switchover can be continued")

    def guest_gone(self, guest: Guest) -> None:
        """A guest's process ended by itself."""
        migration = self._running.get(guest.migration_id or "")
        if migration is not None:
            migration.guest_gone()

    @property
    def running(self) -> frozenset[str]:
        """Ids of the attempts under way, those in doubt too."""
        return frozenset(self._running)

    def stage(self, migration_id: str) -> Stage:
        """How far an attempt has come with the sending of memory; one that is not under way sends nothing."""
        migration = self._running.get(migration_id)
        return "setting-up" if migration is None else migration.stage

    def pace_first_round(self, migration_id: str, bytes_per_s: int) -> None:
        """Let the first round of an attempt go faster or slower than its cap, if it has not ended."""
        if (migration := self._running.get(migration_id)) is not None:
            migration.pace_first_round(bytes_per_s)

    def knows(self, guest: str) -> bool:
        """Return whether an attempt to move a guest of this name was made since the daemon's start."""
        return guest in self._last

    def progress(self) -> list[Progress]:
        """A snapshot of the last attempt of every guest."""
        return [progress() for progress in self._last.values()]

    async def cancel_all(self, reason: str) -> list[OutgoingMigration]:
        """Cancel the attempts that can be cancelled. Returns all that were under way."""
        under_way = list(self._running.values())
        for migration in under_way:
            await migration.cancel(reason)
        return under_way

    def _of(self, guest: str) -> list[OutgoingMigration]:
        return [migration for migration in self._running.values() if migration.guest_name == guest]

    # Section: parameters

    def parameters(self, guest: str | None) -> MigrationParameters:
        """Return the parameters of a guest's running attempt, or of its next one; ``guest`` None: the defaults."""
        if guest is None:
            return self._defaults
        for migration in self._of(guest):
            return migration.parameters
        return self._guest_parameters.get(guest, self._defaults)

    def set_parameters(self, guest: str, values: dict[str, object]) -> None:
        """Change parameters of a guest, and of its attempt under way."""
        self._guest_parameters[guest] = with_values(self._guest_parameters.get(guest, self._defaults), values)
        for migration in self._of(guest):  # parameters given to this attempt alone stay with it
            migration.set_parameters(with_values(migration.parameters, values))

    def forget_parameters(self, guest: str) -> None:
        """A guest is no longer here: one of the same name begins with the defaults."""
        self._guest_parameters.pop(guest, None)

    def set_default_values(self, values: dict[str, object]) -> None:
        """Change some parameters for guests without their own."""
        self._defaults = with_values(self._defaults, values)

    def set_defaults(self, parameters: MigrationParameters) -> None:
        """Replace the parameters for guests without their own."""
        self._defaults = parameters
