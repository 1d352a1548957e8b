"""From stop to commit: the blackout of one attempt on the source.

    stop | DOWNTIME | last dirty pages + device saves | STATE_END | READY -> decide, journal, COMMIT | RUNNING
                                                                  NO, deadline, loss, cancel -> take the guest back

Work (moving state) and waiting (for the vote, the deadline, an operator) run side by side, so a decision never waits
for a save or a send to end. Only the hand-over decides what an event means for the guest. The module is longer than
others because one blackout is one procedure, read from the stop to the account of its downtime.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from migrated.base.clock import HostClock
from migrated.base.collector import QuietCollector
from migrated.base.errors import LinkLostError, MigrationError, VmmError
from migrated.kernel.scheduling import Precedence, threads_of
from migrated.link.control import Received
from migrated.record.parts import Part
from migrated.record.terms import Phase, QemuCheckpoint
from migrated.settings.config import LimitsConfig
from migrated.source.handover import SourceHandover
from migrated.source.transfer import Transfer
from protocol import messages
from protocol.blackout import SourceBudget, SourceReserves
from protocol.budget import DowntimeInterval, measured_downtime
from protocol.errors import ProtocolError, RemoteProtocolError
from protocol.guest import DeviceKind
from protocol.guest_time import TimeAdjustError, read_later
from protocol.handover import SourceEvent, SourceState, check_epoch
from protocol.messages import Limits
from protocol.pages import Runs

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Happened:
    """An occurrence that is no message: the event of the hand-over that it is, and a sentence with the reason."""

    event: SourceEvent
    reason: str


Item: TypeAlias = Received | Happened


class Switchover:
    """The blackout of one attempt.

    Args:
        transfer: what to send with, as the rounds left it.
        handover: decides who runs the guest.
        limits: the budget, fixed from here on: the destination is told it with every DOWNTIME.
        reserves: the parts of it that are reserved. They come from this attempt's measured legs and tried costs, the
            own resume also from what resumes took on this host.
        pending: pages that are dirty and not sent, shape (n, 2).
        inbox: messages of the control channel and other occurrences (``Happened``), in order.
        bounds: bounds of waits.
        clock: this host's clocks.
        hold: set when the operator lets a held switchover go on; None without pause-before-switchover.
        tells_hold: the destination wants to be told of a hold, and waits for its end then.
        on_stopped: called when the guest is stopped.
        on_scan: called after every read of the dirty log.
    """

    def __init__(
        self,
        transfer: Transfer,
        handover: SourceHandover,
        limits: Limits,
        reserves: SourceReserves,
        pending: Runs,
        inbox: asyncio.Queue[Item],
        bounds: LimitsConfig,
        clock: HostClock,
        hold: asyncio.Event | None,
        tells_hold: bool,
        on_stopped: Callable[[], None],
        on_scan: Callable[[], None],
    ) -> None:
        self._transfer = transfer
        self._handover = handover
        self._budget = SourceBudget(limits, reserves)
        self._pending = pending
        self._inbox = inbox
        self._bounds = bounds
        self._clock = clock
        self._hold = hold
        self._tells_hold = tells_hold
        self._on_stopped = on_stopped
        self._on_scan = on_scan
        self._ledger = transfer.ledger
        self._control = transfer.control
        self._state_begin_ns = 0
        self._state_sent_ns = 0
        self._ready_read_ns = 0
        self._due_ns = 0
        """Instant at which the message or deadline now handled came: an abort counts the return of the guest from then
        on."""
        self.gave_back_ns: int | None = None
        """Time from that instant until the guest ran again at an abort (ns); None without an abort."""
        self.after_commit_ns: int | None = None
        """Time from COMMIT until the guest ran on the destination (ns); None unless it did."""
        self.phase = Phase.PAUSE

    async def run(self) -> None:
        """Stop the guest and see the hand-over through: until it is decided, or in doubt.

        Every way out leaves a decision in ``handover``: RETIRED, ABORTED (the guest runs here again), or COMMITTED
        (in doubt). Nothing but cancellation of the daemon itself is raised.
        """
        # An operator may hold the guest for as long as he likes: others must not wait for us meanwhile.
        first = [] if self._hold is not None else threads_of(os.getpid(), self._transfer.vmm.pid)
        with QuietCollector(), Precedence(first):
            await self._run()

    async def _run(self) -> None:
        work: asyncio.Task[None] | None = None
        try:
            try:
                await self._transfer.vmm.prepare_stop()
            except VmmError as error:
                reason = f"the stop could not be prepared: {error}"
                await self._handover.take(SourceEvent.FAULT, self._control, reason)
                return
            self._budget.stop_asked(time.monotonic_ns())
            await self._handover.take(SourceEvent.STOP, self._control)
            if self._handover.state is not SourceState.STOPPED:
                return  # it could not be stopped
            self._stopped()
            work = asyncio.create_task(self._move_state())
            # A save that began behind the resume would stop the guest once more.
            self._handover.before_resume = work.cancel
            await self._see_through()
        finally:
            if work is not None:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    def _stopped(self) -> None:
        stopped_ns = self._handover.times.stopped_at_ns
        self._state_begin_ns = stopped_ns
        standing_ns = stopped_ns - self._handover.times.drained_ns
        self._ledger.part(Part.STOP, self._budget.t0_ns, standing_ns)
        if standing_ns < stopped_ns:
            self._ledger.part(Part.STOP_DRAIN, standing_ns, stopped_ns)
        self._ledger.add_phase(Phase.PAUSE, self._budget.t0_ns, stopped_ns)
        self._ledger.checkpoint(QemuCheckpoint.DOWNTIME_START, 0)
        self._ledger.checkpoint(QemuCheckpoint.VM_STOPPED, stopped_ns - self._budget.t0_ns)
        self._on_stopped()

    def _tell_downtime(self) -> None:
        elapsed_ns = self._budget.counted_ns(time.monotonic_ns())
        self._ledger.blackout.source_reported_ns = elapsed_ns
        self._control.send(
            messages.Downtime(
                epoch=self._handover.epoch,
                limits=self._budget.limits,
                resume_reserve_ns=self._budget.reserves.own_resume_ns,
                source_downtime_ns=elapsed_ns,
                sent_at_ns=self._clock.hrtime_ns(),
            )
        )

    # Section: work

    async def _move_state(self) -> None:
        """Send all remaining state; a failure is an event like any other."""
        try:
            await self._hold_if_asked()
            self._tell_downtime()
            await self._send_last_state()
        except (MigrationError, ProtocolError, OSError) as error:
            self._inbox.put_nowait(Happened(SourceEvent.FAULT, str(error)))
        except Exception as error:  # without a limit nothing else would end the wait for a vote
            log.exception("the last state could not be sent, for an unexpected reason")
            self._inbox.put_nowait(Happened(SourceEvent.FAULT, f"internal error: {error!r}"))

    async def _hold_if_asked(self) -> None:
        if self._hold is None:
            return
        self.phase = Phase.HOLD
        self._budget.hold_begins(time.monotonic_ns())
        if self._tells_hold:
            self._control.send(messages.Hold(epoch=self._handover.epoch))
        await self._hold.wait()
        end_ns = time.monotonic_ns()
        self._budget.hold_ends(end_ns)
        self._ledger.blackout.hold_ns = self._budget.held_ns
        self._ledger.part(Part.HOLD, self._state_begin_ns, end_ns)
        self._state_begin_ns = end_ns

    async def _send_last_state(self) -> None:
        transfer, ledger = self._transfer, self._ledger
        self.phase = Phase.FINAL_PAGES
        begin_ns = time.monotonic_ns()
        transfer.dirty_log.restore(self._pending)
        runs = await self._collect()
        fenced_ns = time.monotonic_ns()
        scanned_ns = fenced_ns - self._transfer.fence_ns
        # From the end of the stop, or of the hold, to here: the first DOWNTIME message.
        ledger.part(Part.DOWNTIME_MESSAGE, self._state_begin_ns, begin_ns)
        ledger.part(Part.FINAL_DIRTY_LOG_READ, begin_ns, scanned_ns)
        self._fence_part(scanned_ns, fenced_ns)
        # Devices are saved while the last pages are on their way.
        pages = asyncio.create_task(self._send_pages(runs))
        sending: list[asyncio.Future[int]] = []
        try:
            await self._save_devices("iterable", sending)
            iterable_ns = time.monotonic_ns()
            await self._save_devices("non-iterable", sending)
            pages_ns = await pages
            ledger.memory.downtime_bytes += sum(await asyncio.gather(*sending))
        finally:
            for task in (pages, *sending):
                task.cancel()
            await asyncio.gather(pages, *sending, return_exceptions=True)
        saved_ns = time.monotonic_ns()
        ledger.part(Part.FINAL_PAGES, fenced_ns, pages_ns)
        ledger.part(Part.DEVICE_SAVES, pages_ns, saved_ns)
        ledger.add_phase(Phase.FINAL_PAGES, begin_ns, pages_ns)
        ledger.add_phase(Phase.DEVICES, fenced_ns, saved_ns)
        ledger.checkpoint(QemuCheckpoint.ITERABLE_SAVED, max(pages_ns, iterable_ns) - self._budget.t0_ns)
        # Saving a device may write guest memory.
        runs = await self._collect()
        complete_ns = refenced_ns = time.monotonic_ns()
        rescanned_ns = refenced_ns - self._transfer.fence_ns
        ledger.part(Part.DIRTY_LOG_READ_AFTER_SAVES, saved_ns, rescanned_ns)
        self._fence_part(rescanned_ns, refenced_ns)
        if len(runs):
            complete_ns = await self._send_pages(runs)
            ledger.part(Part.PAGES_AFTER_SAVES, refenced_ns, complete_ns)
        ledger.checkpoint(QemuCheckpoint.NON_ITERABLE_SAVED, complete_ns - self._budget.t0_ns)
        self._end_state()
        ledger.part(Part.STATE_END, complete_ns, self._state_sent_ns)
        self.phase = Phase.FINISH

    async def _collect(self) -> Runs:
        runs = await self._transfer.collect()
        self._on_scan()
        return runs

    def _fence_part(self, begin_ns: int, end_ns: int) -> None:
        if end_ns > begin_ns:
            self._ledger.part(Part.FENCE, begin_ns, end_ns)

    def _end_state(self) -> None:
        """Tell the destination which state must have arrived before READY."""
        digest = self._transfer.sender.digest
        self._ledger.blackout.source_digest = digest.value if digest is not None else None
        self._ledger.blackout.source_reported_ns = elapsed_ns = self._budget.counted_ns(time.monotonic_ns())
        self._state_sent_ns = time.monotonic_ns()  # before the write: the answer cannot come earlier
        self._control.send(
            messages.StateEnd(
                epoch=self._handover.epoch,
                last_round=self._transfer.round,
                devices=self._transfer.state_order,
                digest=digest.value if digest is not None else 0,
                source_downtime_ns=elapsed_ns,
                sent_at_ns=self._clock.hrtime_ns(),
            )
        )

    async def _send_pages(self, runs: Runs) -> int:
        """Send one more round in the blackout. Returns when its last byte was handed to the kernel."""
        if self._transfer.shared:
            return time.monotonic_ns()
        sent = await self._transfer.send_round(runs)
        self._ledger.memory.downtime_bytes += sent.wire_bytes
        self._ledger.memory.downtime_pages += sent.normal_pages + sent.zero_pages
        self._tell_downtime()
        return time.monotonic_ns()

    async def _save_devices(self, kind: DeviceKind, sending: list[asyncio.Future[int]]) -> None:
        """Save all devices of a kind; each state is sent while the next is saved."""
        async for parts in self._transfer.vmm.state_out(kind):
            sending.append(self._transfer.send_final(parts))
            self._tell_downtime()

    # Section: waiting and deciding

    async def _see_through(self) -> None:
        handover = self._handover
        while handover.state in (SourceState.STOPPED, SourceState.COMMITTED) and not handover.in_doubt:
            try:
                async with asyncio.timeout(self._patience_s()):
                    item = await self._inbox.get()
            except TimeoutError:
                await self._out_of_time()
                continue
            try:
                await self._handle(item)
            except RemoteProtocolError as error:
                await handover.take(SourceEvent.FAULT, self._control, str(error))
        if handover.state is SourceState.ABORTED and handover.times.resumed_at_ns:
            self.gave_back_ns = handover.times.resumed_at_ns - self._due_ns
        self.account()

    async def _handle(self, item: Item) -> None:
        self._due_ns = time.monotonic_ns() if isinstance(item, Happened) else item.read_at_ns
        if isinstance(item, Happened):
            standing = None if item.event is SourceEvent.LINK_LOST else self._control
            await self._handover.take(item.event, standing, item.reason)
        else:
            await self._hear(item)

    def _patience_s(self) -> float | None:
        """Return the longest wait for the next event (s); None while nothing limits the wait."""
        if self._handover.state is SourceState.COMMITTED:
            return self._bounds.stop_timeout_s + self._bounds.heartbeat_timeout_s
        patience_ns = self._budget.patience_ns(time.monotonic_ns())
        if patience_ns is None:
            return None
        if self._hold is not None and not self._hold.is_set():
            return self._bounds.heartbeat_interval_s  # the hold does not count: compute the deadline again
        return patience_ns / 1e9

    async def _out_of_time(self) -> None:
        """Act on a deadline that passed without a message."""
        if self._handover.state is SourceState.COMMITTED:
            await self._handover.take(SourceEvent.DEADLINE, self._control)
            return
        now_ns = time.monotonic_ns()
        if (overdue_ns := self._budget.overdue_ns(now_ns)) is not None:
            self._due_ns = now_ns - overdue_ns
            verdict = self._budget.no_vote(self.phase, now_ns)
            await self._handover.take(verdict.event, self._control, verdict.reason)

    async def _hear(self, received: Received) -> None:
        message, handover = received.message, self._handover
        match message:
            case messages.TimeAsk():
                await self._answer_time(message, received)
            case messages.Ready(epoch=epoch):
                if check_epoch(handover.epoch, epoch):
                    await self._decide(message, received)
            case messages.No(epoch=epoch, cause=cause, reason=reason):
                if check_epoch(handover.epoch, epoch):
                    log.warning("the destination voted NO", cause=cause, reason=reason)
                    await handover.take(SourceEvent.NO, self._control, f"aborted by the destination: {reason}")
            case messages.Running(epoch=epoch):
                if check_epoch(handover.epoch, epoch):
                    handover.running, handover.running_read_ns = message, received.read_at_ns
                    await handover.take(SourceEvent.RUNNING, self._control)
            case messages.Discarded(epoch=epoch, reason=reason):
                if check_epoch(handover.epoch, epoch):
                    await handover.take(
                        SourceEvent.DISCARDED, self._control, f"the destination discarded the guest: {reason}"
                    )
            case _:
                await handover.take(
                    SourceEvent.FAULT, self._control, f"the destination sent {message.TYPE.name} out of turn"
                )

    async def _answer_time(self, ask: messages.TimeAsk, received: Received) -> None:
        """Export the guest's time inside the destination's exchange."""
        begin_ns = time.monotonic_ns()
        guest_time = self._transfer.vmm.time
        if guest_time is None:
            reason = "the destination asked for the guest's time, which does not travel apart from its devices"
            await self._handover.take(SourceEvent.FAULT, self._control, reason)
            return
        try:
            if (exported := self._handover.guest_time) is not None:
                exported = read_later(exported, self._clock.hrtime_ns(), self._clock.wall())
            else:
                exported = await guest_time.export_time()
            self._control.send(
                messages.TimeData(
                    nonce=ask.nonce, time=exported, t2_ns=received.read_at_hrtime_ns, t3_ns=self._clock.hrtime_ns()
                )
            )
        except (VmmError, LinkLostError, TimeAdjustError) as error:
            await self._handover.take(SourceEvent.FAULT, self._control, f"the guest's time cannot be exported: {error}")
        self._ledger.add_phase(Phase.TIME_DATA, begin_ns, time.monotonic_ns())

    async def _decide(self, ready: messages.Ready, received: Received) -> None:
        """Decide after READY: commit if the rest of the budget covers the remaining steps."""
        handover, ledger = self._handover, self._ledger
        if not self._state_sent_ns:
            await handover.take(SourceEvent.FAULT, self._control, "the destination voted READY before it had the state")
            return
        if handover.state is SourceState.STOPPED:
            self._ready_read_ns = received.read_at_ns
            waited_ns = received.read_at_ns - self._state_sent_ns
            completing_ns = min(ready.completing_ns, waited_ns)
            ledger.add_part(Part.COMPLETING, completing_ns)
            ledger.add_part(Part.STATE_END_AND_READY_LEGS, waited_ns - completing_ns)
        verdict = self._budget.judge_ready(ready.digest, ledger.blackout.source_digest, time.monotonic_ns())
        handover.commit_by_ns = self._budget.commit_by_ns(time.monotonic_ns())
        await handover.take(verdict.event, self._control, verdict.reason)

    # Section: the account

    def account(self) -> None:
        """Work out the downtime, once the hand-over is decided."""
        if self._handover.state is SourceState.RETIRED:
            self._completed()
        elif self._handover.state is SourceState.ABORTED:
            self._aborted()

    def _completed(self) -> None:
        handover, ledger, running = self._handover, self._ledger, self._handover.running
        if running is None:
            return
        ledger.part(Part.DECISION, self._ready_read_ns, handover.times.decided_at_ns)
        ledger.part(Part.JOURNAL, handover.times.decided_at_ns, handover.times.journaled_at_ns)
        ledger.part(Part.LOCK_RELEASE, handover.times.journaled_at_ns, handover.times.committed_at_ns)
        committed_ns = handover.times.committed_at_ns - self._budget.t0_ns
        interval = measured_downtime(
            committed_ns, handover.running_read_ns - self._budget.t0_ns, running.resumed_after_ns, running.sent_after_ns
        )
        self.after_commit_ns = interval.measured_ns - committed_ns
        resume_ns = min(running.resumed_after_ns, self.after_commit_ns)  # a peer's word, within what was seen here
        ledger.add_part(Part.COMMIT_LEG, self.after_commit_ns - resume_ns)
        ledger.add_part(Part.RESUME, resume_ns)
        ledger.checkpoint(QemuCheckpoint.DOWNTIME_END, interval.measured_ns)
        ledger.blackout.interval = interval
        ledger.ended_ns = self._budget.t0_ns + interval.measured_ns

    def _aborted(self) -> None:
        """Work out the pause of an abort: the guest ran again here."""
        handover, ledger = self._handover, self._ledger
        if not handover.times.resumed_at_ns:
            return
        accounted_ns = self._budget.t0_ns + sum(part.ns for part in ledger.blackout.parts)
        ledger.part(Part.UNTIL_ABORT, min(accounted_ns, handover.times.resume_begin_ns), handover.times.resume_begin_ns)
        ledger.part(Part.RESUME_ON_SOURCE, handover.times.resume_begin_ns, handover.times.resumed_at_ns)
        pause_ns = handover.times.resumed_at_ns - self._budget.t0_ns
        ledger.checkpoint(QemuCheckpoint.DOWNTIME_END, pause_ns)
        ledger.blackout.interval = DowntimeInterval(pause_ns, pause_ns)
        ledger.ended_ns = handover.times.resumed_at_ns
