"""The simulated source: rounds, blackout, decision, and asking for the outcome, over the real messages.

One attempt is one class: its procedures wait for one another, and a reader follows them from HELLO to the last answer.
That makes this module longer than others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from protocol import effects, messages
from protocol.blackout import TICK_NS, SourceReserves
from protocol.budget import abort_limit_ns, measured_downtime
from protocol.digest import MemoryDigest
from protocol.effects import DONE, SourceEffect, failed
from protocol.guest import DeviceDescription, GuestDescription, MemoryRegion
from protocol.guest_time import VmTimeData
from protocol.handover import SourceEvent, SourceState, check_epoch
from protocol.messages import Limits, Message
from protocol.pages import indices_of, pack_runs, runs_of, split_runs
from scripts.proof.actor import Actor, Attempt, Deed
from scripts.proof.guest import GUEST_FREQ, Vmm
from scripts.proof.kernel import MS, SECOND, Host, Process, Steps
from scripts.proof.model import Model
from scripts.proof.network import Channel, Control, End, Link, Listener, connect

BATCH_PAGES: Final = 8
HANDSHAKE_NS: Final = 15 * SECOND
ANSWER_NS: Final = 10 * SECOND
RETRY_NS: Final = 1 * SECOND
ABORT_TRIES: Final = 3
REQUIRED: Final = ("digest-xxh3-frames", "switchover-abort", "zero-runs")


@dataclass(frozen=True)
class Wish:
    """The settings of one attempt.

    Attributes:
        limits: the budget.
        offered: what HELLO says of it: the operator changed his mind since.
        channels: number of data channels.
        rounds: after how many rounds the guest is stopped, whatever is left.
        hold_ns: how long the operator holds the switchover.
    """

    limits: Limits
    offered: Limits
    channels: int
    rounds: int
    hold_ns: int = 0


class Outgoing(Actor[SourceState, SourceEvent, SourceEffect]):
    """One attempt."""

    def __init__(self, daemon: SourceDaemon, attempt: Attempt, wish: Wish, state: SourceState) -> None:
        process = daemon.process
        assert process is not None
        model = daemon.model
        super().__init__(process, attempt, model.source_executor(state, locks=True, table=model.source))
        self.daemon = daemon
        self.vmm = daemon.vmm
        self.wish = wish
        self.link = daemon.link
        self.control: Control | None = None
        self._data: list[Channel] = []
        self._joined = 0
        self._round = 0
        self._orders = 0
        self._digest = MemoryDigest(len(self.vmm.memory))
        self._budget = model.source_budget(wish.limits, SourceReserves(0, self.vmm.resume_cost_ns))
        self._time_ask: tuple[messages.TimeAsk, int] | None = None  # that came before the stop, and when
        self._held_ns = 0
        self._holding_since_ns: tuple[int, int] | None = None  # by the host's clock and in true time
        self._stop_true_ns = 0
        self._committed_ns = 0
        self._resume_there_ns = 0
        self._ever_committed = state is SourceState.COMMITTED
        self.vmm.on_death = lambda: self.process.wake(self._guest_gone)

    def take(self, event: SourceEvent, reply: Channel | None = None, why: str = "") -> None:
        if event is not SourceEvent.STOP:
            self._end_hold()  # whatever happens during a hold ends the attempt
        super().take(event, reply, why)

    def _guest_gone(self) -> None:
        if self.state in (SourceState.RUNNING, SourceState.STOPPED):
            self.take(SourceEvent.FAULT, self.control, "the guest's process is gone")

    # Section: negotiation and rounds

    def begin(self) -> None:
        """Connect and propose."""
        connect(self.link, self.process, self.daemon.listener, self._opened, self._failed)

    def _failed(self, reason: str) -> None:
        if self.state is SourceState.RUNNING:
            self.take(SourceEvent.FAULT, None, reason)

    def _opened(self, end: End) -> None:
        if self.state is not SourceState.RUNNING:
            end.close()
            return

        def lost(reason: str) -> None:
            self.take(SourceEvent.LINK_LOST, None, reason)

        control = self.control = Control(end, self._hear, lost)
        control.start()
        pages = len(self.vmm.memory)
        guest = GuestDescription(
            name="g1",
            uuid="00000000-0000-0000-0000-000000000001",
            vmm="sim",
            guest_time=True,
            machine="sim",
            page_size=4096,
            memory=(MemoryRegion(name="ram", guest_address=0, size_bytes=pages * 4096, offset_pages=0),),
            devices=tuple(
                DeviceDescription(name=name, kind="non-iterable", state_bytes=64) for name in self.vmm.devices
            ),
            vcpus=1,
            guest_freq=GUEST_FREQ,
        )
        control.send(
            messages.Hello(
                migration_id=self.attempt.migration_id,
                epoch=self.attempt.epoch,
                guest=guest,
                guest_paused=False,
                capabilities=REQUIRED,
                required=REQUIRED,
                limits=self.wish.offered,
                time_rules=messages.TimeRules(policy="midpoint", max_time_jump_ns=0, max_time_error_ns=0),
                channels=self.wish.channels,
                host="source",
            )
        )
        self.process.after(HANDSHAKE_NS, lambda: None if self._round else self._failed("no answer to HELLO"))

    def _welcomed(self, welcome: messages.Welcome) -> None:
        assert self.control is not None
        if self.state is not SourceState.RUNNING:
            return
        self.control.begin()
        self._resume_there_ns = welcome.resume_ns
        for number in range(self.wish.channels):
            connect(
                self.link,
                self.process,
                self.daemon.listener,
                lambda end, number=number: self._join(end, number, welcome.token),  # type: ignore[misc]  # bound per channel
                self._failed,
            )

    def _join(self, end: End, number: int, token: bytes) -> None:
        channel = Channel(end, lambda *_: self._one_joined(), self._data_lost)
        channel.start()
        channel.send(messages.Join(migration_id=self.attempt.migration_id, token=token, channel=number))
        self._data.append(channel)

    def _data_lost(self, reason: str) -> None:
        if self.state in (SourceState.RUNNING, SourceState.STOPPED):
            self.take(SourceEvent.FAULT, self.control, f"data channel: {reason}")

    def _one_joined(self) -> None:
        self._joined += 1
        if self._joined == self.wish.channels and self.state is SourceState.RUNNING:
            self.vmm.collect()
            self._send_round(np.flatnonzero(self.vmm.memory.any(axis=1)).tolist())

    def _send_round(self, pages: list[int]) -> None:
        assert self.control is not None
        self._round += 1
        plain = zero = 0
        for number, runs in enumerate(split_runs(runs_of(np.array(pages, np.int64)), BATCH_PAGES)):
            indices = indices_of(runs)
            content = self.vmm.memory[indices]
            nonzero = content.any(axis=1)
            channel = self._data[number % len(self._data)]
            if nonzero.any():
                kept, payload = indices[nonzero], content[nonzero].tobytes()
                batch_hash = xxhash.xxh3_64_intdigest(payload)
                self._digest.add(self._digest.set_pages(kept, batch_hash))
                page_frame = messages.Pages(encoding="plain", runs=pack_runs(runs_of(kept)), digest=batch_hash)
                channel.send(page_frame, payload, self._round)
                plain += len(kept)
            if not nonzero.all():
                gone = indices[~nonzero]
                self._digest.add(self._digest.set_zero(gone))
                channel.send(messages.ZeroPages(runs=pack_runs(runs_of(gone))), b"", self._round)
                zero += len(gone)
        for channel in self._data:
            channel.send(messages.Barrier(round=self._round), b"", self._round)
        self.control.send(messages.RoundEnd(round=self._round, pages=plain, zero_pages=zero))

    def _round_done(self, done: messages.RoundDone) -> None:
        if self.state is not SourceState.RUNNING or done.round != self._round:
            return
        if done.digest != self._digest.value:
            self.take(SourceEvent.FAULT, self.control, "the memory digest differs")
        elif self._round < self.wish.rounds:
            self._send_round(self.vmm.collect())
        else:
            self._stop()

    # Section: the blackout

    def _elapsed_ns(self) -> int:
        return self.host.clock_ns() - self._budget.t0_ns

    def _stop(self) -> None:
        assert self.control is not None
        reserves = SourceReserves(self.control.round_trip_ns() + self._resume_there_ns, self.vmm.resume_cost_ns)
        self._budget = self.daemon.model.source_budget(self.wish.limits, reserves)
        self._budget.stop_asked(self.host.clock_ns())
        self._stop_true_ns = self.vmm.estate.stop_asked_ns = self.world.now_ns
        self.vmm.estate.held_ns = 0
        self._watch()
        self.take(SourceEvent.STOP, self.control)

    def _watch(self) -> None:
        """Set the timer of the deadline; a hold moves it, so it may ring too early."""
        patience_ns = self._budget.patience_ns(self.host.clock_ns())
        if patience_ns is not None:
            self.process.after(patience_ns, self._look_at_the_clock)

    def _look_at_the_clock(self) -> None:
        if self.state is not SourceState.STOPPED:
            return
        now_ns = self.host.clock_ns()
        if self._budget.overdue_ns(now_ns) is None:
            self.process.after(TICK_NS, self._watch)
            return
        counted_ns = self._elapsed_ns() - self._held_ns
        least_ns = abort_limit_ns(self.wish.limits) - self.vmm.resume_cost_ns - TICK_NS
        self.world.require(
            counted_ns >= least_ns, f"L4: the source gives up after {counted_ns} ns, before its deadline"
        )
        verdict = self._budget.no_vote("Finish", now_ns)
        self.take(verdict.event, self.control, verdict.reason or "")

    def _tell_downtime(self) -> None:
        assert self.control is not None
        self.control.send(
            messages.Downtime(
                epoch=self.attempt.epoch,
                limits=self.wish.limits,
                resume_reserve_ns=self.vmm.resume_cost_ns,
                source_downtime_ns=self._budget.counted_ns(self.host.clock_ns()),
                sent_at_ns=self.host.clock_ns(),
            )
        )

    def _stopped(self) -> bool:
        return self.state is SourceState.STOPPED and self.vmm.state == "paused"

    def _blackout(self) -> Steps:
        assert self.control is not None
        if self._time_ask is not None:
            self._export_time(*self._time_ask)
        if self.wish.hold_ns:
            self._holding_since_ns = (self.host.clock_ns(), self.world.now_ns)
            self._budget.hold_begins(self._holding_since_ns[0])
            yield self.wish.hold_ns
            self._end_hold()
            if not self._stopped():
                return
        self._tell_downtime()
        yield MS // 4
        if not self._stopped():
            return
        self._send_round(self.vmm.collect())
        self._tell_downtime()
        for name, (save_ns, _) in self.vmm.devices.items():
            yield lambda go, ns=save_ns: self.vmm.request("devices", ns, lambda: None, go)  # type: ignore[misc]  # bound per device
            if not self._stopped():
                return
            self._send_state(name, save_ns)
            self._tell_downtime()
        self.control.send(
            messages.StateEnd(
                epoch=self.attempt.epoch,
                last_round=self._round,
                devices=self._orders,
                digest=self._digest.value,
                source_downtime_ns=self._budget.counted_ns(self.host.clock_ns()),
                sent_at_ns=self.host.clock_ns(),
            )
        )

    def _end_hold(self) -> None:
        """Let time count again: the operator lets the switchover go on, or something has ended it."""
        if self._holding_since_ns is None:
            return
        begin_ns, begin_true_ns = self._holding_since_ns
        self._holding_since_ns = None
        self._budget.hold_ends(self.host.clock_ns())
        self._held_ns = self.host.clock_ns() - begin_ns
        self.vmm.estate.held_ns = self.world.now_ns - begin_true_ns

    def _send_state(self, name: str, save_ns: int) -> None:
        state = self.vmm.states[name]
        channel = self._data[self._orders % len(self._data)]
        channel.send(
            messages.DeviceState(
                order=self._orders,
                name=name,
                kind="non-iterable",
                final=True,
                offset=0,
                total_bytes=len(state),
                digest=xxhash.xxh3_64_intdigest(state),
                save_ns=save_ns,
            ),
            state,
        )
        self._orders += 1

    def _export_time(self, ask: messages.TimeAsk, read_ns: int) -> None:
        assert self.control is not None
        now_ns = self.host.clock_ns()
        self.daemon.exported_true_ns = self.world.now_ns
        seconds, nanoseconds = divmod(self.world.now_ns, SECOND)
        exported = VmTimeData(
            guest_freq=GUEST_FREQ,
            guest_tsc=0,
            hrtime=now_ns,
            hres_sec=seconds,
            hres_ns=nanoseconds,
            boot_hrtime=self.vmm.boot_hrtime,
        )
        self.control.send(messages.TimeData(nonce=ask.nonce, time=exported, t2_ns=read_ns, t3_ns=now_ns))

    # Section: hearing and deciding

    def _hear(self, message: Message, _payload: bytes, _round: int) -> None:
        match message:
            case messages.Welcome():
                self._welcomed(message)
            case messages.Refuse(reason=reason):
                self._failed(reason)
            case messages.RoundDone():
                self._round_done(message)
            case messages.TimeAsk() if self._stopped():
                self._export_time(message, self.host.clock_ns())
            case messages.TimeAsk():
                self._time_ask = message, self.host.clock_ns()
            case messages.Ready(epoch=epoch) if check_epoch(self.attempt.epoch, epoch):
                self._decide(message)
            case messages.No(epoch=epoch, reason=reason) if check_epoch(self.attempt.epoch, epoch):
                self.take(SourceEvent.NO, self.control, reason)
            case _:
                self._answer(message)

    def _decide(self, ready: messages.Ready) -> None:
        verdict = self._budget.judge_ready(ready.digest, self._digest.value, self.host.clock_ns())
        self.take(verdict.event, self.control, verdict.reason or "")

    def _answer(self, message: Message) -> None:
        match message:
            case messages.Running(epoch=epoch) if check_epoch(self.attempt.epoch, epoch):
                self._check_downtime(message)
                self.take(SourceEvent.RUNNING)
            case messages.Discarded(epoch=epoch) if check_epoch(self.attempt.epoch, epoch):
                self.take(SourceEvent.DISCARDED)

    def _check_downtime(self, running: messages.Running) -> None:
        """The interval that the record would hold contains the truth."""
        if not self._committed_ns or not running.sent_after_ns:
            return
        interval = measured_downtime(
            self._committed_ns, self._elapsed_ns(), running.resumed_after_ns, running.sent_after_ns
        )
        truth_ns = self.vmm.estate.ran_true_ns - self._stop_true_ns
        slack_ns = truth_ns // 5_000 + 10
        self.world.require(
            interval.lower_ns - slack_ns <= truth_ns <= interval.upper_ns + slack_ns,
            f"the downtime of {truth_ns} ns is not within {interval.lower_ns} to {interval.upper_ns} ns",
        )

    # Section: acting

    def carry_out(self, effect: SourceEffect, reply: Channel | None) -> Deed:
        match effect:
            case effects.StopGuest():
                yield self.vmm.pause
                if self.vmm.state != "paused":
                    return failed("the VMM is gone")
                self.process.start(self._blackout())
            case effects.ReleaseLock():
                if not self.vmm.release_lock():
                    return failed("it runs")
            case effects.TakeLock():
                if self.vmm.state != "dead":
                    self.vmm.take_lock()
            case effects.ResumeGuest():
                yield lambda go: self.vmm.resume(self.attempt.epoch, go)
                self._check_pause()
            case effects.RetireGuest():
                self.vmm.die("source")
            case effects.SendCommit():
                self._commit(reply)
            case effects.SendAbort(reason=reason):
                if reply is not None and reply.open:
                    reply.send(messages.Abort(epoch=self.attempt.epoch, reason=reason[:2000]))
                else:
                    self._tell("abort", ABORT_TRIES, RETRY_NS)
            case effects.AskOutcome():
                self.world.say("source", "in doubt")
                self._tell("commit", -1, RETRY_NS)
        return DONE

    def _commit(self, reply: Channel | None) -> None:
        if not self._ever_committed and self.wish.limits.switchover_abort:
            left_ns = abort_limit_ns(self.wish.limits) - (self._elapsed_ns() - self._held_ns)
            undisturbed = self.process.disturbed_ns < self._stop_true_ns
            # Deciding, journaling and letting go of the lock take their time after the check.
            enough = left_ns + MS >= self._budget.reserves.commit_ns
            self.world.require(enough or not undisturbed, f"I5: COMMIT is sent with {left_ns} ns left of the limit")
        self._ever_committed = True
        self._committed_ns = self._elapsed_ns()
        if reply is not None:
            reply.send(messages.Commit(epoch=self.attempt.epoch))
        self.process.after(ANSWER_NS, self._no_answer)

    def _no_answer(self) -> None:
        if self.state is SourceState.COMMITTED:
            self.take(SourceEvent.DEADLINE, self.control)

    def _check_pause(self) -> None:
        """An abort gives the guest back within the budget, whatever the network does."""
        limits, vmm = self.wish.limits, self.vmm
        undisturbed = self._stop_true_ns and self.process.disturbed_ns < self._stop_true_ns
        if not undisturbed or self._ever_committed or not limits.switchover_abort or vmm.state != "running":
            return
        budget_ns = max(abort_limit_ns(limits), vmm.stop_cost_ns + vmm.resume_cost_ns)
        pause_ns = self.world.now_ns - self._stop_true_ns - vmm.estate.held_ns
        allowed_ns = budget_ns + budget_ns // 5_000 + MS
        self.world.require(pause_ns <= allowed_ns, f"L3: an abort paused the guest for {pause_ns} ns of {budget_ns} ns")

    def _tell(self, decision: str, tries: int, pause_ns: int) -> None:
        """Tell the decision over a fresh connection, and again if no answer comes."""
        wanted = SourceState.COMMITTED if decision == "commit" else SourceState.ABORTED
        if self.state is not wanted or not tries:
            return
        answered = False

        def again(_reason: str = "") -> None:
            nonlocal answered
            if not answered:
                answered = True
                later_ns = min(30 * SECOND, pause_ns * 3 // 2)
                self.process.after(pause_ns, lambda: self._tell(decision, tries - 1, later_ns))

        def hear(message: Message, _payload: bytes, _round: int) -> None:
            nonlocal answered
            if isinstance(message, messages.OutcomeOpen):
                again()
            elif not answered:
                answered = True
                self._answer(message)

        def opened(end: End) -> None:
            channel = Channel(end, hear, again)
            channel.start()
            ask = {"migration_id": self.attempt.migration_id, "epoch": self.attempt.epoch, "decision": decision}
            channel.send(messages.OutcomeAsk.model_validate(ask))
            self.process.after(HANDSHAKE_NS, channel.close)
            self.process.after(HANDSHAKE_NS, again)

        connect(self.link, self.process, self.daemon.listener, opened, again)

    def settled(self, event: SourceEvent) -> None:
        if self.state in (SourceState.ABORTED, SourceState.RETIRED):
            self.attempt.closed = True
            if self.control is not None and self.state is SourceState.RETIRED:
                self.control.close()
            self._close_data()

    def _close_data(self) -> None:
        for channel in self._data:
            channel.close()
        self._data = []


class SourceDaemon:
    """The source's daemon: its journal, and the life that it has now."""

    def __init__(
        self,
        host: Host,
        link: Link,
        vmm: Vmm,
        listener: Callable[[], tuple[Process, Listener] | None],
        model: Model,
    ) -> None:
        self.host = host
        self.link = link
        self.vmm = vmm
        self.listener = listener
        self.model = model
        self.process: Process | None = None
        self.journal: list[tuple[Attempt, Wish]] = []
        self.current: Outgoing | None = None
        self.exported_true_ns = 0

    def boot(self) -> None:
        """Begin a life: continue the attempt that the journal left open."""
        self.process = Process(self.host, "source")
        self.current = None
        if self.journal and not self.journal[-1][0].closed:
            attempt, wish = self.journal[-1]
            self.current = Outgoing(self, attempt, wish, self.model.source_state_of(attempt.decisions))
            self.current.take(SourceEvent.RESTART)

    def migrate(self, wish: Wish) -> None:
        """Begin an attempt."""
        epoch = len(self.journal) + 1
        attempt = Attempt(f"{epoch:032x}", epoch)
        self.journal.append((attempt, wish))
        self.host.world.say("source", f"attempt {epoch}")
        self.current = Outgoing(self, attempt, wish, SourceState.RUNNING)
        self.current.begin()
