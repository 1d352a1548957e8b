"""The source's hand-over: it carries out the effects of protocol/executor.py, during a migration and after a restart of
the daemon.

This is the only place on the source that resumes, retires or commits a guest that was stopped for a migration.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from migrated.base.errors import LinkLostError, VmmError
from migrated.base.tasks import TaskSet
from migrated.environment import Environment
from migrated.fleet.ownership import Keeper
from migrated.guests.registry import Guest
from migrated.link.reply import Reply
from migrated.observe.transitions import Transitions
from migrated.source.outcome import OutcomeAsker
from migrated.state.carrying_out import carry_out_all, journal_decision
from migrated.state.run_marks import RunMarkError
from protocol import effects, messages
from protocol.effects import DONE, Outcome, SourceEffect, failed
from protocol.executor import SourceExecutor
from protocol.guest_time import VmTimeData
from protocol.handover import Decision, SourceEvent, SourceState

log = structlog.get_logger()

_ASK_OWNERSHIP_S: Final = 2.0
"""Time between two questions to the fleet's store."""
LONGEST_TRANSFER_NS: Final = 5_000_000_000
"""How long the fleet's store may take where no limit is enforced."""
OPERATOR_KEEPS: Final = "the operator resolved the doubt: the guest runs here"


@dataclass(slots=True)
class HandoverTimes:
    """Instants of the hand-over's steps on this host's monotonic clock (ns), 0 for a step that was not reached.

    Attributes:
        stopped_at_ns: the guest has stopped.
        drained_ns: how long before that its vCPUs stood already, where the VMM tells it; 0 elsewhere.
        resume_begin_ns, resumed_at_ns: taking the guest back began; it runs again.
        decided_at_ns, journaled_at_ns, committed_at_ns: to commit is decided; it is in the journal; COMMIT is written.
    """

    stopped_at_ns: int = 0
    drained_ns: int = 0
    resume_begin_ns: int = 0
    resumed_at_ns: int = 0
    decided_at_ns: int = 0
    journaled_at_ns: int = 0
    committed_at_ns: int = 0


