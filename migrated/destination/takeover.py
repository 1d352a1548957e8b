"""The destination's hand-over: READY or NO, then COMMIT or nothing. It carries out the effects of protocol/executor.py.

It serves a migration that is under way as well as one that a restarted daemon found in its journal, so there is one
place that can make an incoming guest run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from migrated.base.errors import LinkLostError, VmmError
from migrated.environment import Environment
from migrated.fleet.ownership import NotTheOwnerError
from migrated.guests.registry import Guest, name_at
from migrated.link.reply import Reply
from migrated.observe.transitions import Transitions
from migrated.state.carrying_out import carry_out_all, journal_decision
from migrated.state.run_marks import RunMarkError
from protocol import effects, messages
from protocol.effects import DONE, DestinationEffect, Outcome, Result, failed
from protocol.executor import DestinationExecutor
from protocol.handover import Decision, DestinationEvent, DestinationState
from protocol.messages import Message, NoCause

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ResumeTimes:
    """Instants of the resume on this host's monotonic clock (ns)."""

    commit_read_ns: int
    begin_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class EndedTakeover:
    """A finished hand-over, reduced to what the answer to a late question needs; it holds no memory of the guest."""

    migration_id: str
    epoch: int
    place: str
    driver: str | None
    state: DestinationState
    reason: str | None
    resume_times: ResumeTimes | None

    def again(self, env: Environment) -> Takeover:
        """The hand-over as it was at its end, to answer by the same rules."""
        takeover = Takeover(
            env, self.migration_id, self.epoch, self.place, self.driver, None, self.state, reason=self.reason
        )
        takeover.resume_times = self.resume_times
        return takeover


def _nothing_loaded() -> messages.Ready:
    raise RuntimeError("only LOADING leads to READY, and whoever loads a guest sets make_ready first")


