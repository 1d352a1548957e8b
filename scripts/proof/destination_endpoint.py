"""The simulated destination: receiving, loading, the deadline, the vote and the take-over, over the real messages.

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
from protocol.answers import journaled_answer, may_close, who_answers
from protocol.blackout import DestinationBudget
from protocol.budget import DowntimeCount, abort_limit_ns
from protocol.clock import ExportExchange
from protocol.digest import MemoryDigest
from protocol.effects import DONE, Answer, DestinationEffect, Outcome, Result, failed
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest_time import adjust_time_data, choose_elapsed
from protocol.handover import DestinationEvent, DestinationState, check_epoch
from protocol.messages import Limits, Message
from protocol.pages import indices_of, unpack_runs
from protocol.versions import CAPABILITIES, REQUIRED_CAPABILITIES, agree_capabilities
from scripts.proof.actor import Actor, Attempt, Deed
from scripts.proof.guest import WORDS, Vmm
from scripts.proof.kernel import MS, SECOND, Host, Process, Steps
from scripts.proof.model import Model
from scripts.proof.network import Channel, Control, End, Listener

READY_TIMEOUT_NS: Final = 10 * SECOND
BUILD_NS: Final = 5 * MS
TOKEN: Final = bytes(range(16))


@dataclass
class Round:
    """Counts of what has arrived of one round."""

    pages: int = 0
    zero_pages: int = 0
    payload_bytes: int = 0
    barriers: int = 0
    end: messages.RoundEnd | None = None


@dataclass
class Resumed:
    """When COMMIT was read, and how long after that the vCPUs ran (ns of the host's clock), 0 before."""

    commit_read_ns: int = 0
    resumed_after_ns: int = 0


class Incoming(Actor[DestinationState, DestinationEvent, DestinationEffect]):
    """One attempt."""

    def __init__(
        self, daemon: DestinationDaemon, attempt: Attempt, state: DestinationState, hello: messages.Hello | None
    ) -> None:
        process = daemon.process
        assert process is not None
        model = daemon.model
        super().__init__(process, attempt, model.destination_executor(state, locks=True, table=model.destination))
        self.daemon = daemon
        self.vmm = daemon.vmm
        self.control: Control | None = None
        self._hello = hello
        self._digest = MemoryDigest(hello.guest.pages if hello is not None else 0)
        self._round_of: dict[int, int] = {}
        self._rounds: dict[int, Round] = {}
        self._rounds_done = 0
        self._states: dict[int, tuple[str, bytes]] = {}
        self._loaded = 0
        self._load_busy = False
        self._end: messages.StateEnd | None = None
        self._end_read_ns = 0
        self._budget: DestinationBudget | None = None
        self._told_limits: Limits | None = None
        self._deadline = 0
        self._asked_ns: dict[int, int] = {}
        self._time_imported = False
        self._resumed = Resumed()
        if state is not DestinationState.LOADING:
            self._arm_ready_timeout()
        if self.vmm is not None:
            self.vmm.on_death = lambda: self.process.wake(lambda: self.take(DestinationEvent.FAULT, self.control))

    @property
    def final(self) -> bool:
        """True once it is decided here which host runs the guest."""
        return self.core.final

    # Section: receiving

    def hear(self, message: Message, _payload: bytes, _round: int) -> None:
        """A message on the control channel."""
        match message:
            case messages.Commit(epoch=epoch) if check_epoch(self.attempt.epoch, epoch):
                self.take(DestinationEvent.COMMIT, self.control)
            case messages.Abort(epoch=epoch) if check_epoch(self.attempt.epoch, epoch):
                self.take(DestinationEvent.ABORT, self.control)
            case _ if self.state is not DestinationState.LOADING:
                pass  # state for a guest that is given up
            case messages.RoundEnd(round=number):
                self._rounds.setdefault(number, Round()).end = message
                self._check_round(number)
            case messages.Downtime(epoch=epoch) if check_epoch(self.attempt.epoch, epoch):
                self._hear_downtime(message.source_downtime_ns, message.sent_at_ns, message)
            case messages.TimeData():
                self._import_time(message)
            case messages.StateEnd(epoch=epoch) if check_epoch(self.attempt.epoch, epoch):
                self._hear_downtime(message.source_downtime_ns, message.sent_at_ns)
                self._end, self._end_read_ns = message, self.host.clock_ns()
                self._go_on()

    def join(self, channel: Channel, join: messages.Join) -> None:
        """A data channel."""
        number = join.channel
        self._round_of[number] = 1
        channel.on_message = lambda *frame: self._hear_data(channel, number, *frame)
        channel.on_lost = self._data_lost
        channel.send(messages.Joined(channel=number))

    def _data_lost(self, reason: str) -> None:
        if self.state is DestinationState.LOADING:
            self.take(DestinationEvent.FAULT, self.control, f"data channel: {reason}")

    def _hear_data(self, channel: Channel, number: int, message: Message, payload: bytes, round_number: int) -> None:
        if self.state is not DestinationState.LOADING or self.vmm is None or self.vmm.state == "dead":
            return
        try:
            self._take_data(number, message, payload, round_number)
        except RemoteProtocolError as error:
            self.take(DestinationEvent.FAULT, self.control, str(error))
            channel.fail(error)

    def _take_data(self, number: int, message: Message, payload: bytes, round_number: int) -> None:
        assert self.vmm is not None
        if not isinstance(message, messages.DeviceState) and round_number != self._round_of[number]:
            raise RemoteProtocolError(f"round {round_number} came in round {self._round_of[number]}")
        current = self._rounds.setdefault(round_number, Round())
        match message:
            case messages.Pages(runs=runs, digest=digest):
                indices = indices_of(unpack_runs(runs, len(self.vmm.memory)))
                batch_hash = xxhash.xxh3_64_intdigest(payload)
                if batch_hash != digest or len(payload) != len(indices) * WORDS * 8:
                    raise RemoteProtocolError("a batch arrived damaged", ErrorCode.CORRUPT)
                self.vmm.memory[indices] = np.frombuffer(payload, np.uint64).reshape(-1, WORDS)
                self._digest.add(self._digest.set_pages(indices, batch_hash))
                current.pages += len(indices)
                current.payload_bytes += len(payload)
            case messages.ZeroPages(runs=runs):
                indices = indices_of(unpack_runs(runs, len(self.vmm.memory)))
                self.vmm.memory[indices] = 0
                self._digest.add(self._digest.set_zero(indices))
                current.zero_pages += len(indices)
            case messages.Barrier(round=ended):
                self._round_of[number] = ended + 1
                current.barriers += 1
                self._check_round(ended)
            case messages.DeviceState():
                if xxhash.xxh3_64_intdigest(payload) != message.digest:
                    raise RemoteProtocolError("a device state arrived damaged", ErrorCode.CORRUPT)
                self._states[message.order] = (message.name, payload)
                self._go_on()

    def _check_round(self, number: int) -> None:
        current = self._rounds[number]
        assert self._hello is not None
        assert self.control is not None
        if current.end is None or current.barriers < self._hello.channels:
            return
        if (current.end.pages, current.end.zero_pages) != (current.pages, current.zero_pages):
            self.take(DestinationEvent.FAULT, self.control, f"round {number} is not whole")
            return
        self._rounds_done = number
        done = messages.RoundDone(round=number, bytes=current.payload_bytes, digest=self._digest.value)
        self.control.send(done)
        if self._budget is None:
            self._ask_time()
        self._go_on()

    # Section: the blackout

    def _hear_downtime(
        self, source_downtime_ns: int, sent_at_ns: int, downtime: messages.Downtime | None = None
    ) -> None:
        assert self.control is not None
        assert self.vmm is not None
        assert self._hello is not None
        transit_ns, now_ns = self.control.transit_upper_ns(sent_at_ns), self.host.clock_ns()
        if (budget := self._budget) is None:
            count = DowntimeCount(source_downtime_ns + transit_ns, now_ns)
            budget = self._budget = self.daemon.model.destination_budget(
                self._hello.limits, self.vmm.resume_cost_ns, count
            )
            if max(self._asked_ns.values(), default=now_ns - 2 * SECOND) < now_ns - SECOND:
                self._ask_time()
        else:
            budget.count.hear(source_downtime_ns, transit_ns, now_ns)
        if downtime is not None:
            budget.set_terms(downtime.limits, downtime.resume_reserve_ns)
            self._told_limits = downtime.limits
        self._check_count(budget)
        patience_ns = budget.patience_ns(self.control.round_trip_ns(), now_ns)
        if patience_ns is not None:
            self._deadline += 1
            armed = self._deadline
            self.process.after(patience_ns, lambda: self._deadline_passed(budget, armed))

    def _check_count(self, budget: DestinationBudget) -> None:
        """The destination never counts less than what has passed."""
        assert self.vmm is not None
        estate = self.vmm.estate
        truth_ns = self.world.now_ns - estate.stop_asked_ns - estate.held_ns
        counted_ns = budget.count.now(self.host.clock_ns())
        self.world.require(
            counted_ns + truth_ns // 5_000 + 10 >= truth_ns,
            f"the destination counts {counted_ns} ns of downtime when {truth_ns} ns have passed",
        )

    def _deadline_passed(self, budget: DestinationBudget, armed: int) -> None:
        if armed == self._deadline and self.control is not None:
            vote = budget.over_limit(self.control.round_trip_ns(), self.host.clock_ns())
            self.take(vote.event, self.control, vote.reason or "")

    def _ask_time(self) -> None:
        assert self.control is not None
        nonce = len(self._asked_ns)
        self._asked_ns[nonce] = self.host.clock_ns()
        self.control.send(messages.TimeAsk(nonce=nonce))

    def _import_time(self, data: messages.TimeData) -> None:
        """The interval for the elapsed time contains the truth."""
        assert self.vmm is not None
        if data.nonce != max(self._asked_ns):
            return  # the answer to a newer one is on its way
        now_ns = self.host.clock_ns()
        exchange = ExportExchange(self._asked_ns[data.nonce], data.t2_ns, data.time.hrtime, data.t3_ns, now_ns, now_ns)
        assert self.control is not None
        elapsed = exchange.elapsed(offset=self.control.offset())
        truth_ns = self.world.now_ns - self.daemon.exported_true_ns()
        self.world.require(
            elapsed.lower_ns <= truth_ns <= elapsed.upper_ns,
            f"{truth_ns} ns since the export are not within {elapsed.lower_ns} to {elapsed.upper_ns} ns",
        )
        adjustment = adjust_time_data(
            data.time,
            destination_hrtime=now_ns,
            destination_wall=divmod(self.world.now_ns, SECOND),
            elapsed_ns=choose_elapsed(elapsed, "midpoint"),
        )
        self.vmm.boot_hrtime = adjustment.adjusted.boot_hrtime
        self._time_imported = True
        self._go_on()

    def _go_on(self) -> None:
        """Load the states that can be loaded, and vote when all are."""
        end, vmm = self._end, self.vmm
        complete = end is not None and self._rounds_done >= end.last_round and self._time_imported
        if not complete or self._load_busy or vmm is None or self.state is not DestinationState.LOADING:
            return
        assert end is not None
        if self._loaded < end.devices:
            if self._loaded in self._states:
                name, state = self._states[self._loaded]
                self._load_busy = True
                self.process.start(self._load(vmm, name, state))
            return
        self._vote(end)

    def _load(self, vmm: Vmm, name: str, state: bytes) -> Steps:
        def put() -> None:
            vmm.states[name] = state

        yield lambda go: vmm.request("devices", vmm.devices[name][1], put, go)
        self._load_busy = False
        self._loaded += 1
        self._go_on()

    def _vote(self, end: messages.StateEnd) -> None:
        assert self.control is not None
        assert self._budget is not None
        round_trip_ns, now_ns = self.control.round_trip_ns(), self.host.clock_ns()
        vote = self._budget.vote(self._digest.value, end.digest, round_trip_ns, now_ns)
        self.take(vote.event, self.control, vote.reason or "")

    # Section: acting

    def carry_out(self, effect: DestinationEffect, reply: Channel | None) -> Deed:
        vmm, epoch = self.vmm, self.attempt.epoch
        match effect:
            case effects.TakeLock():
                if vmm is None or vmm.state == "dead":
                    return failed("the VMM is gone")
                vmm.take_lock()
            case effects.LookAtGuest():
                return _seen(vmm)
            case effects.ResumeGuest():
                return (yield from self._resume(vmm))
            case effects.EndGuest():
                if vmm is not None:
                    vmm.die("destination")
                ran = ("destination", epoch) in self.daemon.runs()
                return Outcome(Result.RUNS if ran else Result.NEVER_RAN)
            case effects.DestroyGuest():
                if vmm is not None:
                    vmm.on_death = lambda: None
                    vmm.die("destination")
                    self.vmm = self.daemon.vmm = None
            case effects.SendReady():
                self._send_ready()
            case effects.SendNo(cause=cause, reason=reason):
                _send(reply, messages.No(epoch=epoch, cause=cause, reason=reason[:2000]))
            case effects.SendRunning() | effects.SendDiscarded() | effects.SendOpen():
                after_ns = self._resumed.resumed_after_ns
                sent_ns = self.host.clock_ns() - self._resumed.commit_read_ns if after_ns else 0
                _send(reply, answer_message(effect, epoch, after_ns, sent_ns))
        return DONE

    def _send_ready(self) -> None:
        assert self._budget is not None
        assert self.control is not None
        now_ns = self.host.clock_ns()
        counted_ns = self._budget.count.now(now_ns)
        self._check_vote(counted_ns)
        self.control.send(
            messages.Ready(
                epoch=self.attempt.epoch,
                digest=self._digest.value,
                elapsed_ns=counted_ns,
                completing_ns=now_ns - self._end_read_ns,
            )
        )

    def _check_vote(self, counted_ns: int) -> None:
        """READY leaves only while the limit that the source told can be kept."""
        limits = self._told_limits
        if limits is None or not limits.switchover_abort or self.process.disturbed_ns >= 0:
            return
        limit_ns = abort_limit_ns(limits)
        self.world.require(counted_ns < limit_ns, f"L2: READY is voted after {counted_ns} ns of {limit_ns} ns")

    def _resume(self, vmm: Vmm | None) -> Deed:
        if vmm is None:
            return failed("the VMM is gone")
        yield lambda go: vmm.resume(self.attempt.epoch, go)
        if vmm.state != "running":
            return failed("it does not run")
        # The VMM says when its vCPUs ran: this daemon may hear of it late.
        self._resumed.resumed_after_ns = (
            vmm.ran_hrtime - self._resumed.commit_read_ns if self._resumed.commit_read_ns else 0
        )
        return DONE

    def take(self, event: DestinationEvent, reply: Channel | None = None, why: str = "") -> None:
        if event is DestinationEvent.COMMIT and self.state is DestinationState.READY:
            self._resumed.commit_read_ns = self.host.clock_ns()
        super().take(event, reply, why)

    def settled(self, event: DestinationEvent) -> None:
        if event is DestinationEvent.LOADED and self.state is DestinationState.READY:
            self._arm_ready_timeout()
        if self.final:
            self.attempt.closed = may_close(self.attempt.decisions)
            if self.control is not None:
                self.process.after(SECOND, self.control.close)

    def _arm_ready_timeout(self) -> None:
        self.process.after(READY_TIMEOUT_NS, lambda: self.take(DestinationEvent.READY_TIMEOUT))


class DestinationDaemon:
    """The destination's daemon: its journal, and the life that it has now.

    Args:
        host: where it is.
        build: makes an empty guest process.
        runs: the marks that VMMs left.
        exported_true_ns: when the source exported the guest's time, for the check of the interval.
        model: the rules.
    """

    def __init__(
        self,
        host: Host,
        build: Callable[[], Vmm],
        runs: Callable[[], list[tuple[str, int]]],
        exported_true_ns: Callable[[], int],
        model: Model,
    ) -> None:
        self.host = host
        self.runs = runs
        self.exported_true_ns = exported_true_ns
        self.model = model
        self.process: Process | None = None
        self.vmm: Vmm | None = None
        self.journal: dict[str, Attempt] = {}
        self.known: dict[str, Incoming] = {}
        self._build = build

    def boot(self) -> None:
        """Begin a life: continue the attempts that the journal left open."""
        self.process = Process(self.host, "destination")
        self.known = {}
        if not self.journal:
            return
        # Only the newest: what an older epoch left open must not touch the guest, which may be here again.
        attempt = max(self.journal.values(), key=lambda known: known.epoch)
        if not attempt.closed:
            incoming = Incoming(self, attempt, self.model.destination_state_of(attempt.decisions), None)
            self.known[attempt.migration_id] = incoming
            incoming.take(DestinationEvent.RESTART)

    def listener(self) -> tuple[Process, Listener] | None:
        """Who takes connections now."""
        return None if self.process is None or not self.process.alive else (self.process, self._accept)

    def _accept(self, end: End) -> None:
        def first(message: Message, _payload: bytes, _round: int) -> None:
            self._first(channel, message)

        channel = Control(end, first, lambda _: None)
        channel.start()

    def _first(self, channel: Control, message: Message) -> None:
        match message:
            case messages.Hello():
                self._hello(channel, message)
            case messages.Join(migration_id=migration_id) if migration_id in self.known:
                self.known[migration_id].join(channel, message)
            case messages.OutcomeAsk():
                self._outcome_asked(channel, message)
            case _:
                channel.fail(RemoteProtocolError("out of turn", ErrorCode.UNEXPECTED))

    def _hello(self, channel: Control, hello: messages.Hello) -> None:
        for known in self.known.values():
            event = self.model.newer_epoch(known.state)
            if known.attempt.epoch < hello.epoch and event is not None:
                known.take(event)
        offered, required = frozenset(hello.capabilities), frozenset(hello.required)
        agreed = agree_capabilities(offered, CAPABILITIES, required | REQUIRED_CAPABILITIES)
        if self.vmm is not None or self.host.disk_full or not all(known.final for known in self.known.values()):
            channel.send(messages.Refuse(code=int(ErrorCode.GUEST_EXISTS), reason="a guest with this name is here"))
            return
        process = self.process
        assert process is not None
        self.vmm = self._build()
        attempt = Attempt(hello.migration_id, hello.epoch)
        self.journal[attempt.migration_id] = attempt
        incoming = self.known[attempt.migration_id] = Incoming(self, attempt, DestinationState.LOADING, hello)
        incoming.control = channel
        channel.on_message = incoming.hear
        channel.on_lost = lambda reason: incoming.take(DestinationEvent.LINK_LOST, None, reason)
        welcome = messages.Welcome(
            token=TOKEN,
            capabilities=tuple(sorted(agreed)),
            load_costs=(),
            resume_ns=self.vmm.resume_cost_ns,
            ready_timeout_ns=READY_TIMEOUT_NS,
            host="destination",
        )

        def answer() -> None:
            channel.send(welcome)
            channel.begin()

        process.after(BUILD_NS, answer)

    def _outcome_asked(self, channel: Control, ask: messages.OutcomeAsk) -> None:
        event = DestinationEvent.COMMIT if ask.decision == "commit" else DestinationEvent.ABORT
        if (incoming := who_answers(self.known.get(ask.migration_id), None, None)) is not None:
            incoming.take(event, channel)
            return
        attempt = self.journal.get(ask.migration_id)
        answer = journaled_answer(event, attempt.decisions if attempt is not None else None)
        channel.send(answer_message(answer, ask.epoch))


def answer_message(answer: Answer, epoch: int, resumed_after_ns: int = 0, sent_after_ns: int = 0) -> Message:
    """An answer to a decision, as a message."""
    match answer:
        case effects.SendRunning():
            return messages.Running(epoch=epoch, resumed_after_ns=resumed_after_ns, sent_after_ns=sent_after_ns)
        case effects.SendDiscarded(reason=reason):
            return messages.Discarded(epoch=epoch, reason=reason[:2000])
        case effects.SendOpen(reason=reason):
            return messages.OutcomeOpen(epoch=epoch, reason=reason[:2000])


def _send(reply: Channel | None, message: Message) -> None:
    if reply is not None:
        reply.send(message)


def _seen(vmm: Vmm | None) -> Outcome:
    if vmm is None or vmm.state == "dead":
        return failed("the VMM is gone")
    return Outcome(Result.RUNS if vmm.state == "running" else Result.WAITS)
