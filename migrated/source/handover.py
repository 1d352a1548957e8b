"""The source's hand-over: carries out what protocol/handover.py decides, now and after a restart of the daemon.

This is the only place on the source that resumes, retires or commits a guest that was stopped for a migration.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

import structlog

from migrated.environment import Environment
from migrated.errors import LinkLostError, VmmError
from migrated.guests import Guest
from migrated.journal import JournalError
from migrated.link.control import ControlChannel
from migrated.source.outcome import OutcomeAsker
from migrated.tasks import TaskSet
from protocol import messages
from protocol.handover import Action, Decision, SourceEvent, SourceState, source_machine

log = structlog.get_logger()

_ENDS_DOUBT = (SourceEvent.DISCARDED, SourceEvent.RESOLVE_RUN_HERE)
"""What gives the guest back after COMMIT; its reason is the attempt's."""
OPERATOR_KEEPS: Final = "the operator resolved the doubt: the guest runs here"


class SourceHandover:
    """One epoch of one outgoing guest.

    Args:
        env: the daemon.
        migration_id, epoch: whose hand-over this is.
        guest: the guest, None when its process is gone (only after a restart).
        was_paused: the guest was paused when the migration began; it stays paused when it is taken back.
        asker: how the destination is asked and told over fresh connections.
        state: where it begins; not RUNNING only after a restart of the daemon.
        on_doubt: called when the attempt becomes in doubt.

    Attributes:
        stopped_at_ns, resumed_at_ns: end of the stop and of the resume on this host's monotonic clock, 0 before.
        decided_at_ns, journaled_at_ns, committed_at_ns: around the decision to commit, 0 before.
        running: the destination's RUNNING once it came, and when it was read.
    """

    def __init__(
        self,
        env: Environment,
        migration_id: str,
        epoch: int,
        guest: Guest | None,
        was_paused: bool,
        asker: OutcomeAsker,
        state: SourceState = SourceState.RUNNING,
        on_doubt: Callable[[str], None] | None = None,
    ) -> None:
        self.epoch = epoch
        self.reason: str | None = None
        self.in_doubt = False
        self.stop_cost_ns = 0
        self.stopped_at_ns = 0
        self.resume_begin_ns = 0
        self.resumed_at_ns = 0
        self.decided_at_ns = 0
        self.journaled_at_ns = 0
        self.committed_at_ns = 0
        self.running: messages.Running | None = None
        self.running_read_ns = 0
        self.finished = asyncio.Event()
        self._env = env
        self._migration_id = migration_id
        self._guest = guest
        self._was_paused = was_paused
        self._asker = asker
        self._machine = source_machine(state)
        self._lock = asyncio.Lock()
        self._tasks = TaskSet()
        self._on_doubt = on_doubt
        self._asking: asyncio.Task[None] | None = None
        self._transitions: list[tuple[int, SourceState, SourceEvent, SourceState]] = []

    @property
    def state(self) -> SourceState:
        """The hand-over's state."""
        return self._machine.state

    async def take(self, event: SourceEvent, reply: ControlChannel | None, reason: str | None = None) -> bool:
        """Feed one event to the machine and carry out what it asks for.

        Args:
            reply: the session's control channel while it stands.
            reason: why, for events that end the attempt; the first one is kept.

        Returns:
            False when the event was refused because it comes too late (cancel after COMMIT).

        Raises:
            IllegalEventError: the peer broke the hand-over.
            VmmError: the guest could not be stopped (STOP only).
        """
        async with self._lock:
            before = self._machine.state
            if reason is not None and (before in (SourceState.RUNNING, SourceState.STOPPED) or event in _ENDS_DOUBT):
                self.reason = self.reason or reason
            if event is SourceEvent.READY_IN_TIME and before is SourceState.STOPPED:
                self.decided_at_ns = time.monotonic_ns()
            actions = self._machine.take(event)
            if before is not self._machine.state:
                self._transitions.append((time.monotonic_ns(), before, event, self._machine.state))
            await self._carry_out(actions, reply)
            if self._machine.state in (SourceState.RETIRED, SourceState.ABORTED):
                self.in_doubt = False
                self._log_transitions()
                self.finished.set()
                self._stop_asking()
        return Action.REFUSE not in actions

    def _stop_asking(self) -> None:
        """Nothing is in doubt any more: an operator may have settled what the destination never answered."""
        if self._asking is not None and self._asking is not asyncio.current_task():
            self._asking.cancel()
        self._asking = None

    def _log_transitions(self) -> None:
        """Say what happened, now that no guest waits: a log that blocks must not cost downtime."""
        begin_ns = self._transitions[0][0] if self._transitions else 0
        for at_ns, before, event, state in self._transitions:
            log.debug("hand-over", after_ms=round((at_ns - begin_ns) / 1e6, 3), state=state, was=before, because=event)
        self._transitions.clear()

    async def _carry_out(self, actions: tuple[Action, ...], reply: ControlChannel | None) -> None:
        for action in actions:
            try:
                await self._act(action, reply)
            except JournalError as error:
                log.error("a decision could not be journaled", decision=action, reason=str(error))
                if action is Action.JOURNAL_COMMIT:
                    # Not journaled, so it must not be sent: the guest is still ours.
                    self.reason = self.reason or str(error)
                    await self._carry_out(self._machine.take(SourceEvent.JOURNAL_FAILED), reply)
                    return
                # What the destination proved stays true without our note: a restarted daemon asks again.

    async def close(self) -> None:
        """Stop asking and telling."""
        await self._tasks.stop()

    async def _act(self, action: Action, reply: ControlChannel | None) -> None:
        match action:
            case Action.STOP_GUEST:
                await self._stop()
            case Action.JOURNAL_COMMIT:
                self._env.journal.decide(self._migration_id, "source", Decision.COMMIT)
                self.journaled_at_ns = time.monotonic_ns()
            case Action.JOURNAL_ABORT:
                self._env.journal.decide(self._migration_id, "source", Decision.ABORT)
            case Action.JOURNAL_RETIRED:
                self._env.journal.decide(self._migration_id, "source", Decision.RETIRED)
            case Action.SEND_COMMIT:
                await self._release_lock()
                # Stamped before the write: the destination cannot have read it earlier.
                self.committed_at_ns = self.committed_at_ns or time.monotonic_ns()
                if reply is not None:
                    with contextlib.suppress(LinkLostError):  # the loss is an event of its own
                        reply.send(messages.Commit(epoch=self.epoch))
            case Action.SEND_ABORT:
                self._send_abort(reply)
            case Action.RESUME_GUEST:
                await self._resume()
            case Action.RETIRE_GUEST:
                await self._retire()
            case Action.ASK_OUTCOME:
                self._ask_outcome()
            case Action.REFUSE:
                log.warning("too late: COMMIT was sent and the destination may run the guest", state=self.state)
            case _:
                raise AssertionError(f"{action} is not an action of a source")

    async def _stop(self) -> None:
        if self._guest is None:
            raise VmmError("the guest's process is gone")
        if self._was_paused:
            self.stopped_at_ns = time.monotonic_ns()
            return
        self._env.hold_events(self._migration_id)
        self.stop_cost_ns = await self._guest.vmm.pause()
        self.stopped_at_ns = time.monotonic_ns()
        self._env.publish("STOP", {"guest": self._guest.name})

    async def _release_lock(self) -> None:
        """COMMIT is journaled: the destination may take the guest's lock. Before COMMIT leaves, so that it finds it
        free."""
        if self._guest is not None and (lock := self._guest.vmm.lock) is not None:
            try:
                await lock.release()
            except VmmError as error:
                log.error("the guest's lock could not be released", reason=str(error))

    async def _resume(self) -> None:
        """Let the guest run as it did before; nothing is lost when it was never stopped."""
        guest = self._guest
        if guest is None:
            log.error("the guest's process is gone: there is nothing to resume")
            return
        self.resume_begin_ns = time.monotonic_ns()
        try:
            if self._was_paused:
                await guest.vmm.interrupt()
                running_at_ns = time.monotonic_ns()
            else:
                if guest.vmm.lock is not None:
                    await guest.vmm.lock.take()
                running_at_ns = await guest.vmm.resume(self.epoch)
        except VmmError as error:
            log.error("the guest could not be resumed", guest=guest.name, reason=str(error))
            self.reason = f"{self.reason or 'aborted'}; then the guest could not be resumed: {error}"
            return
        finally:
            guest.overlay = None
        self.resumed_at_ns = running_at_ns
        if not self._was_paused:
            self._env.publish("RESUME", {"guest": guest.name})

    async def _retire(self) -> None:
        guest, self._guest = self._guest, None
        if guest is None:
            return
        guest.overlay = "retired"
        try:
            await self._env.guests.destroy(guest)
        except VmmError as error:
            log.error("the retired guest's process does not end; it stays stopped", reason=str(error))

    def _send_abort(self, reply: ControlChannel | None) -> None:
        reason = (self.reason or "the source keeps its guest")[:2000]
        if reply is not None:
            with contextlib.suppress(LinkLostError):
                reply.send(messages.Abort(epoch=self.epoch, reason=reason))
                return
        # The channel is gone: tell it over a fresh one, so that the destination need not wait for its time-out.
        self._tasks.start(self._asker.tell_abort())

    def _ask_outcome(self) -> None:
        if self.in_doubt:
            return
        self.in_doubt = True
        if self._guest is not None:
            self._guest.overlay = "in-doubt"
        why = "COMMIT was sent and the destination has not answered: the guest may run there and stays stopped here"
        log.error("the migration is in doubt", reason=why)
        if self._on_doubt is not None:
            self._on_doubt(why)
        self._asking = self._tasks.start(self._settle())

    async def _settle(self) -> None:
        """Ask until the destination tells the outcome."""
        answer = await self._asker.ask_commit()
        if isinstance(answer, messages.Running):
            self.running, self.running_read_ns = answer, time.monotonic_ns()
            await self.take(SourceEvent.RUNNING, None)
        else:
            self.reason = f"the destination discarded the guest: {answer.reason}"
            await self.take(SourceEvent.DISCARDED, None)
