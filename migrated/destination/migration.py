"""The story of one incoming attempt: an actor that takes one event at a time and never blocks.

    HELLO -> build an empty equal guest -> WELCOME -> rounds -> DOWNTIME (the deadline is set) -> load -> READY | NO
    COMMIT -> resume -> RUNNING -> REPORT

Messages, finished rounds, arrived states, timers and the end of loading all come through one queue. Who may run the
guest is decided by ``Takeover`` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

import structlog
from pydantic import ValidationError

from migrated.destination.decoding import allowed_encodings
from migrated.destination.loading import ArrivedTime, Loading
from migrated.destination.pages import ArrivedState, PageReceiver, RoundReceived
from migrated.destination.takeover import Takeover
from migrated.environment import Environment
from migrated.errors import LinkLostError, MigrationError, RefusedError, VmmError
from migrated.guests import Guest
from migrated.journal import JournalError
from migrated.link.control import ControlChannel, Received
from migrated.link.data import DataChannel
from migrated.link.reply import Reply
from migrated.link.security import Names
from migrated.link.sockets import Connection
from migrated.progress import Moved, Progress, Standing, snapshot
from migrated.record.model import Checkpoint, DestinationHalf, DowntimePart, GuestGap, LogLine, Record
from migrated.record.parts import Part
from migrated.record.terms import QemuCheckpoint, Status
from migrated.tasks import TaskSet
from migrated.vmm.memory import GuestMemory, shared_huge_pages
from migrated.vmm.seam import ExpectedCosts
from protocol import messages
from protocol.budget import DowntimeCount, abort_limit_ns, destination_remaining_ns
from protocol.clock import ClockError
from protocol.digest import MemoryDigest
from protocol.errors import ErrorCode, ProtocolError, RemoteProtocolError
from protocol.guest_time import TimeAdjustError
from protocol.handover import DestinationEvent, DestinationState, check_epoch
from protocol.messages import NoCause
from protocol.versions import CAPABILITIES, REQUIRED_CAPABILITIES, agree_capabilities

log = structlog.get_logger()

_RECORD_S = 5.0
_VOTE_NS = 3_000_000
"""The event loop's timers count whole milliseconds on both hosts, and a vote is journaled before it is sent."""
_TICK_NS = 1_000_000


@dataclass(frozen=True, slots=True)
class RoundArrived:
    """A round is complete on every data channel."""

    number: int
    received: RoundReceived


@dataclass(frozen=True, slots=True)
class Broken:
    """Something failed: what it means for the hand-over, and why."""

    event: DestinationEvent
    cause: NoCause
    reason: str


@dataclass(frozen=True, slots=True)
class OutcomeAsked:
    """The source tells its decision over a fresh connection."""

    decision: DestinationEvent
    reply: Reply


class _LoadedItem:
    """Loading has finished."""


Item: TypeAlias = Received | RoundArrived | ArrivedState | Broken | OutcomeAsked | _LoadedItem