class SourceHandover:
    """One epoch of one outgoing guest.

    Args:
        env: the daemon.
        migration_id, epoch: whose hand-over this is.
        guest: the guest, None when its process is gone (only after a restart).
        was_paused: the guest was paused when the migration began; it stays paused when it is taken back.
        asker: reaches the destination over fresh connections.
        keeper: knows who owns the guest in the fleet; None without one, and for a guest that stays on this host.
        state: first state; other than RUNNING only after a restart of the daemon.
        on_doubt: called when the attempt becomes in doubt.

    Attributes:
        times: instants of its steps.
        guest_time: the guest's time at its stop, None where its VMM does not tell it with the stop.
        commit_by_ns: instant after which COMMIT is too late, on this host's monotonic clock.
        running: the destination's RUNNING once it came, and when it was read.
        finished: set once it is decided which host runs the guest, and all effects of that are carried out.
        tells_token: the destination wants to be told the fencing token of its ownership with COMMIT.
        before_resume: called before the guest is taken back: nothing may be saved of it any more.
    """

    def __init__(
        self,
        env: Environment,
        migration_id: str,
        epoch: int,
        guest: Guest | None,
        was_paused: bool,
        asker: OutcomeAsker,
        keeper: Keeper | None,
        state: SourceState = SourceState.RUNNING,
        on_doubt: Callable[[str], None] = lambda _why: None,
    ) -> None:
        self.epoch = epoch
        self.times = HandoverTimes()
        self.guest_time: VmTimeData | None = None
        self.commit_by_ns = 0
        self.running: messages.Running | None = None
        self.running_read_ns = 0
        self.finished = asyncio.Event()
        self.tells_token = False
        self.before_resume: Callable[[], object] = lambda: None
        self._env = env
        self._migration_id = migration_id
        self._guest = guest
        self._was_paused = was_paused
        self._asker = asker
        self._executor = SourceExecutor(
            state,
            locks=env.config.lock.directory is not None,
            was_paused=was_paused,
            fleet=keeper is not None,
        )
        self._keeper = keeper
        self._token: int | None = None
        """The fencing token of the destination, once it is the owner."""
        self._lock = asyncio.Lock()
        self._tasks = TaskSet()
        self._on_doubt = on_doubt
        self._asking: asyncio.Task[None] | None = None
        self._transitions = Transitions()

    @property
    def state(self) -> SourceState:
        """The hand-over's state."""
        return self._executor.state

    @property
    def reason(self) -> str | None:
        """The reason why the attempt ended, None while it has not."""
        return self._executor.reason

    @property
    def in_doubt(self) -> bool:
        """True while COMMIT was sent and is not answered, or while the guest is held."""
        return self._executor.in_doubt or self.state is SourceState.HELD

    async def take(self, event: SourceEvent, reply: Reply | None, reason: str | None = None) -> bool:
        """Take one event and carry out all effects that it asks for.

        Args:
            reply: the session's control channel while it stands.
            reason: why, for events that end the attempt; the first one is kept.

        Returns:
            False when the event was refused because it comes too late (cancel after COMMIT).

        Raises:
            IllegalEventError: the peer broke the hand-over.
        """
        async with self._lock:
            before = self.state
            if event is SourceEvent.READY_IN_TIME and before is SourceState.STOPPED:
                self.times.decided_at_ns = time.monotonic_ns()
            accepted = self._executor.take(event, reason)
            self._transitions.note(before, event, self.state)
            await carry_out_all(self._executor, partial(self._carry_out, reply), self._transitions)
            if not accepted:
                log.warning("too late: COMMIT was sent and the destination may run the guest", state=self.state)
            if self.state is SourceState.HELD:
                self._held()
            if self._executor.final:
                self._end()
        return accepted

    async def close(self) -> None:
        """Stop asking and telling."""
        await self._tasks.stop()

    def _end(self) -> None:
        """Mark the hand-over as finished; an operator may have resolved it while the destination never answered."""
        if self._guest is not None and self.state is SourceState.ABORTED:
            self._guest.overlay = None
        self._transitions.log()
        self.finished.set()
        if self._asking is not None and self._asking is not asyncio.current_task():
            self._asking.cancel()
        self._asking = None

    async def _carry_out(self, reply: Reply | None, effect: SourceEffect) -> Outcome:
        match effect:
            case effects.StopGuest():
                return await self._stop()
            case effects.Journal(decision=decision):
                return self._journal(decision)
            case effects.ReleaseLock():
                return await self._release_lock()
            case effects.TakeLock():
                return await self._take_lock()
            case effects.WriteMark():
                return self._write_mark()
            case effects.ResumeGuest():
                return await self._resume()
            case effects.RetireGuest():
                return await self._retire()
            case effects.SendCommit():
                return self._send_commit(reply)
            case effects.SendAbort(reason=reason):
                return self._send_abort(reply, reason)
            case effects.AskOutcome():
                return self._ask_outcome()
            case _:
                return await self._own(effect)

    async def _stop(self) -> Outcome:
        if self._guest is None:
            return failed("the guest's process is gone")
        if not self._was_paused:
            self._env.hold_events(self._migration_id)
            try:
                pause = await self._guest.vmm.pause()
            except VmmError as error:
                return failed(error)
            self.times.drained_ns, self.guest_time = pause.drain_ns, pause.guest_time
            self._env.publish("STOP", {"guest": self._guest.name})
        self.times.stopped_at_ns = time.monotonic_ns()
        return DONE

    def _journal(self, decision: Decision) -> Outcome:
        outcome = journal_decision(self._env.journal, self._migration_id, "source", decision)
        if outcome == DONE and decision is Decision.COMMIT:
            self.times.journaled_at_ns = time.monotonic_ns()
        return outcome

    async def _release_lock(self) -> Outcome:
        if self._guest is not None and (lock := self._guest.vmm.lock) is not None:
            try:
                await lock.release()
            except VmmError as error:
                log.error("the guest's lock could not be released", reason=str(error))
                return failed(error)
        return DONE

    async def _take_lock(self) -> Outcome:
        self._resume_begins()
        if self._guest is not None and (lock := self._guest.vmm.lock) is not None:
            try:
                if self._keeper is not None:
                    lock.token = await self._keeper.token(self._guest.name, arriving=False)
                await lock.take()
            except VmmError as error:
                return self._not_resumed(self._guest, error)
        return DONE

    def _write_mark(self) -> Outcome:
        self._resume_begins()
        if self._guest is not None:
            try:
                self._env.run_marks.write(self._guest.place, self.epoch)
            except RunMarkError as error:
                log.error("a run mark could not be written", reason=str(error))
                return failed(error)
        return DONE

    async def _resume(self) -> Outcome:
        """Let the guest run as it did before; nothing is lost when it was never stopped."""
        self._resume_begins()
        guest = self._guest
        if guest is None:
            log.error("the guest's process is gone: there is nothing to resume")
            return DONE
        try:
            if self._was_paused:
                await guest.vmm.interrupt()
                self.times.resumed_at_ns = time.monotonic_ns()
            else:
                self.times.resumed_at_ns = await guest.vmm.resume(self.epoch)
                self._env.publish("RESUME", {"guest": guest.name})
        except VmmError as error:
            return self._not_resumed(guest, error)
        return DONE

    def _resume_begins(self) -> None:
        self.before_resume()
        self.times.resume_begin_ns = self.times.resume_begin_ns or time.monotonic_ns()

    def _not_resumed(self, guest: Guest, error: VmmError) -> Outcome:
        log.error("the guest could not be resumed", guest=guest.name, reason=str(error))
        return failed(error)

    async def _retire(self) -> Outcome:
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.overlay = "retired"
            try:
                await self._env.guests.destroy(guest)
            except VmmError as error:
                log.error("the retired guest's process does not end; it stays stopped", reason=str(error))
        return DONE

    def _send_commit(self, reply: Reply | None) -> Outcome:
        # Stamped before the write: the destination cannot have read it earlier.
        self.times.committed_at_ns = self.times.committed_at_ns or time.monotonic_ns()
        if reply is not None:
            with contextlib.suppress(LinkLostError):  # the listener reports the loss as an event of its own
                if self.tells_token and self._token is not None:
                    reply.send(messages.Owned(epoch=self.epoch, token=self._token))
                reply.send(messages.Commit(epoch=self.epoch))
        return DONE

    def _send_abort(self, reply: Reply | None, reason: str) -> Outcome:
        if reply is not None:
            with contextlib.suppress(LinkLostError):
                reply.send(messages.Abort(epoch=self.epoch, reason=reason[:2000]))
                return DONE
        # The channel is gone: tell it over a fresh one, so that the destination need not wait for its time-out.
        self._tasks.start(self._asker.tell_abort())
        return DONE

    def _ask_outcome(self) -> Outcome:
        if self._guest is not None:
            self._guest.overlay = "in-doubt"
        why = "COMMIT was sent and the destination has not answered: the guest may run there and stays stopped here"
        log.error("the migration is in doubt", reason=why)
        self._on_doubt(why)
        self._asking = self._tasks.start(self._settle())
        return DONE

    async def _own(self, effect: effects.OwnershipEffect) -> Outcome:
        """Carry out what concerns the fleet's store. A guest whose process is gone does not run here any more."""
        keeper, guest = self._keeper, self._guest
        if keeper is None or guest is None:
            return failed("the guest's process is gone") if isinstance(effect, effects.TransferOwnership) else DONE
        match effect:
            case effects.TransferOwnership():
                within_ns = min(LONGEST_TRANSFER_NS, self.commit_by_ns - time.monotonic_ns())
                if within_ns <= 0:
                    return failed("no time was left to ask the fleet's store who owns the guest")
                outcome = await keeper.transfer(guest.name, self._migration_id, within_ns)
                self._token = await keeper.token(guest.name, arriving=False) if outcome == DONE else None
                return outcome
            case effects.ConfirmOwnership():
                return await keeper.confirm(guest.name)
            case effects.ReclaimOwnership():
                keeper.reclaim(guest.name)
            case effects.AskOwnership():
                self._tasks.start(self._ask_ownership())
        return DONE

    async def _ask_ownership(self) -> None:
        await asyncio.sleep(_ASK_OWNERSHIP_S)
        if self.state is SourceState.HELD:  # an operator may have decided meanwhile
            await self.take(SourceEvent.ASK_AGAIN, None)

    def _held(self) -> None:
        """Say loudly that the guest stays stopped until the fleet's store or an operator decides."""
        if self._guest is not None and self._guest.overlay != "in-doubt":
            self._guest.overlay = "in-doubt"
            why = f"the guest stays stopped here, because this host may not own it: {self.reason}"
            log.error("the guest is held", reason=why)
            self._on_doubt(why)

    async def _settle(self) -> None:
        """Ask until the destination answers with the outcome."""
        answer = await self._asker.ask_commit()
        if isinstance(answer, messages.Running):
            self.running, self.running_read_ns = answer, time.monotonic_ns()
            await self.take(SourceEvent.RUNNING, None)
        else:
            await self.take(SourceEvent.DISCARDED, None, f"the destination discarded the guest: {answer.reason}")
