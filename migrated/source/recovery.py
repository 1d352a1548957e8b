"""Recovery of an outgoing attempt that a restarted daemon finds open in its journal.

No COMMIT in the journal: the guest is ours, and runs again. COMMIT without an answer: in doubt, so it is asked for.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import structlog

from migrated.base.errors import VmmError
from migrated.base.tasks import TaskSet
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.guests.reservation import Reservation
from migrated.observe.progress import Moved, Progress, Standing, snapshot
from migrated.record.terms import Outcome, Status
from migrated.settings.parameters import MigrationParameters, limit_of
from migrated.source.handover import OPERATOR_KEEPS, SourceHandover
from migrated.source.ledger import OutgoingLedger
from migrated.source.outcome import OutcomeAsker
from migrated.source.target import HERE, target_here, target_of
from migrated.state.journal import Attempt
from protocol.handover import SourceEvent, SourceState, source_state_of

log = structlog.get_logger()


class RecoveredHandover:
    """One outgoing attempt, taken up again.

    Args:
        env: the daemon.
        attempt: the journal's entries of it.
        guest: the guest, None when its process is gone.
    """

    def __init__(self, env: Environment, attempt: Attempt, guest: Guest | None) -> None:
        self._env = env
        self._attempt = attempt
        self._guest = guest
        self._tasks = TaskSet()
        self._parameters = MigrationParameters.model_validate(attempt.facts["parameters"])
        self._started = datetime.fromisoformat(attempt.facts["started_at"])
        peer = attempt.facts["peer"]
        target = target_here(env) if peer == HERE else target_of(peer)
        asker = OutcomeAsker(target.place, env.security, env.config.limits, attempt.migration_id, attempt.epoch)
        self._handover = SourceHandover(
            env,
            attempt.migration_id,
            attempt.epoch,
            guest,
            bool(attempt.facts["paused"]),
            asker,
            None if peer == HERE else env.keeper,
            source_state_of(attempt.decisions),
        )
        self._reservation = Reservation(guest, attempt.migration_id) if guest is not None else None

    async def run(self) -> None:
        """Finish or undo the attempt and write its record."""
        structlog.contextvars.bind_contextvars(
            migration_id=self._attempt.migration_id,
            guest=self._attempt.guest,
            role="source",
            peer=self._attempt.facts["peer"],
        )
        log.warning("taking up a migration that the last daemon left open", state=self._handover.state)
        with self._reservation or contextlib.nullcontext():
            await self._see_through()

    async def _see_through(self) -> None:
        await self._handover.take(SourceEvent.RESTART, None, "the source's daemon was restarted during the migration")
        if self._handover.in_doubt:
            held = self._handover.reason if self._handover.state is SourceState.HELD else None
            sent = "COMMIT was sent before the daemon was restarted, and no answer is known yet"
            self._record("in-doubt", held or sent)
        await self._handover.finished.wait()
        if self._handover.state is SourceState.RETIRED:
            self._record("completed", None)
        else:
            if self._guest is not None:
                with contextlib.suppress(VmmError):
                    await self._guest.vmm.stop_dirty_log()
            reason = self._handover.reason
            if self._guest is None:
                reason = f"{reason}; the guest's process is gone too"
            self._record("aborted", reason)
        self._env.journal.close_attempt(self._attempt.migration_id, "source")

    async def resolve(self, run_here: bool) -> bool:
        """End it by the operator's word. Returns False when it is not in doubt."""
        if not self._handover.in_doubt:
            return False
        event = SourceEvent.RESOLVE_RUN_HERE if run_here else SourceEvent.RESOLVE_DISCARD
        await self._handover.take(event, None, OPERATOR_KEEPS if run_here else None)
        return True

    def progress(self) -> Progress:
        """Return a snapshot for an operator, from the facts in the journal."""
        attempt, parameters = self._attempt, self._parameters
        status: Status = "in-doubt"
        if self._handover.finished.is_set():
            status = "completed" if self._handover.state is SourceState.RETIRED else "failed"
        standing = Standing(
            migration_id=attempt.migration_id,
            guest=attempt.guest,
            role="source",
            peer=attempt.facts["peer"],
            destination=attempt.facts["peer"],
            started_at=attempt.facts["started_at"],
            elapsed_ns=max(0, int((datetime.now(UTC) - self._started).total_seconds() * 1e9)),
            status=status,
            phase=str(self._handover.state),
            memory_bytes=self._guest.memory_bytes if self._guest is not None else 0,
            downtime_limit_ns=limit_of(parameters),
            decision="taken up again after a restart of the daemon",
            reason=self._handover.reason,
        )
        return snapshot(standing, Moved())

    async def close(self) -> None:
        """Stop asking; the journal keeps the open attempt."""
        await self._handover.close()

    def _record(self, outcome: Outcome, reason: str | None) -> None:
        facts = self._attempt.facts
        ledger = OutgoingLedger(
            self._attempt.migration_id,
            self._attempt.guest,
            self._attempt.epoch,
            facts["peer"],
            self._env.host,
            self._parameters,
            started_at=facts["started_at"],
        )
        self._env.finish(
            ledger.finish(outcome, reason, self._env.take_log(self._attempt.migration_id, "source")), "source"
        )
