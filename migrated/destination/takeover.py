"""The destination's hand-over: READY or NO, then COMMIT or nothing. Carries out what protocol/handover.py decides.

It serves a migration that is under way as well as one that a restarted daemon found in its journal, so there is one
place that can make an incoming guest run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from migrated.environment import Environment
from migrated.errors import LinkLostError, VmmError
from migrated.guests import Guest
from migrated.journal import JournalError
from migrated.link.reply import Reply
from protocol import messages
from protocol.handover import Action, Decision, DestinationEvent, DestinationState, destination_machine
from protocol.messages import Message, NoCause

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ResumeTimes:
    """Instants of the resume on this host's monotonic clock (ns)."""

    commit_read_ns: int
    begin_ns: int
    end_ns: int


class Takeover:
    """One epoch of one incoming guest.

    Args:
        env: the daemon.
        migration_id, epoch, guest_name: whose hand-over this is.
        guest: the incoming guest, None when its process is gone.
        state: where it begins; not LOADING only after a restart of the daemon.
        keep_paused: the guest was paused on the source; it arrives paused.
    """

    def __init__(
        self,
        env: Environment,
        migration_id: str,
        epoch: int,
        guest_name: str,
        guest: Guest | None,
        state: DestinationState = DestinationState.LOADING,
        keep_paused: bool = False,
    ) -> None:
        self.epoch = epoch
        self.reason: str | None = None
        self.cause: NoCause = "fault"
        self.resume_times: ResumeTimes | None = None
        self.make_ready: Callable[[], messages.Ready] | None = None
        self.finished = asyncio.Event()
        self._env = env
        self._migration_id = migration_id
        self._guest_name = guest_name
        self._guest = guest
        self._machine = destination_machine(state)
        self._lock = asyncio.Lock()
        self._commit_read_ns = 0
        self._keep_paused = keep_paused
        self._transitions: list[tuple[int, DestinationState, DestinationEvent, DestinationState]] = []
        if state in (DestinationState.RUNNING, DestinationState.DISCARDED):
            self.finished.set()

    @property
    def state(self) -> DestinationState:
        """The hand-over's state."""
        return self._machine.state

    @property
    def awaits_decision(self) -> bool:
        """READY was voted and only the source decides."""
        return self._machine.state is DestinationState.READY

    async def take(
        self,
        event: DestinationEvent,
        reply: Reply | None,
        *,
        reason: str | None = None,
        cause: NoCause = "fault",
        read_at_ns: int = 0,
    ) -> None:
        """Feed one event to the machine and carry out what it asks for.

        Args:
            reply: where answers go; None when the peer cannot be reached.
            reason, cause: why, for events that end the hand-over.
            read_at_ns: when the message behind the event was read (monotonic).

        Raises:
            IllegalEventError: the peer broke the hand-over.
        """
        async with self._lock:
            before = self._machine.state
            if event is DestinationEvent.COMMIT and before is DestinationState.READY:
                self._commit_read_ns = read_at_ns or time.monotonic_ns()
            if reason is not None and before in (DestinationState.LOADING, DestinationState.READY):
                self.reason, self.cause = reason, cause
            actions = self._machine.take(event)
            if before is not self._machine.state:
                self._transitions.append((time.monotonic_ns(), before, event, self._machine.state))
            await self._carry_out(actions, reply)
            if self._machine.state in (DestinationState.RUNNING, DestinationState.DISCARDED):
                self._log_transitions()
                self.finished.set()
            resume = Action.RESUME_GUEST in actions and self._machine.state is DestinationState.COMMITTED
            follow_up = await self._resume() if resume else None
        if follow_up is not None:
            await self.take(follow_up, reply, reason=self.reason)

    def _log_transitions(self) -> None:
        """Say what happened, now that no guest waits: a log that blocks must not cost downtime."""
        begin_ns = self._transitions[0][0] if self._transitions else 0
        for at_ns, before, event, state in self._transitions:
            log.debug("hand-over", after_ms=round((at_ns - begin_ns) / 1e6, 3), state=state, was=before, because=event)
        self._transitions.clear()

    async def _carry_out(self, actions: tuple[Action, ...], reply: Reply | None) -> None:
        unproved = False
        for action in actions:
            if unproved and action in (Action.SEND_DISCARDED, Action.SEND_NO):
                continue  # what is not journaled must not be told; the source asks again
            try:
                await self._act(action, reply)
            except JournalError as error:
                log.error("a decision could not be journaled", decision=action, reason=str(error))
                if action in (Action.JOURNAL_READY, Action.JOURNAL_COMMIT):
                    self.reason, self.cause = str(error), "fault"
                    await self._carry_out(self._machine.take(DestinationEvent.JOURNAL_FAILED), reply)
                    return
                unproved = action is Action.JOURNAL_DISCARD

    async def _act(self, action: Action, reply: Reply | None) -> None:
        match action:
            case Action.JOURNAL_READY:
                self._journal(Decision.READY)
            case Action.JOURNAL_COMMIT:
                self._journal(Decision.COMMIT)
            case Action.JOURNAL_RUNNING:
                self._journal(Decision.RUNNING)
            case Action.JOURNAL_DISCARD:
                self._journal(Decision.DISCARD)
            case Action.SEND_READY:
                assert self.make_ready is not None  # only LOADING leads here, and loading sets it
                self._send(reply, self.make_ready())
            case Action.SEND_NO:
                self._send(reply, messages.No(epoch=self.epoch, cause=self.cause, reason=self._why()))
            case Action.SEND_RUNNING:
                self._send(reply, self._running())
            case Action.SEND_DISCARDED:
                self._send(reply, messages.Discarded(epoch=self.epoch, reason=self._why()))
            case Action.SEND_OPEN:
                open_ = messages.OutcomeOpen(epoch=self.epoch, reason="the destination is resuming the guest")
                self._send(reply, open_)
            case Action.DESTROY_GUEST:
                await self._destroy()
            case Action.RESUME_GUEST:
                pass  # after the other actions, in take(): its result is the next event
            case Action.REFUSE:
                log.warning("too late to give up: the source decides now", state=self.state)
            case _:
                raise AssertionError(f"{action} is not an action of a destination")

    def _journal(self, decision: Decision) -> None:
        self._env.journal.decide(self._migration_id, "destination", decision)

    def _send(self, reply: Reply | None, message: Message) -> None:
        """Answer where an answer can still be heard: the peer asks again on a fresh connection if it gets none."""
        if reply is not None:
            with contextlib.suppress(LinkLostError):
                reply.send(message)

    def _why(self) -> str:
        return (self.reason or "the destination discarded the guest")[:2000]

    def _running(self) -> messages.Running:
        times, now_ns = self.resume_times, time.monotonic_ns()
        if times is None:  # after a restart of the daemon: when it resumed is not known any more
            return messages.Running(epoch=self.epoch, resumed_after_ns=0, sent_after_ns=0)
        return messages.Running(
            epoch=self.epoch,
            resumed_after_ns=times.end_ns - times.commit_read_ns,
            sent_after_ns=now_ns - times.commit_read_ns,
        )

    async def _resume(self) -> DestinationEvent | None:
        """Run the guest.

        Returns:
            RESUMED; RESUME_FAILED only when it is sure that it never ran and never will; None when neither can be
            told, so that COMMITTED stands until the source asks again or the daemon is restarted.
        """
        guest = self._guest
        begin_ns = time.monotonic_ns()
        if guest is None:
            self.reason = "the incoming guest's process ended before it was resumed"
            return self._after_end()
        try:
            running_at_ns = await self._run(guest)
        except VmmError as error:
            self.reason = f"the guest could not be resumed: {error}"
            if await _runs(guest):
                running_at_ns = time.monotonic_ns()  # the answer was lost, the guest was not
            else:
                return await self._make_sure_it_never_runs(guest)
        if self._commit_read_ns:
            self.resume_times = ResumeTimes(self._commit_read_ns, begin_ns, running_at_ns)
        guest.overlay, guest.migration_id = None, None
        return DestinationEvent.RESUMED

    async def _run(self, guest: Guest) -> int:
        """Take the guest over. Returns when it ran, or was ours (monotonic, ns)."""
        if guest.vmm.lock is not None:
            await guest.vmm.lock.take()
        state = (await guest.vmm.status()).state
        if self._keep_paused:
            if state == "incoming":
                await guest.vmm.pause()
        elif state != "running":
            return await guest.vmm.resume(self.epoch)
        return time.monotonic_ns()

    async def _make_sure_it_never_runs(self, guest: Guest) -> DestinationEvent | None:
        try:
            await self._env.guests.destroy(guest)
        except VmmError as error:
            log.error("the guest could not be resumed, and its process does not end", reason=str(error))
            return None
        self._guest = None
        return self._after_end()

    def _after_end(self) -> DestinationEvent:
        """The guest's process is gone: its run log tells whether it ran here."""
        if self._env.guests.ever_ran(self._guest_name, self.epoch):
            log.error("the guest ran here and its process has ended", guest=self._guest_name)
            return DestinationEvent.RESUMED
        return DestinationEvent.RESUME_FAILED

    async def _destroy(self) -> None:
        guest, self._guest = self._guest, None
        if guest is None:
            return
        try:
            await self._env.guests.destroy(guest)
        except VmmError as error:
            log.error("the discarded guest cannot be destroyed; it stays stopped", reason=str(error))


async def _runs(guest: Guest) -> bool:
    try:
        return (await guest.vmm.status()).state == "running"
    except VmmError:
        return False
