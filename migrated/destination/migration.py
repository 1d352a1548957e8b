"""The story of one incoming attempt: an actor that takes one event at a time and never blocks.

    WELCOME -> rounds -> DOWNTIME (the deadline is set) -> load -> READY | NO -> COMMIT -> resume -> RUNNING -> REPORT

Messages, finished rounds, arrived states, timers and the end of loading all come through one queue. Who may run the
guest is decided by ``Takeover`` alone; what the budget is by ``phases``. ``welcome`` builds what the attempt needs. The
module is longer than others because every event of the queue has its handler here, and each changes the one phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass

import structlog
from pydantic import ValidationError

from migrated.base.errors import DocumentError, LinkLostError, MigrationError
from migrated.base.tasks import TaskSet
from migrated.destination.half import VoteTimes, check_record, guest_gap_of, half_of, log_costs, settle
from migrated.destination.haste import Haste
from migrated.destination.inbox import Broken, Item, LoadingDone, OutcomeAsked, RoundArrived
from migrated.destination.loading import ArrivedTime, Loading
from migrated.destination.offer import Offer
from migrated.destination.origin import Origin
from migrated.destination.pages import PageReceiver
from migrated.destination.phases import Alarm, Arriving, Blackout, Final, Terms
from migrated.destination.rounds import Rounds
from migrated.destination.states import ArrivedState
from migrated.destination.takeover import Takeover
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.link.control import ControlChannel, Received
from migrated.link.data import DataChannel
from migrated.link.reply import Reply
from migrated.link.security import Names
from migrated.link.sockets import Connection
from migrated.observe.progress import Progress
from migrated.record.model import Record
from migrated.record.received import read_received
from migrated.vmm.handed_over import HandedOverMemory
from migrated.vmm.memory import GuestMemory
from migrated.vmm.seam import ExpectedCosts
from protocol import messages
from protocol.blackout import Vote
from protocol.budget import abort_limit_ns
from protocol.clock import ClockError
from protocol.digest import MemoryDigest
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest_time import TimeAdjustError
from protocol.handover import DestinationEvent, DestinationState, check_epoch
from protocol.messages import NoCause

log = structlog.get_logger()

_RECORD_S = 5.0
_ASK_AGAIN_NS = 1_000_000_000
"""A TIME_ASK that is older when the guest stops is sent anew: clocks have drifted since, which widens its interval."""
_PROGRESS_BYTES = 1 << 20
"""Bytes that must arrive over the data channels within stall_timeout_s while the guest is loaded, or it has stalled."""


@dataclass(frozen=True, slots=True)
class Equipment:
    """All objects that taking one guest in needs, made for one offer.

    Attributes:
        guest: the empty guest, reserved for the attempt.
        memory: a mapping of its memory.
        digest: of what is in place, None when this migration keeps none.
        receiver, loading: put pages and states into the guest.
        takeover: decides who runs it.
        welcome: the answer to the offer.
        costs: expected costs of loading and resuming the guest here.
    """

    guest: Guest
    memory: GuestMemory
    digest: MemoryDigest | None
    receiver: PageReceiver
    loading: Loading
    takeover: Takeover
    welcome: messages.Welcome
    costs: ExpectedCosts

    @property
    def shared(self) -> bool:
        """Whether the memory is handed over, so that there are no rounds."""
        return isinstance(self.memory, HandedOverMemory)


class IncomingMigration:
    """One attempt to take a guest in.

    Args:
        env: the daemon.
        offer: the source's offer, which is taken.
        equipment: its objects, which the attempt owns from here on.
    """

    def __init__(self, env: Environment, offer: Offer, equipment: Equipment) -> None:
        self.migration_id = offer.hello.migration_id
        self.guest_name = offer.hello.guest.name
        self.takeover = equipment.takeover
        self._env = env
        self._offer = offer
        self._equipment = equipment
        self._view = offer.view
        self._inbox = offer.inbox
        self._rounds = Rounds(equipment.digest, offer.view.tally)
        own_resume_ns = env.resume_costs.reserve_ns(
            equipment.guest.vmm.driver, equipment.costs, abort_limit_ns(offer.hello.limits)
        )
        terms = Terms(offer.control, offer.hello.limits, own_resume_ns, self._late)
        self._phase: Arriving = Arriving(terms)
        self._times = VoteTimes()
        self._asked: dict[int, int] = {}
        """Instant of the last two TIME_ASKs that are not answered (raw clock, ns), by nonce: the older one may be
        answered as well."""
        self._asked_ns: int | None = None
        """Instant of the last one, None before there was any."""
        self._held = False
        """The source's operator holds the switchover, or did since progress was last looked at."""
        self._ready_alarm = Alarm()
        self._tasks = TaskSet()
        self._link_gone = False
        receiver = equipment.receiver
        self._haste = Haste(lambda: receiver.received_bytes, receiver.urgent_threads, equipment.guest.vmm.pid)
        self.ended = asyncio.Event()
        """Set when the attempt has ended and its record is kept, if one came."""
        self._record: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        """A future whose result is the source's record of the attempt as it came, None when it will not come."""

    # Section: from outside

    async def run(self) -> None:
        """Run the attempt from WELCOME to its end."""
        takeover = self.takeover
        try:
            self._begin()
            while not takeover.finished.is_set():
                await self._handle(await self._inbox.get())
            while not self._inbox.empty():
                if isinstance(item := self._inbox.get_nowait(), OutcomeAsked):
                    await self._handle(item)  # a source that asked just before the end still gets its answer
            await self._report()
        except Exception:
            # A bug must not cost more than this attempt. In READY only the source decides: it asks the journal.
            log.exception("the incoming migration failed unexpectedly")
            if takeover.state is DestinationState.LOADING:
                await takeover.take(DestinationEvent.FAULT, self._control, reason="internal error")
                self._env.journal.close_attempt(self.migration_id, "destination")
            self._view.set_status("failed")
        finally:
            try:
                await self._clean_up()
            finally:
                self.ended.set()

    @property
    def promised_bytes(self) -> int:
        """Memory that the guest may still come to need, as far as can be told."""
        return self._offer.promised_bytes

    @property
    def own(self) -> bool:
        """Whether this daemon itself is the source too."""
        return self._offer.replacement is not None

    @property
    def origin(self) -> Origin:
        """The host that the guest comes from."""
        return self._offer.origin

    def check_join(self, join: messages.Join, names: Names) -> None:
        """Check that a data channel belongs to this session: by its token, and by who brings it.

        Raises:
            RemoteProtocolError: it does not.
        """
        proves = secrets.compare_digest(join.token, self._equipment.welcome.token)
        if names != self._control.names or not proves:
            raise RemoteProtocolError(
                f"data channel {join.channel} does not prove to belong to this migration", ErrorCode.AUTH
            )

    def join(self, join: messages.Join, connection: Connection) -> None:
        """Take in a data channel that was checked.

        Raises:
            RemoteProtocolError: its number is taken, or the migration is ending.
        """
        self._equipment.receiver.add_channel(DataChannel(connection, join.channel))

    def outcome_asked(self, decision: DestinationEvent, reply: Reply) -> None:
        """The source sends its decision again, over a fresh connection."""
        self._inbox.put_nowait(OutcomeAsked(decision, reply))

    def cancel(self, reason: str) -> bool:
        """Give the attempt up from this side. Returns False when only the source can decide any more."""
        if self.takeover.state is not DestinationState.LOADING:
            return False
        self._offer.cancel(reason)
        return True

    def guest_gone(self) -> None:
        """The incoming guest's process ended by itself."""
        self._offer.guest_gone()

    def progress(self) -> Progress:
        """A snapshot for an operator."""
        phase = self._phase
        return self._view.progress(str(self.takeover.state), phase.limits, phase.counted_ns(time.monotonic_ns()))

    # Section: the actor

    @property
    def _control(self) -> ControlChannel:
        return self._offer.control

    @property
    def _reply(self) -> ControlChannel | None:
        """The channel for answers to the source, None when it is gone."""
        return None if self._link_gone else self._control

    def _begin(self) -> None:
        self._tasks.start(self._load())
        self._tell(self._equipment.welcome)
        if self._equipment.shared:
            self._ask_time()
        self._view.set_status("active")
        hello = self._offer.hello
        log.info("taking a guest in", memory_mib=hello.guest.memory_bytes >> 20, source=hello.host)
        self._tasks.start(self._listen())
        self._tasks.start(self._watch_progress())
        self._tasks.start(self._watch_age())
        self._haste.begin()
        self._tasks.start(self._haste.watch())

    async def _watch_progress(self) -> None:
        """Give the attempt up when nothing comes of it: a source that only answers clocks must not keep its place."""
        bounds, receiver = self._env.config.limits, self._equipment.receiver
        await asyncio.sleep(bounds.handshake_timeout_s)
        if not receiver.joined:
            self._break(
                DestinationEvent.FAULT, "lost", f"not all data channels joined within {bounds.handshake_timeout_s:g} s"
            )
        while True:
            before_bytes = receiver.received_bytes
            await asyncio.sleep(bounds.stall_timeout_s)
            if self._held:
                self._held = not isinstance(self._phase, Blackout)
            elif (came_bytes := receiver.received_bytes - before_bytes) < _PROGRESS_BYTES:
                self._break(
                    DestinationEvent.FAULT,
                    "lost",
                    f"the source sent {came_bytes} bytes in {bounds.stall_timeout_s:g} s ([limits] stall_timeout_s)",
                )

    async def _watch_age(self) -> None:
        """Give the attempt up when it lasts: rounds that always bring something must not keep its place for ever."""
        bound_s = self._env.config.limits.incoming_timeout_s
        await asyncio.sleep(bound_s)
        self._break(
            DestinationEvent.FAULT,
            "lost",
            f"the source has not handed its guest over within {bound_s:g} s ([limits] incoming_timeout_s)",
        )

    async def _listen(self) -> None:
        try:
            while True:
                received = await self._control.receive()
                if isinstance(received.message, messages.Record):
                    if self._record.done():
                        raise LinkLostError("a second record came")
                    self._record.set_result(received.payload)
                else:
                    self._inbox.put_nowait(received)
        except LinkLostError as error:
            self._link_gone = True
            if not self._record.done():
                self._record.set_result(None)
            self._break(DestinationEvent.LINK_LOST, "lost", f"the connection to the source was lost: {error}")

    async def _handle(self, item: Item) -> None:
        takeover = self.takeover
        try:
            match item:
                case Received():
                    await self._hear(item)
                case RoundArrived(number=number, received=received):
                    self._acknowledge(self._rounds.arrived(number, received))
                case ArrivedState():
                    self._equipment.loading.add_state(item)
                case OutcomeAsked(decision=decision, reply=asker):
                    await takeover.take(decision, asker, reason="the source keeps its guest")
                case LoadingDone(at_ns=at_ns):
                    await self._vote(at_ns)
                case Broken(event=event, cause=cause, reason=reason):
                    loading = takeover.state is DestinationState.LOADING
                    await takeover.take(event, self._reply, reason=reason, cause=cause)
                    if loading:  # said after the vote has left: a log that blocks must not cost downtime
                        log.warning("the incoming guest is given up", cause=cause, reason=reason)
        except RemoteProtocolError as error:
            log.error("the source broke the protocol", reason=str(error))
            with contextlib.suppress(RemoteProtocolError):
                await takeover.take(DestinationEvent.FAULT, self._reply, reason=str(error))

    async def _hear(self, received: Received) -> None:
        takeover = self.takeover
        match received.message:
            case messages.RoundEnd() as end:
                self._acknowledge(self._rounds.announced(end))
            case messages.Downtime(epoch=epoch) as downtime:
                if check_epoch(takeover.epoch, epoch):
                    self._hear_downtime(downtime, received)
            case messages.Hold(epoch=epoch) if not isinstance(self._phase, Blackout):
                if check_epoch(takeover.epoch, epoch):
                    self._held = True
                    self._view.set_status("pre-switchover")
            case messages.TimeData() as data:
                self._hear_time(data, received)
            case messages.DeviceState(final=True) as meta:
                self._hear_state(meta, received.payload)
            case messages.StateEnd(epoch=epoch) as end:
                if check_epoch(takeover.epoch, epoch):
                    self._hear_end(end, received)
            case messages.Owned(epoch=epoch, token=token):
                if check_epoch(takeover.epoch, epoch):
                    takeover.told_token = token
            case messages.Commit(epoch=epoch):
                if check_epoch(takeover.epoch, epoch):
                    self._stop_timers()
                    await takeover.take(DestinationEvent.COMMIT, self._control, read_at_ns=received.read_at_ns)
            case messages.Abort(epoch=epoch, reason=reason):
                if check_epoch(takeover.epoch, epoch):
                    await takeover.take(DestinationEvent.ABORT, self._control, reason=f"the source gave up: {reason}")
            case message:
                raise RemoteProtocolError(f"the source sent {message.TYPE.name} out of turn", ErrorCode.UNEXPECTED)

    def _acknowledge(self, done: messages.RoundDone | None) -> None:
        """Acknowledge a round that is in place."""
        if done is not None:
            self._tell(done)
            if not isinstance(self._phase, Blackout):
                self._ask_time()  # the source answers as soon as it stops the guest, which may be next
            if self._haste.round_over():
                self._tasks.start(self._measure_legs_anew())
            self._check_complete()

    async def _measure_legs_anew(self) -> None:
        """After a large round, in which what decides waited for threads that others kept waiting."""
        with contextlib.suppress(LinkLostError):
            await self._control.measure_anew(self._env.config.limits.handshake_timeout_s)

    def _check_complete(self) -> None:
        """Tell loading that all state has arrived, once STATE_END and the last round are both here."""
        phase = self._phase
        if isinstance(phase, Final) and phase.all_arrived(self._rounds.last):
            self._equipment.loading.all_arrived(phase.end.devices)

    # Section: the blackout

    def _hear_downtime(self, told: messages.Downtime | messages.StateEnd, received: Received) -> Blackout:
        first = not isinstance(self._phase, Blackout)
        blackout = self._phase = self._phase.hear(told, received)
        if first:
            if self._asked_ns is None or self._asked_ns < self._env.clock.hrtime_ns() - _ASK_AGAIN_NS:
                self._ask_time()  # first of all: its answer takes longer than what is done here meanwhile
            self._haste.guest_stopped()
            self._equipment.receiver.guest_stopped()
            self._view.set_status("device")
        return blackout

    def _hear_end(self, end: messages.StateEnd, received: Received) -> None:
        final = self._phase = Final(self._hear_downtime(end, received), end, received.read_at_ns)
        self.takeover.make_ready = lambda: final.ready(self._rounds.digest)
        self._check_complete()

    def _ask_time(self) -> None:
        """Ask for the guest's time, if it travels: with each round that is in place, or with the welcome where there
        are none, and at the stop if that is long ago."""
        if not self._offer.hello.guest.guest_time:
            return
        nonce, before = secrets.randbits(63), list(self._asked.items())[-1:]
        self._asked_ns = self._env.clock.hrtime_ns()
        self._asked = {**dict(before), nonce: self._asked_ns}
        self._tell(messages.TimeAsk(nonce=nonce))

    def _hear_time(self, data: messages.TimeData, received: Received) -> None:
        asked_at_ns = self._asked.pop(data.nonce, None)
        if asked_at_ns is None:
            raise RemoteProtocolError("time data answers no ask of ours", ErrorCode.TIME)
        if asked_at_ns != self._asked_ns:
            return  # the answer to a newer one is on its way
        arrived = ArrivedTime(data, asked_at_ns, received.read_at_hrtime_ns, self._control.offset())
        self._equipment.loading.add_time(arrived)

    def _hear_state(self, meta: messages.DeviceState, payload: bytes) -> None:
        """Take a device state that came beside the data channels: a final one, since there are no rounds."""
        if not meta.final:
            raise RemoteProtocolError("device state of a round came, and there are no rounds", ErrorCode.UNEXPECTED)
        states = self._equipment.receiver.states
        state, view = states.place(meta, len(payload))
        view[:] = payload
        if states.piece_done(state, len(payload)):
            self._equipment.loading.add_state(state)

    def _late(self, vote: Vote) -> None:
        self._break(vote.event, vote.cause, vote.reason)

    async def _load(self) -> None:
        try:
            await self._equipment.loading.run()
        except (MigrationError, TimeAdjustError, ClockError, ValidationError) as error:
            cause: NoCause = "time" if isinstance(error, TimeAdjustError | ClockError) else "load"
            self._break(DestinationEvent.FAULT, cause, f"the guest could not be loaded: {error}")
        except Exception as error:  # otherwise the source would wait for a vote for as long as it may
            log.exception("the guest could not be loaded, for an unexpected reason")
            self._break(DestinationEvent.FAULT, "load", f"internal error: {error!r}")
        else:
            self._inbox.put_nowait(LoadingDone(time.monotonic_ns()))

    async def _vote(self, loaded_ns: int) -> None:
        """Vote, once all state is in place."""
        takeover, digest = self.takeover, self._rounds.digest
        self._times.loaded_ns = loaded_ns
        if takeover.state is not DestinationState.LOADING:
            return
        checked_ns = time.monotonic_ns()
        vote = self._phase.vote(digest, checked_ns)
        if vote.cause != "digest":
            self._times.checked_ns = checked_ns
        await takeover.take(vote.event, self._reply, reason=vote.reason, cause=vote.cause)
        if takeover.awaits_decision:
            self._ready_alarm.ring_in(self._env.config.limits.ready_timeout_s, self._no_decision)

    def _no_decision(self) -> None:
        self._break(DestinationEvent.READY_TIMEOUT, "lost", "no decision came after READY")

    # Section: the end

    async def _report(self) -> None:
        """Send the destination's half of the record and wait for the source's record."""
        self._haste.end()
        takeover, env, hello = self.takeover, self._env, self._offer.hello
        done, guest_gap = self._equipment.loading.done, None
        self._view.reason = takeover.reason
        runs_here = takeover.state is DestinationState.RUNNING
        if runs_here:
            times = takeover.resume_times
            log_costs(self._phase, self._times, times, done)
            if times is not None and not hello.guest_paused:
                took_ns = times.end_ns - times.commit_read_ns
                env.resume_costs.add(hello.guest.vmm, took_ns, self._equipment.costs)
            if not hello.guest_paused:
                env.publish("RESUME", {"guest": self.guest_name})
                await settle(self._equipment.guest)
            guest_gap = await guest_gap_of(self._equipment.guest)
        else:
            log.warning("the incoming guest was discarded", reason=takeover.reason)
        lines = env.take_log(self.migration_id, "destination")
        half = half_of(env.host, self._phase, self._times, takeover, done, self._rounds.digest, guest_gap, lines)
        with contextlib.suppress(LinkLostError):
            self._control.send(messages.Report(), half.model_dump_json().encode())
            await asyncio.wait((self._record,), timeout=_RECORD_S)
        env.journal.close_attempt(self.migration_id, "destination")
        self._view.set_status("completed" if runs_here else "failed")
        if self._record.done() and (payload := self._record.result()) is not None:
            await self._keep_record(payload, runs_here)

    async def _keep_record(self, payload: bytes, runs_here: bool) -> None:
        """Keep the source's record, if it is one of this attempt; a source that is this daemon keeps it itself."""
        if self.own:
            return
        hello = self._offer.hello
        try:
            record = await asyncio.to_thread(read_received, Record, payload, "record")
            check_record(record, hello, self._view.started_at, runs_here)
        except DocumentError as error:
            log.warning("the source's record is not kept", reason=str(error))
        else:
            self._env.finish(record, "destination")

    def _tell(self, message: messages.Message) -> None:
        """Send a message while the channel stands; its loss is an event of its own."""
        with contextlib.suppress(LinkLostError):
            self._control.send(message)

    def _break(self, event: DestinationEvent, cause: NoCause, reason: str | None) -> None:
        self._inbox.put_nowait(Broken(event, cause, reason))

    def _stop_timers(self) -> None:
        self._phase.stop_deadline()
        self._ready_alarm.cancel()

    async def _clean_up(self) -> None:
        async with contextlib.AsyncExitStack() as undo:  # latest first, and each even if one before it fails
            undo.push_async_callback(asyncio.to_thread, self._equipment.memory.release)
            undo.push_async_callback(self._tasks.stop)
            undo.push_async_callback(self._control.close)
            undo.push_async_callback(self._equipment.receiver.stop)
            undo.callback(self._stop_timers)
            undo.callback(self._haste.end)