class Takeover:
    """One epoch of one incoming guest.

    Args:
        env: the daemon.
        migration_id, epoch: whose hand-over this is.
        place: of the incoming guest's process.
        driver: of the guest; its run log, if there is one, tells whether the guest ran. None where a journal of an
            older version does not name it and the guest is gone: then every driver is asked.
        guest: the incoming guest, None when its process is gone.
        state: first state; other than LOADING only after a restart of the daemon.
        keep_paused: the guest was paused on the source; it arrives paused.
        reason: why it was discarded, where that is known from before.

    Attributes:
        make_ready: called for the READY message of the vote; set by the code that loads the guest.
        told_token: the fencing token of this host's ownership as the source has told it, None where it has not.
        resume_times: instants of the resume, None before it and after a restart of the daemon.
        finished: set once it is decided which host runs the guest, and all effects of that are carried out.
    """

    def __init__(
        self,
        env: Environment,
        migration_id: str,
        epoch: int,
        place: str,
        driver: str | None,
        guest: Guest | None,
        state: DestinationState = DestinationState.LOADING,
        keep_paused: bool = False,
        reason: str | None = None,
    ) -> None:
        self.epoch = epoch
        self.told_token: int | None = None
        self.resume_times: ResumeTimes | None = None
        self.make_ready: Callable[[], messages.Ready] = _nothing_loaded
        self.finished = asyncio.Event()
        self._env = env
        self._migration_id = migration_id
        self._place = place
        self._driver = driver
        self._guest = guest
        self._keep_paused = keep_paused
        self._executor = DestinationExecutor(
            state,
            locks=env.config.lock.directory is not None,
            keep_paused=keep_paused,
            fleet=env.keeper is not None,
        )
        self._executor.reason = reason
        self._lock = asyncio.Lock()
        self._commit_read_ns = 0
        self._commit_journaled_ns = 0
        self._transitions = Transitions()
        if self._executor.final:
            self.finished.set()

    @property
    def state(self) -> DestinationState:
        """The hand-over's state."""
        return self._executor.state

    @property
    def reason(self) -> str | None:
        """The reason why the guest was discarded, or could not be resumed yet; None when neither is so."""
        return self._executor.reason

    def ended(self) -> EndedTakeover:
        """Return the part of it that is kept once it is finished."""
        return EndedTakeover(
            self._migration_id, self.epoch, self._place, self._driver, self.state, self.reason, self.resume_times
        )

    async def await_decision(self, timeout_s: float) -> None:
        """Wait after READY until the source has decided, at most ``timeout_s``: then the guest is discarded."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.finished.wait()
        except TimeoutError:
            await self.take(DestinationEvent.READY_TIMEOUT, None, reason="no decision came after READY")

    @property
    def awaits_decision(self) -> bool:
        """True when READY was voted and only the source decides."""
        return self.state is DestinationState.READY

    async def take(
        self,
        event: DestinationEvent,
        reply: Reply | None,
        *,
        reason: str | None = None,
        cause: NoCause = "fault",
        read_at_ns: int = 0,
    ) -> None:
        """Take one event and carry out all effects that it asks for.

        Args:
            reply: takes the answers to the peer; None when it cannot be reached.
            reason, cause: why, for events that end the hand-over.
            read_at_ns: when the message behind the event was read (monotonic).

        Raises:
            IllegalEventError: the peer broke the hand-over.
        """
        async with self._lock:
            before = self.state
            if event is DestinationEvent.COMMIT and before is DestinationState.READY:
                self._commit_read_ns = read_at_ns or time.monotonic_ns()
            accepted = self._executor.take(event, reason, cause)
            self._transitions.note(before, event, self.state)
            await carry_out_all(self._executor, partial(self._carry_out, reply), self._transitions)
            if not accepted:
                log.warning("too late to give up: the source decides now", state=self.state)
            if self._executor.final:
                self._transitions.log()
                self.finished.set()

    async def _carry_out(self, reply: Reply | None, effect: DestinationEffect) -> Outcome:
        match effect:
            case effects.Journal(decision=decision):
                return self._journal(decision)
            case effects.TakeLock():
                return await self._take_lock()
            case effects.LookAtGuest():
                return await self._look()
            case effects.WriteMark():
                return self._mark(ran=True)
            case effects.WithdrawMark():
                return self._mark(ran=False)
            case effects.ResumeGuest():
                return await self._resume()
            case effects.EndGuest():
                return await self._end_guest()
            case effects.DestroyGuest():
                return await self._destroy()
            case effects.ConfirmOwnership():
                return DONE if self._env.keeper is None else await self._env.keeper.confirm(name_at(self._place))
            case effects.SendReady():
                return self._send(reply, self.make_ready())
            case effects.SendNo(cause=cause, reason=reason):
                return self._send(reply, messages.No(epoch=self.epoch, cause=cause, reason=reason[:2000]))
            case effects.SendRunning() | effects.SendDiscarded() | effects.SendOpen():
                return self._send(reply, answer_message(effect, self.epoch, self.resume_times))

    def _journal(self, decision: Decision) -> Outcome:
        outcome = journal_decision(self._env.journal, self._migration_id, "destination", decision)
        if outcome == DONE and decision is Decision.COMMIT:
            self._commit_journaled_ns = time.monotonic_ns()
        return outcome

    def _send(self, reply: Reply | None, message: Message) -> Outcome:
        """Send an answer if the peer can still be reached: it asks again on a fresh connection if it gets none."""
        if reply is not None:
            with contextlib.suppress(LinkLostError):
                reply.send(message)
        return DONE

    # Section: the guest

    async def _take_lock(self) -> Outcome:
        if self._guest is None:
            return _process_gone()
        if (lock := self._guest.vmm.lock) is None:
            return DONE
        try:
            if self._env.keeper is not None:
                seen = await self._env.keeper.token(name_at(self._place), arriving=True)
                lock.token = self.told_token if seen is None else seen
            await lock.take()
        except (VmmError, NotTheOwnerError) as error:
            return failed(error)
        return DONE

    async def _look(self) -> Outcome:
        """Ask the VMM whether the guest waits, stands or runs. Only after COMMIT has come: by an older answer the guest
        of a VMM that was killed meanwhile would be marked as one that ran, and the source would not take it back."""
        guest = self._guest
        if guest is None:
            return _process_gone()
        try:
            state = (await guest.vmm.status()).state
        except VmmError as error:
            return failed(error)
        if state == "incoming":
            return Outcome(Result.WAITS)
        if state == "running" or self._keep_paused:
            self._is_ours(guest, time.monotonic_ns())  # the VMM's answer to a resume was lost, but the guest may run
            return Outcome(Result.RUNS)
        return Outcome(Result.STANDS)

    def _mark(self, *, ran: bool) -> Outcome:
        marks = self._env.run_marks
        try:
            (marks.write if ran else marks.withdraw)(self._place, self.epoch)
        except RunMarkError as error:
            log.error("a run mark could not be written", reason=str(error))
            return failed(error)
        return DONE

    async def _resume(self) -> Outcome:
        guest = self._guest
        if guest is None:
            return _process_gone()
        try:
            if self._keep_paused:
                await guest.vmm.pause()
                self._is_ours(guest, time.monotonic_ns())
            else:
                self._is_ours(guest, await guest.vmm.resume(self.epoch))
        except VmmError as error:
            return failed(error)
        return DONE

    def _is_ours(self, guest: Guest, at_ns: int) -> None:
        if self._commit_read_ns:
            self.resume_times = ResumeTimes(self._commit_read_ns, self._commit_journaled_ns, at_ns)
        guest.overlay, guest.migration_id = None, None

    async def _end_guest(self) -> Outcome:
        if self._guest is not None:
            try:
                await self._env.guests.destroy(self._guest)
            except VmmError as error:
                log.error("the guest could not be resumed, and its process does not end", reason=str(error))
                return Outcome(Result.UNKNOWN, str(error))
            self._guest = None
        ran = self._env.guests.ever_ran(self._driver, self._place, self.epoch)
        if ran is None:
            ran = self._env.run_marks.ran(self._place, self.epoch)
        if ran:
            log.error("the guest ran here and its process has ended", guest=self._place)
            return Outcome(Result.RUNS)
        return Outcome(Result.NEVER_RAN)

    async def _destroy(self) -> Outcome:
        guest, self._guest = self._guest, None
        if guest is not None:
            try:
                await self._env.guests.destroy(guest)
            except VmmError as error:
                log.error("the discarded guest cannot be destroyed; it stays stopped", reason=str(error))
        return DONE


def _process_gone() -> Outcome:
    return failed("the incoming guest's process ended before it was resumed")


def answer_message(answer: effects.Answer, epoch: int, times: ResumeTimes | None = None) -> Message:
    """Return the message for an answer to a decision of the source.

    Args:
        times: when the guest was resumed, None when that is not known (any more).
    """
    match answer:
        case effects.SendRunning() if times is not None:
            return messages.Running(
                epoch=epoch,
                resumed_after_ns=times.end_ns - times.commit_read_ns,
                sent_after_ns=time.monotonic_ns() - times.commit_read_ns,
            )
        case effects.SendRunning():
            return messages.Running(epoch=epoch, resumed_after_ns=0, sent_after_ns=0)
        case effects.SendDiscarded(reason=reason):
            return messages.Discarded(epoch=epoch, reason=reason[:2000])
        case effects.SendOpen(reason=reason):
            return messages.OutcomeOpen(epoch=epoch, reason=reason[:2000])
