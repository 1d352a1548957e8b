"""One outgoing attempt: an operator's commands on it, and its course from begin to end.

    story         connect -> negotiate -> rounds -> switchover           phases        objects of each phase
    listener      the destination's messages                              interruption  its end from outside
    view          the operator's view                                  ending        outcome, record

A failure before the stop leaves a guest that was never disturbed; after the stop the hand-over decides. Every way out
releases the objects of the last phase, so that a retry works at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, Final

import structlog

from migrated.base.errors import CancelledByOperatorError, LinkLostError, MigrationError, VmmError
from migrated.base.tasks import TaskSet
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.guests.reservation import Reservation
from migrated.observe.progress import Progress
from migrated.record.model import Record
from migrated.record.terms import STATUS_OF, Outcome, Phase, Stage, Status
from migrated.settings.parameters import MigrationParameters, in_force
from migrated.source.ending import log_outcome, outcome_of_error
from migrated.source.interruption import Interruption
from migrated.source.ledger import OutgoingLedger
from migrated.source.listener import Listener
from migrated.source.story import Story
from migrated.source.switchover import Item
from migrated.source.target import Target
from migrated.source.view import View
from migrated.state.journal import JournalError
from migrated.state.run_marks import RunMarkError
from protocol.errors import ProtocolError
from protocol.handover import SourceEvent

log = structlog.get_logger()

_TOLD_S: Final = 0.5


class OutgoingMigration:
    """One attempt to move a guest away.

    Args:
        env: the daemon.
        guest: the guest.
        reservation: holds the guest for this attempt, and names it.
        target: where to.
        parameters: in force at the start; ``set_parameters`` changes them.
        migration_id: 32 hex digits.
        epoch: number of this hand-over of the guest.
    """

    def __init__(
        self,
        env: Environment,
        guest: Guest,
        reservation: Reservation,
        target: Target,
        parameters: MigrationParameters,
        migration_id: str,
        epoch: int,
    ) -> None:
        self.migration_id = migration_id
        self.guest_name = guest.name
        self.parameters = parameters
        self.record: Record | None = None
        self.decided = asyncio.Event()
        """Set when the attempt has its record; while in doubt, with a record that says so."""
        self._env = env
        self._reservation = reservation
        self._settled = asyncio.Event()
        self._over = False
        self._tasks = TaskSet()
        inbox: asyncio.Queue[Item] = asyncio.Queue()
        self._ledger = OutgoingLedger(migration_id, guest.name, epoch, target.uri, env.host, parameters)
        self._interruption = Interruption(inbox)
        self._listener = Listener(self._ledger, self._interruption, inbox)
        self._view = View(env, self._ledger, self._listener)
        self._story = Story(
            env,
            guest,
            target,
            lambda: self.parameters,
            self._ledger,
            self._view,
            self._listener,
            self._interruption,
            inbox,
            self._tasks,
        )

    # Section: what an operator can do

    @property
    def status(self) -> Status:
        """The attempt's status, by QEMU's names."""
        return self._view.status

    async def cancel(self, reason: str = "cancelled by the operator") -> bool:
        """Give the attempt up. Returns False when it is too late: COMMIT was sent."""
        phase = self._story.phase
        if self.decided.is_set() and not phase.in_doubt:
            return True
        if phase.too_late:
            return False
        self._view.set_status("cancelling")
        self._interruption.end(CancelledByOperatorError(reason), SourceEvent.CANCEL)
        return True

    def guest_gone(self) -> None:
        """The guest's process ended by itself."""
        self._interruption.end(VmmError("the guest's process ended during its migration"), SourceEvent.FAULT)

    async def resolve(self, run_here: bool) -> bool:
        """End an attempt in doubt by the operator's word. Returns False when it is not in doubt."""
        if not await self._story.phase.resolve(run_here):
            return False
        await self._settled.wait()
        return True

    def continue_switchover(self) -> bool:
        """Let a held switchover go on. Returns False when none is held."""
        if self.status != "pre-switchover" or not self._story.phase.continue_switchover():
            return False
        self._view.set_status("device")
        return True

    def set_parameters(self, parameters: MigrationParameters) -> None:
        """Change the parameters of the running attempt: they count from the next decision on, until the guest is
        stopped. What is agreed on at the start stays as it is."""
        previous, self.parameters = self.parameters, parameters
        if self._interruption.undisturbed:
            self._ledger.parameters = in_force(self._ledger.parameters, parameters)
        if parameters.max_bandwidth_bytes_per_s != previous.max_bandwidth_bytes_per_s:
            self._story.phase.pace(parameters.max_bandwidth_bytes_per_s)

    @property
    def stage(self) -> Stage:
        """How far the attempt has come with the sending of memory."""
        return self._story.phase.stage

    def pace_first_round(self, bytes_per_s: int) -> None:
        """Let the first round go faster or slower than the cap, if it has not ended."""
        self._story.phase.pace_first_round(bytes_per_s)

    def progress(self) -> Progress:
        """A snapshot for an operator."""
        phase = self._story.phase
        reason = self.record.reason if self.record is not None else None
        return self._view.progress(phase, Phase.FINISH if self._over else phase.label, reason)

    # Section: from begin to end

    async def run(self) -> None:
        """Run the attempt to its last record.

        Raises:
            Exception: the record could not be written; the attempt has ended all the same.
        """
        structlog.contextvars.bind_contextvars(
            migration_id=self.migration_id, guest=self.guest_name, role="source", peer=self._ledger.peer
        )
        try:
            failure = await self._tell_story()
        except asyncio.CancelledError:  # the daemon itself ends
            await self._go_on_if_it_fails("to let go", self._story.phase.let_go())
            raise
        self._over = True
        phase = self._story.phase
        if failure is not None:
            _, reason = outcome_of_error(failure)
            await self._go_on_if_it_fails("to give up", phase.give_up(reason))
        await self._go_on_if_it_fails("to let go", phase.let_go())
        try:
            if await self._conclude(failure) == "in-doubt":
                await phase.decided()
                await self._conclude(failure)
        except Exception:
            log.exception("the migration's record could not be written")
            raise
        finally:
            self.decided.set()
            self._settled.set()

    async def close(self) -> None:
        """Release the attempt at the daemon's stop. One in doubt is found again in the journal after a restart."""
        await self._story.phase.stop_asking()

    async def _tell_story(self) -> Exception | None:
        """Run the story. Returns the error that ended it early, None when the hand-over ended it."""
        try:
            await self._story.run()
        except LinkLostError as error:
            return await self._told(error)
        except (MigrationError, ProtocolError, JournalError, RunMarkError, OSError, ValueError) as error:
            return error
        except Exception as error:
            # A bug must not cost more than this attempt: the guest goes on, and the log says where it was.
            log.exception("the migration failed unexpectedly")
            return MigrationError(f"internal error: {error!r}")
        return None

    async def _told(self, error: LinkLostError) -> MigrationError:
        """Return the destination's own reason for a lost channel: a destination that gives up says so on the control
        channel, but a data channel may break before that is read."""
        if self._story.phase.connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TOLD_S):
                    await self._listener.reported.wait()
        told = self._interruption.error
        return error if told is None or isinstance(told, LinkLostError) else told

    async def _go_on_if_it_fails(self, what: str, step: Coroutine[Any, Any, None]) -> None:
        """A step of the clean-up that fails must keep neither the next ones nor the record from being done."""
        try:
            await step
        except Exception:
            log.exception("a step at the end of the migration failed", step=what)

    async def _conclude(self, failure: Exception | None) -> Outcome:
        """Write the record, hand it to the destination, and let the guest go unless it is in doubt."""
        ledger, env, phase = self._ledger, self._env, self._story.phase
        decided = phase.outcome(cancelled=self._interruption.by_operator)
        outcome, reason = decided or outcome_of_error(
            failure or MigrationError("internal error: the hand-over was not decided")
        )
        ledger.ended_ns = ledger.ended_ns or time.monotonic_ns()
        log_outcome(ledger.finish(outcome, reason, []))
        self._view.tell_passes()
        record = self.record = ledger.finish(outcome, reason, env.take_log(self.migration_id, "source"))
        await self._go_on_if_it_fails("to part from the destination", phase.part(record))
        await self._tasks.stop()
        if outcome != "in-doubt":
            env.journal.close_attempt(self.migration_id, "source")
            self._reservation.end()
        self._view.set_status(STATUS_OF[outcome])
        env.finish(record, "source")
        if self._story.guest_class:
            env.knowledge.learn(record, self._story.guest_class)
        self.decided.set()
        return outcome