class IncomingMigration:
    """One attempt to take a guest in.

    Args:
        env: the daemon.
        control: the session's control channel, started.
        hello: the source's offer.
        on_change: called after every visible change.
    """

    def __init__(
        self,
        env: Environment,
        control: ControlChannel,
        hello: messages.Hello,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.migration_id = hello.migration_id
        self.guest_name = hello.guest.name
        self.status: Status = "setup"
        self.record: Record | None = None
        self.takeover: Takeover | None = None
        self._env = env
        self._control = control
        self._hello = hello
        self._limits = hello.limits
        self._source_resume_ns = 0
        self._on_change = on_change
        self._token = secrets.token_bytes(16)
        self._inbox: asyncio.Queue[Item] = asyncio.Queue()
        self._tasks = TaskSet()
        self._guest: Guest | None = None
        self._memory: GuestMemory | None = None
        self._digest: MemoryDigest | None = None
        self._receiver: PageReceiver | None = None
        self._loading: Loading | None = None
        self._loading_task: asyncio.Task[None] | None = None
        self._costs = ExpectedCosts((), 0, 0, 0, "guessed")
        self._resume_ns = 0
        """What the resume here is counted with."""
        self._count: DowntimeCount | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._ready_timer: asyncio.TimerHandle | None = None
        self._asked: dict[int, int] = {}
        self._rounds = 0
        self._round_ends: dict[int, messages.RoundEnd] = {}
        self._rounds_arrived: dict[int, RoundReceived] = {}
        self._state_end: messages.StateEnd | None = None
        self._state_end_read_ns = 0
        self._arrived_ns = 0
        self._loaded_ns = 0
        self._checked_ns = 0
        self._counted_ns: int | None = None
        self._source_reported_ns: int | None = None
        self._checkpoints: list[Checkpoint] = []
        self._first_downtime_ns = 0
        self._began_ns = time.monotonic_ns()
        self._started_at = datetime.now(UTC).isoformat()
        self._received_bytes = 0
        self._normal_pages = 0
        self._zero_pages = 0
        self._reason: str | None = None
        self._link_gone = False
        self._record_arrived = asyncio.Event()

    # Section: from outside

    async def run(self) -> None:
        """See the attempt through."""
        structlog.contextvars.bind_contextvars(
            migration_id=self.migration_id, guest=self.guest_name, role="destination", peer=self._control.peer
        )
        try:
            try:
                await self._welcome()
            except (MigrationError, ProtocolError, TimeAdjustError, JournalError, ValueError) as error:
                await self._refuse(error)
                return
            assert self.takeover is not None
            self._tasks.start(self._listen())
            while not self.takeover.finished.is_set():
                await self._handle(await self._inbox.get())
            while not self._inbox.empty():
                if isinstance(item := self._inbox.get_nowait(), OutcomeAsked):
                    await self._handle(item)  # who asked just before the end is not left without an answer
            await self._report()
        except Exception:
            # A bug must not cost more than this attempt. In READY only the source decides: it asks the journal.
            log.exception("the incoming migration failed unexpectedly")
            if self.takeover is not None and self.takeover.state is DestinationState.LOADING:
                await self.takeover.take(DestinationEvent.FAULT, self._control, reason="internal error")
                self._env.journal.close_attempt(self.migration_id, "destination")
            self._set_status("failed")
        finally:
            await self._clean_up()

    @property
    def peer_names(self) -> Names:
        """What the source's certificate calls it, empty without TLS."""
        return self._control.names

    def check_join(self, join: messages.Join, names: Names) -> None:
        """Check that a data channel belongs to this session: by its token, and by who brings it.

        Raises:
            RemoteProtocolError: it does not.
        """
        if (
            self._receiver is None
            or names != self._control.names
            or not secrets.compare_digest(join.token, self._token)
        ):
            raise RemoteProtocolError(
                f"data channel {join.channel} does not prove to belong to this migration", ErrorCode.AUTH
            )

    def join(self, join: messages.Join, connection: Connection) -> None:
        """Take in a data channel that was checked.

        Raises:
            RemoteProtocolError: it does not belong to this session.
        """
        if self._receiver is None:
            raise RemoteProtocolError(f"data channel {join.channel} comes too late", ErrorCode.AUTH)
        self._receiver.add_channel(DataChannel(connection, join.channel))

    def outcome_asked(self, decision: DestinationEvent, reply: Reply) -> None:
        """The source tells its decision again."""
        self._inbox.put_nowait(OutcomeAsked(decision, reply))

    def cancel(self, reason: str) -> bool:
        """Give the attempt up from this side. Returns False when only the source can decide any more."""
        if self.takeover is not None and self.takeover.state is not DestinationState.LOADING:
            return False
        self._inbox.put_nowait(Broken(DestinationEvent.CANCEL, "cancelled", reason))
        return True

    def guest_gone(self) -> None:
        """The incoming guest's process ended by itself."""
        self._inbox.put_nowait(Broken(DestinationEvent.FAULT, "fault", "the incoming guest's process ended"))

    def progress(self) -> Progress:
        """A snapshot for an operator."""
        counted_ns = self._count.now(time.monotonic_ns()) if self._count is not None else None
        standing = Standing(
            migration_id=self.migration_id,
            guest=self.guest_name,
            role="destination",
            peer=self._control.peer,
            destination=self._env.host,
            started_at=self._started_at,
            elapsed_ns=time.monotonic_ns() - self._began_ns,
            status=self.status,
            phase=str(self.takeover.state) if self.takeover is not None else "negotiating",
            memory_bytes=self._hello.guest.memory_bytes,
            downtime_limit_ns=abort_limit_ns(self._limits),
            decision=f"received {self._rounds} rounds",
            reason=self._reason,
        )
        moved = Moved(
            round=self._rounds,
            transferred_bytes=self._received_bytes,
            normal_pages=self._normal_pages,
            zero_pages=self._zero_pages,
        )
        return snapshot(standing, moved, downtime_ns=counted_ns if self.status in ("device", "completed") else None)

    # Section: negotiation

    async def _welcome(self) -> None:
        """Build the empty guest and take the offer.

        Raises:
            RefusedError, VmmError, ProtocolError, TimeAdjustError, JournalError: it cannot be taken; nothing is kept.
        """
        hello, env = self._hello, self._env
        # Announcements serve to populate huge pages; small ones cost less where their content is written.
        ours = CAPABILITIES if shared_huge_pages() else CAPABILITIES - {"extents"}
        agreed = agree_capabilities(
            frozenset(hello.capabilities), ours, frozenset(hello.required) | REQUIRED_CAPABILITIES
        )
        if hello.guest.memory_bytes > env.config.limits.max_memory_bytes:
            raise RefusedError(
                f"the guest has {hello.guest.memory_bytes >> 20} MiB of memory, this host takes at most "
                f"{env.config.limits.max_memory_bytes >> 20} MiB ([limits] max_memory_bytes)"
            )
        guest = self._guest = await env.guests.create_incoming(hello.guest)
        guest.migration_id = self.migration_id
        built = await guest.vmm.describe()
        if differences := hello.guest.differences(built):
            raise RefusedError(f"this host cannot build an equal guest: {'; '.join(differences)}")
        self._memory = await guest.vmm.memory()
        self._costs = await guest.vmm.expected_costs("load")
        self._resume_ns = env.resume_costs.expected_ns(guest.vmm.driver, self._costs, abort_limit_ns(hello.limits))
        env.journal.begin(
            self.migration_id,
            hello.epoch,
            self.guest_name,
            "destination",
            {
                "peer": self._control.peer,
                "peer_names": list(self._control.names),
                "paused": hello.guest_paused,
                "started_at": self._started_at,
            },
        )
        self._digest = MemoryDigest(hello.guest.pages) if "digest-xxh3-frames" in hello.required else None
        self._receiver = PageReceiver(
            self._memory,
            hello.guest,
            self._digest,
            hello.channels,
            allowed_encodings(agreed),
            on_round=lambda number, received: self._inbox.put_nowait(RoundArrived(number, received)),
            on_state=self._inbox.put_nowait,
            on_failure=self._channel_failed,
        )
        self.takeover = Takeover(
            env, self.migration_id, hello.epoch, self.guest_name, guest, keep_paused=hello.guest_paused
        )
        self.takeover.make_ready = self._make_ready
        self._loading = Loading(
            guest.vmm,
            {(d.name, d.kind) for d in hello.guest.devices},
            hello.time_rules,
            env.clock,
        )
        self._loading_task = self._tasks.start(self._load())
        self._tell(
            messages.Welcome(
                token=self._token,
                capabilities=tuple(sorted(agreed)),
                load_costs=self._costs.devices,
                resume_ns=self._resume_ns,
                ready_timeout_ns=int(env.config.limits.ready_timeout_s * 1e9),
                host=env.host,
            )
        )
        self._set_status("active")
        log.info("taking a guest in", memory_mib=hello.guest.memory_bytes >> 20, source=hello.host)

    async def _refuse(self, error: Exception) -> None:
        code = error.code if isinstance(error, RemoteProtocolError) else ErrorCode.GUEST_MISMATCH
        self._reason = str(error)
        log.warning("refused an incoming migration", reason=str(error))
        with contextlib.suppress(LinkLostError):
            self._control.send(messages.Refuse(code=int(code), reason=str(error)[:2000]))
        if self._memory is not None:
            await asyncio.to_thread(self._memory.release)
            self._memory = None
        if self._guest is not None:
            with contextlib.suppress(VmmError):
                await self._env.guests.destroy(self._guest)
        self._set_status("failed")

    # Section: the actor

    async def _listen(self) -> None:
        try:
            while True:
                received = await self._control.receive()
                if isinstance(received.message, messages.Record):
                    self._take_record(received.payload)
                else:
                    self._inbox.put_nowait(received)
        except LinkLostError as error:
            self._link_gone = True
            self._record_arrived.set()
            self._inbox.put_nowait(
                Broken(DestinationEvent.LINK_LOST, "lost", f"the connection to the source was lost: {error}")
            )

    async def _handle(self, item: Item) -> None:
        takeover = self.takeover
        assert takeover is not None
        reply = None if self._link_gone else self._control
        try:
            match item:
                case Received():
                    await self._hear(item)
                case RoundArrived(number=number, received=received):
                    self._round_arrived(number, received)
                case ArrivedState():
                    assert self._loading is not None
                    self._loading.add_state(item)
                case OutcomeAsked(decision=decision, reply=asker):
                    await takeover.take(decision, asker, reason="the source keeps its guest")
                case _LoadedItem():
                    await self._loaded()
                case Broken(event=event, cause=cause, reason=reason):
                    loading = takeover.state is DestinationState.LOADING
                    await takeover.take(event, reply, reason=reason, cause=cause)
                    if loading:  # said after the vote has left: a log that blocks must not cost downtime
                        log.warning("the incoming guest is given up", cause=cause, reason=reason)
        except RemoteProtocolError as error:
            log.error("the source broke the protocol", reason=str(error))
            with contextlib.suppress(RemoteProtocolError):
                await takeover.take(DestinationEvent.FAULT, reply, reason=str(error))

    async def _hear(self, received: Received) -> None:
        takeover = self.takeover
        assert takeover is not None
        match received.message:
            case messages.RoundEnd() as end:
                self._round_ends[end.round] = end
                self._check_round(end.round)
            case messages.Downtime(epoch=epoch) as downtime:
                if check_epoch(takeover.epoch, epoch):
                    self._limits, self._source_resume_ns = downtime.limits, downtime.resume_reserve_ns
                    self._hear_downtime(downtime.source_downtime_ns, downtime.sent_at_ns, received)
            case messages.TimeData() as data:
                self._hear_time(data, received)
            case messages.StateEnd(epoch=epoch) as end:
                if check_epoch(takeover.epoch, epoch):
                    self._hear_downtime(end.source_downtime_ns, end.sent_at_ns, received)
                    self._state_end, self._state_end_read_ns = end, received.read_at_ns
                    self._check_complete()
            case messages.Commit(epoch=epoch):
                if check_epoch(takeover.epoch, epoch):
                    self._stop_timers()
                    await takeover.take(DestinationEvent.COMMIT, self._control, read_at_ns=received.read_at_ns)
            case messages.Abort(epoch=epoch, reason=reason):
                if check_epoch(takeover.epoch, epoch):
                    await takeover.take(DestinationEvent.ABORT, self._control, reason=f"the source gave up: {reason}")
            case message:
                raise RemoteProtocolError(f"the source sent {message.TYPE.name} out of turn", ErrorCode.UNEXPECTED)

    # Section: rounds

    def _round_arrived(self, number: int, received: RoundReceived) -> None:
        if self._digest is not None:
            self._digest.add(received.digest_delta)
        self._rounds_arrived[number] = received
        self._received_bytes += received.payload_bytes
        self._normal_pages += received.normal_pages
        self._zero_pages += received.zero_pages
        self._check_round(number)

    def _check_round(self, number: int) -> None:
        """Acknowledge a round once both its pages and its announcement are here."""
        end, received = self._round_ends.get(number), self._rounds_arrived.get(number)
        if end is None or received is None:
            return
        if (end.pages, end.zero_pages) != (received.normal_pages, received.zero_pages):
            raise RemoteProtocolError(
                f"round {number} brought {received.normal_pages} pages and {received.zero_pages} zero pages, but "
                f"{end.pages} and {end.zero_pages} were sent",
                ErrorCode.CORRUPT,
            )
        del self._round_ends[number], self._rounds_arrived[number]
        self._rounds = number
        with contextlib.suppress(LinkLostError):
            self._control.send(
                messages.RoundDone(
                    round=number,
                    bytes=received.payload_bytes,
                    digest=self._digest.value if self._digest is not None else 0,
                )
            )
        self._check_complete()
        self._on_change()

    def _check_complete(self) -> None:
        """Let loading finish once STATE_END and the last round are both here."""
        if self._state_end is not None and self._rounds >= self._state_end.last_round:
            assert self._loading is not None
            self._arrived_ns = self._arrived_ns or time.monotonic_ns()
            self._loading.all_arrived(self._state_end.devices)

    # Section: the blackout

    def _hear_downtime(self, source_downtime_ns: int, sent_at_ns: int, received: Received) -> None:
        """Count on from the source's figure, and set the deadline."""
        transit_ns = self._control.transit_upper_ns(sent_at_ns, received.read_at_hrtime_ns)
        if self._count is None:
            self._count = DowntimeCount(source_downtime_ns + transit_ns, received.read_at_ns)
            self._first_downtime_ns = received.read_at_ns
            if self._receiver is not None:
                self._receiver.guest_stopped()
            self._set_status("device")
            if self._hello.guest.guest_time:
                self._ask_time()
        else:
            self._count.hear(source_downtime_ns, transit_ns, received.read_at_ns)
        self._source_reported_ns = source_downtime_ns
        self._set_deadline()

    def _ask_time(self) -> None:
        nonce = secrets.randbits(63)
        self._asked[nonce] = self._env.clock.hrtime_ns()
        self._tell(messages.TimeAsk(nonce=nonce))

    def _hear_time(self, data: messages.TimeData, received: Received) -> None:
        asked_at_ns = self._asked.pop(data.nonce, None)
        if asked_at_ns is None:
            raise RemoteProtocolError("time data answers no ask of ours", ErrorCode.TIME)
        assert self._loading is not None
        arrived = ArrivedTime(data, asked_at_ns, received.read_at_hrtime_ns)
        self._loading.add_time(arrived, self._control.offset())

    def _reserve_ns(self) -> int:
        """Upper bound of what follows the vote: the READY leg, the COMMIT leg and the resume, here or, after a NO, on
        the source; and the vote itself, so that a NO is heard before the source's own deadline."""
        return _VOTE_NS + self._control.round_trip_ns() + max(self._resume_ns, self._source_resume_ns)

    def _remaining_ns(self) -> int | None:
        if self._count is None:
            return None
        counted_ns = self._count.now(time.monotonic_ns())
        return destination_remaining_ns(self._limits, counted_ns, self._reserve_ns())

    def _set_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        remaining_ns = self._remaining_ns()
        if remaining_ns is None:
            return
        # Whole milliseconds, and rather early than late.
        patience_s = max(0, remaining_ns // _TICK_NS) / 1e3
        self._deadline = asyncio.get_running_loop().call_later(patience_s, self._deadline_passed)

    def _deadline_passed(self) -> None:
        self._inbox.put_nowait(Broken(DestinationEvent.LIMIT, "limit", self._over_limit()))

    def _over_limit(self) -> str:
        assert self._count is not None
        counted_ms = self._count.now(time.monotonic_ns()) / 1e6
        limit_ms = abort_limit_ns(self._limits) / 1e6
        return (
            f"the downtime limit of {limit_ms:g} ms cannot be kept: {counted_ms:.1f} ms have passed and READY, COMMIT "
            f"and the resume need up to {self._reserve_ns() / 1e6:.1f} ms more"
        )

    async def _load(self) -> None:
        assert self._loading is not None
        try:
            await self._loading.run()
        except (MigrationError, TimeAdjustError, ClockError, ValidationError) as error:
            cause: NoCause = "time" if isinstance(error, TimeAdjustError | ClockError) else "load"
            self._inbox.put_nowait(Broken(DestinationEvent.FAULT, cause, f"the guest could not be loaded: {error}"))
        else:
            self._loaded_ns = time.monotonic_ns()
            self._inbox.put_nowait(_LoadedItem())

    async def _loaded(self) -> None:
        """Everything is in place: vote."""
        takeover, end = self.takeover, self._state_end
        assert takeover is not None
        assert end is not None
        if takeover.state is not DestinationState.LOADING:
            return
        if self._digest is not None and self._digest.value != end.digest:
            reason = (
                f"the memory digest is {self._digest.value:016x} here and {end.digest:016x} on the source: the copies "
                "are not equal"
            )
            await takeover.take(DestinationEvent.FAULT, self._control, reason=reason, cause="digest")
            return
        self._checked_ns = time.monotonic_ns()
        remaining_ns = self._remaining_ns()
        if remaining_ns is not None and remaining_ns <= 0:
            await takeover.take(DestinationEvent.LIMIT, self._control, reason=self._over_limit(), cause="limit")
            return
        reply = None if self._link_gone else self._control
        await takeover.take(DestinationEvent.LOADED, reply)
        if takeover.awaits_decision:
            self._ready_timer = asyncio.get_running_loop().call_later(
                self._env.config.limits.ready_timeout_s,
                self._inbox.put_nowait,
                Broken(DestinationEvent.READY_TIMEOUT, "lost", "no decision came after READY"),
            )

    def _make_ready(self) -> messages.Ready:
        assert self._count is not None
        now_ns = time.monotonic_ns()
        self._counted_ns = self._count.now(now_ns)
        return messages.Ready(
            epoch=self._hello.epoch,
            digest=self._digest.value if self._digest is not None else 0,
            elapsed_ns=self._counted_ns,
            completing_ns=now_ns - self._state_end_read_ns,
        )

    # Section: the end

    async def _report(self) -> None:
        """Send our half of the record and wait for the whole."""
        takeover = self.takeover
        assert takeover is not None
        self._reason = takeover.reason
        if takeover.state is DestinationState.RUNNING:
            self._log_costs()
            times = takeover.resume_times
            if times is not None and not self._hello.guest_paused:
                took_ns = times.end_ns - times.commit_read_ns
                self._env.resume_costs.add(self._hello.guest.vmm, took_ns, self._costs)
            if not self._hello.guest_paused:
                self._env.publish("RESUME", {"guest": self.guest_name})
        else:
            log.warning("the incoming guest was discarded", reason=takeover.reason)
        half = self._half(await self._guest_gap())
        with contextlib.suppress(LinkLostError):
            self._control.send(messages.Report(), half.model_dump_json().encode())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RECORD_S):
                    await self._record_arrived.wait()
        self._env.journal.close_attempt(self.migration_id, "destination")
        self._set_status("completed" if takeover.state is DestinationState.RUNNING else "failed")
        if self.record is not None:
            self._env.finish(self.record, "destination")

    def _log_costs(self) -> None:
        takeover, loading = self.takeover, self._loading
        assert takeover is not None
        assert loading is not None
        times = takeover.resume_times
        resume_ms = (times.end_ns - times.begin_ns) / 1e6 if times is not None else 0.0
        loads_ms = sum(loading.done.load_ns.values()) / 1e6
        completing_ms = (self._checked_ns - self._state_end_read_ns) / 1e6
        log.debug(
            f"Migration (incoming) breakdown: device_loads={loads_ms:.1f}ms completing={completing_ms:.1f}ms "
            f"resume={resume_ms:.1f}ms"
        )
        log.info(
            "Migration (incoming) complete: the guest runs here, counted downtime was "
            f"{(self._counted_ns or 0) / 1e6:.0f}ms at READY "
            f"(limit was {abort_limit_ns(self._limits) / 1e6:.0f}ms)"
        )

    async def _guest_gap(self) -> GuestGap | None:
        """What the guest saw of the blackout, once it beat again."""
        if self.takeover is None or self.takeover.state is not DestinationState.RUNNING or self._guest is None:
            return None
        with contextlib.suppress(VmmError):
            if (gap := (await self._guest.vmm.status()).observed_gap) is not None:
                return GuestGap(guest_ns=gap.guest_ns, host_ns=gap.host_ns)
        return None

    def _half(self, guest_gap: GuestGap | None) -> DestinationHalf:
        takeover, loading = self.takeover, self._loading
        assert takeover is not None
        assert loading is not None
        parts: list[DowntimePart] = []
        checkpoints: list[Checkpoint] = []
        if self._loaded_ns and self._state_end_read_ns:
            # Pages may still be on their way when the end of state, on its own channel, is here.
            arrived_ns = max(self._arrived_ns, self._state_end_read_ns)
            loaded_ns = max(self._loaded_ns, arrived_ns)
            in_flight_ns = arrived_ns - self._state_end_read_ns
            parts.append(DowntimePart.of(Part.LAST_PAGES_LEG, in_flight_ns))
            parts.append(DowntimePart.of(Part.DEVICE_LOADS, loaded_ns - arrived_ns))
            checkpoints.append(self._checkpoint(QemuCheckpoint.LOADED, loaded_ns))
            if self._checked_ns:
                parts.append(DowntimePart.of(Part.DIGEST_CHECK, self._checked_ns - loaded_ns))
        if (times := takeover.resume_times) is not None:
            parts.append(DowntimePart.of(Part.COMMIT_JOURNAL, times.begin_ns - times.commit_read_ns))
            parts.append(DowntimePart.of(Part.RESUME, times.end_ns - times.begin_ns))
            checkpoints.append(self._checkpoint(QemuCheckpoint.VM_STARTED, times.end_ns))
        return DestinationHalf(
            host=self._env.host,
            load_ns=loading.done.load_ns,
            checkpoints=tuple(checkpoints),
            parts=tuple(parts),
            counted_ns=self._counted_ns,
            source_reported_ns=self._source_reported_ns,
            reserve_ns=self._reserve_ns(),
            time=loading.done.time,
            digest=f"{self._digest.value:016x}" if self._digest is not None else None,
            guest_gap=guest_gap,
            reason=takeover.reason,
            events=tuple(LogLine(side="destination", **line) for line in self._env.take_log(self.migration_id)),
        )

    def _checkpoint(self, point: QemuCheckpoint, at_ns: int) -> Checkpoint:
        """A checkpoint on our own count of the downtime."""
        assert self._count is not None
        return Checkpoint.of(point, self._count.now(at_ns))

    def _take_record(self, payload: bytes) -> None:
        try:
            self.record = Record.model_validate_json(payload)
        except ValidationError as error:
            log.warning("the source's record cannot be read", reason=str(error))
        self._record_arrived.set()

    def _tell(self, message: messages.Message) -> None:
        """Send a message while the channel stands; its loss is an event of its own."""
        with contextlib.suppress(LinkLostError):
            self._control.send(message)

    def _channel_failed(self, error: Exception) -> None:
        # Once everything arrived the data channels have done their work, and their end means nothing.
        if self.takeover is not None and self.takeover.state is DestinationState.LOADING:
            reason = f"a data channel failed: {error}"
            self._inbox.put_nowait(Broken(DestinationEvent.FAULT, "fault", reason))

    def _stop_timers(self) -> None:
        for timer in (self._deadline, self._ready_timer):
            if timer is not None:
                timer.cancel()

    async def _clean_up(self) -> None:
        self._stop_timers()
        if self._receiver is not None:
            await self._receiver.stop()
        await self._control.close()
        await self._tasks.stop()
        if self._memory is not None:
            await asyncio.to_thread(self._memory.release)
            self._memory = None

    def _set_status(self, status: Status) -> None:
        if self.status != status:
            self.status = status
            self._env.publish(
                "MIGRATION", {"status": status, "guest": self.guest_name, "migration-id": self.migration_id}
            )
            self._on_change()
