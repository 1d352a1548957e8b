"""The story of one outgoing attempt. Read ``OutgoingMigration._story`` first.

    connect -> negotiate -> rounds -> (a stop fits) -> switchover -> one record on both hosts

Whatever fails before the stop leaves a guest that was never disturbed; whatever fails after it is decided by the
hand-over. Every way out goes through ``_clean_up``, so that a retry works at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from pydantic import ValidationError

from migrated.environment import Environment
from migrated.errors import CancelledByOperatorError, LinkLostError, MigrationError, RefusedError, VmmError
from migrated.guests import Guest
from migrated.journal import JournalError
from migrated.link.control import ControlChannel
from migrated.parameters import MigrationParameters, in_force, limit_of
from migrated.prediction.bandwidth import Bandwidth
from migrated.prediction.knowledge import class_key
from migrated.prediction.model import Prediction
from migrated.progress import Acknowledged, Progress
from migrated.record.model import DestinationHalf, Record
from migrated.record.terms import STATUS_OF, Outcome, Phase, Status
from migrated.source.handover import OPERATOR_KEEPS, SourceHandover
from migrated.source.ledger import DeviceFigures, OutgoingLedger
from migrated.source.outcome import OutcomeAsker
from migrated.source.precopy import Precopy, Transfer
from migrated.source.session import Session
from migrated.source.switchover import Happened, Item, Switchover
from migrated.tasks import TaskSet
from protocol import messages
from protocol.blackout import SourceReserves
from protocol.budget import abort_limit_ns
from protocol.errors import ProtocolError
from protocol.guest import PAGE_SIZE
from protocol.handover import SourceEvent, SourceState

log = structlog.get_logger()

_REPORT_S = 5.0
_TOLD_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """Where a guest goes."""

    uri: str
    host: str
    port: int


class OutgoingMigration:
    """One attempt to move a guest away.

    Args:
        env: the daemon.
        guest: the guest, reserved for this attempt by the caller.
        target: where to.
        parameters: in force at the start; ``set_parameters`` changes them.
        migration_id: 32 hex digits.
        epoch: number of this hand-over of the guest.
        on_change: called after every visible change.
    """

    def __init__(
        self,
        env: Environment,
        guest: Guest,
        target: Target,
        parameters: MigrationParameters,
        migration_id: str,
        epoch: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.migration_id = migration_id
        self.guest_name = guest.name
        self.guest_class = ""
        self.parameters = parameters
        self.status: Status = "setup"
        self.record: Record | None = None
        self.decided = asyncio.Event()
        """Set when the attempt has its record; while in doubt, with a record that says so."""
        self._env = env
        self._guest = guest
        self._target = target
        self._epoch = epoch
        self._on_change = on_change
        self._ledger = OutgoingLedger(migration_id, guest.name, epoch, target.uri, env.host, parameters)
        self._asker = OutcomeAsker(target.host, target.port, env.config.limits, migration_id, epoch)
        self._handover: SourceHandover | None = None
        self._tasks = TaskSet()
        self._story_task: asyncio.Task[None] | None = None
        self._ended_by: MigrationError | None = None
        self._settling = TaskSet()
        self._settled = asyncio.Event()
        self._hold: asyncio.Event | None = None
        self._inbox: asyncio.Queue[Item] = asyncio.Queue()
        self._acknowledged = Acknowledged()
        self._passes_told = 0
        self._round_done: dict[int, asyncio.Future[messages.RoundDone]] = {}
        self._reported = asyncio.Event()
        self._session = Session(env, guest.vmm, target.host, target.port, parameters, migration_id, epoch)
        self._transfer: Transfer | None = None
        self._precopy: Precopy | None = None
        self._switchover: Switchover | None = None
        self._phase = Phase.SYNC
        self._decision = "connecting"
        self._prediction: Prediction | None = None

    # Section: what an operator can do

    async def run(self) -> Record:
        """See the attempt through and return its record. Raises nothing but the daemon's own cancellation."""
        structlog.contextvars.bind_contextvars(
            migration_id=self.migration_id, guest=self.guest_name, role="source", peer=self._target.uri
        )
        self._story_task = asyncio.create_task(self._story())
        try:
            await self._story_task
            outcome, reason = self._outcome_of_handover()
        except asyncio.CancelledError:
            if self._ended_by is None:
                self._story_task.cancel()
                await asyncio.gather(self._story_task, return_exceptions=True)
                await self._clean_up()
                raise
            outcome, reason = _outcome_of_error(self._ended_by)
        except LinkLostError as error:
            outcome, reason = _outcome_of_error(await self._told(error))
        except (MigrationError, ProtocolError, JournalError, OSError, ValueError) as error:
            outcome, reason = _outcome_of_error(error)
        except Exception as error:
            # A bug must not cost more than this attempt: the guest goes on, and the log says where it was.
            log.exception("the migration failed unexpectedly")
            outcome, reason = "failed", f"internal error: {error!r}"
        self._phase = Phase.FINISH
        await self._abandon(reason)
        await self._clean_up()
        try:
            record = await self._conclude(outcome, reason)
        except Exception:
            log.exception("the migration's record could not be written")
            self._guest.migration_id = None
            self.decided.set()
            raise
        if outcome == "in-doubt":
            self._settling.start(self._settle())
        return record

    async def close(self) -> None:
        """Let go at the daemon's stop. What is in doubt is found again in the journal."""
        await self._settling.stop()
        if self._handover is not None:
            await self._handover.close()

    async def cancel(self, reason: str = "cancelled by the operator") -> bool:
        """Give the attempt up. Returns False when it is too late: COMMIT was sent."""
        if self.decided.is_set() and not (self._handover is not None and self._handover.in_doubt):
            return True
        handover = self._handover
        if handover is not None and handover.state in (SourceState.COMMITTED, SourceState.RETIRED):
            return False
        self._set_status("cancelling")
        self._end(CancelledByOperatorError(reason), SourceEvent.CANCEL)
        return True

    def guest_gone(self) -> None:
        """The guest's process ended by itself."""
        self._end(VmmError("the guest's process ended during its migration"), SourceEvent.FAULT)

    async def resolve(self, run_here: bool) -> bool:
        """End an attempt in doubt by the operator's word. Returns False when it is not in doubt."""
        if self._handover is None or not self._handover.in_doubt:
            return False
        event = SourceEvent.RESOLVE_RUN_HERE if run_here else SourceEvent.RESOLVE_DISCARD
        await self._handover.take(event, None, OPERATOR_KEEPS if run_here else None)
        await self._settled.wait()
        return True

    def _end(self, error: MigrationError, event: SourceEvent) -> None:
        """End the attempt from outside its story: before the stop by cancelling it, after by an event."""
        self._ended_by = self._ended_by or error
        if self._switchover is not None:
            self._inbox.put_nowait(Happened(event, str(error)))
        elif self._story_task is not None:
            self._story_task.cancel()

    def continue_switchover(self) -> bool:
        """Let a held switchover go on. Returns False when none is held."""
        if self._hold is None or self.status != "pre-switchover":
            return False
        self._hold.set()
        self._set_status("device")
        return True

    def set_parameters(self, parameters: MigrationParameters) -> None:
        """Change the parameters of the running attempt: they count from the next decision on, until the guest is
        stopped. What is agreed on at the start stays as it is."""
        previous, self.parameters = self.parameters, parameters
        if self._switchover is None:
            self._ledger.parameters = in_force(self._ledger.parameters, parameters)
        sender = self._session.sender
        if sender is not None and parameters.max_bandwidth_bytes_per_s != previous.max_bandwidth_bytes_per_s:
            sender.pace(parameters.max_bandwidth_bytes_per_s)
            if self._precopy is not None:
                self._precopy.bandwidth.forget()

    def progress(self) -> Progress:
        """A snapshot for an operator."""
        ledger, precopy = self._ledger, self._precopy
        remaining = precopy.remaining_pages * PAGE_SIZE if precopy is not None else 0
        if precopy is not None and not ledger.rounds:
            remaining = max(0, (ledger.memory_pages - ledger.sparse_pages) * PAGE_SIZE - self._sent_bytes())
        end_ns = ledger.ended_ns or time.monotonic_ns()
        return Progress(
            migration_id=self.migration_id,
            guest=self.guest_name,
            role="source",
            peer=self._target.uri,
            status=self.status,
            phase=self._switchover.phase if self._switchover is not None and not ledger.ended_ns else self._phase,
            started_at=ledger.started_at,
            elapsed_ns=end_ns - ledger.began_ns,
            setup_ns=ledger.setup_ns,
            round=ledger.round_count,
            dirty_sync_count=ledger.dirty_syncs,
            total_bytes=ledger.memory_pages * PAGE_SIZE,
            transferred_bytes=self._sent_bytes(),
            remaining_bytes=0 if self.status == "completed" else remaining,
            normal_pages=ledger.normal_pages,
            zero_pages=ledger.zero_pages,
            bandwidth_bytes_per_s=precopy.bandwidth.bytes_per_s if precopy is not None else 0.0,
            dirty_rate_pages_per_s=precopy.dirty_pages_per_s if precopy is not None else 0.0,
            predicted_downtime_ns=self._prediction.total_ns if self._prediction is not None else None,
            predicted_upper_ns=self._prediction.upper_ns if self._prediction is not None else None,
            predicted_parts_ns=self._prediction.parts() if self._prediction is not None else {},
            downtime_limit_ns=limit_of(ledger.parameters),
            downtime_ns=ledger.interval.measured_ns if ledger.interval is not None else None,
            throttle_percent=precopy.throttle_percent if precopy is not None else 0,
            decision=self._decision,
            destination=ledger.destination_host,
            acknowledged=self._acknowledged,
            reason=self.record.reason if self.record is not None else None,
            rounds=tuple(ledger.rounds),
        )

    # Section: the story

    async def _story(self) -> None:
        with self._ledger.phase(Phase.SYNC):
            transfer = await self._set_up()
        self._ledger.setup_ns = time.monotonic_ns() - self._ledger.began_ns
        self._set_status("active")
        self._phase = Phase.PRE_COPY
        with self._ledger.phase(Phase.PRE_COPY):
            pending = await self._run_rounds(transfer)
        await self._switch_over(transfer, pending)

    async def _set_up(self) -> Transfer:
        """Open the session and journal the attempt. Nothing of this disturbs the guest."""
        session, ledger = self._session, self._ledger
        description = await self._guest.vmm.describe()
        self.guest_class = class_key(description)
        ledger.memory_pages = description.pages
        ledger.devices = {(d.name, d.kind): DeviceFigures(d) for d in description.devices}
        self._say("negotiating")
        await session.open(description)
        assert session.control is not None
        assert session.welcome is not None
        assert session.memory is not None
        assert session.dirty_log is not None
        assert session.sender is not None
        # The session took the cap from the start of the attempt; it may have changed since.
        session.sender.pace(self.parameters.max_bandwidth_bytes_per_s)
        ledger.dirty_tracking = session.dirty_log.mode
        ledger.destination_host = session.welcome.host
        for cost in session.welcome.load_costs:
            if (figures := ledger.devices.get((cost.name, cost.kind))) is not None:
                figures.expected_load_ns = cost.ns
        self._tasks.start(self._listen(session.control))
        # The attempt is journaled before the guest can be stopped: a restarted daemon then knows whose guest it is.
        self._env.journal.begin(
            self.migration_id,
            self._epoch,
            self.guest_name,
            "source",
            {
                "peer": self._target.uri,
                "paused": session.was_paused,
                "started_at": ledger.started_at,
                "parameters": self.parameters.model_dump(mode="json"),
            },
        )
        self._handover = SourceHandover(
            self._env, self.migration_id, self._epoch, self._guest, session.was_paused, self._asker,
            on_doubt=self._became_doubtful,
        )  # fmt: skip
        await session.measure()
        self._transfer = Transfer(
            self._guest.vmm,
            description,
            session.memory,
            session.dirty_log,
            session.sender,
            session.control,
            ledger,
        )
        return self._transfer

    async def _listen(self, control: ControlChannel) -> None:
        """Hand messages to whoever waits for them; the loss of the channel is an event for the hand-over."""
        try:
            while True:
                received = await control.receive()
                self._note_what_it_said(received.message)
                match received.message:
                    case messages.RoundDone(round=number):
                        if not (done := self._done_of(number)).done():
                            done.set_result(received.message)
                    case messages.Report():
                        self._take_report(received.payload)
                    case messages.No(reason=reason, cause=cause) if self._switchover is None:
                        kind = CancelledByOperatorError if cause == "cancelled" else MigrationError
                        self._give_up(kind(f"the destination gave up: {reason}"))
                    case _:
                        self._inbox.put_nowait(received)
        except LinkLostError as error:
            self._give_up(error)
            self._inbox.put_nowait(Happened(SourceEvent.LINK_LOST, f"the connection was lost: {error}"))

    def _note_what_it_said(self, message: messages.Message) -> None:
        """Keep for operators what the destination says of itself."""
        said = self._acknowledged
        match message:
            case messages.RoundDone(round=number, bytes=received_bytes):
                update: dict[str, object] = {"rounds": number, "received_bytes": said.received_bytes + received_bytes}
            case messages.Ready(elapsed_ns=elapsed_ns):
                update = {"vote": "ready", "counted_ns": elapsed_ns}
            case messages.No():
                update = {"vote": "no"}
            case _:
                return
        self._acknowledged = said.model_copy(update=update)

    def _give_up(self, error: MigrationError) -> None:
        """End the rounds with an error, in the middle of one too; without effect once the switchover runs."""
        if self._switchover is None:
            self._end(error, SourceEvent.FAULT)
        self._reported.set()

    async def _told(self, error: LinkLostError) -> MigrationError:
        """Why a channel was lost: a destination that gives up says so on the control channel, but a data channel may
        break before that is read."""
        control = self._session.control
        if control is not None and control.lost is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TOLD_S):
                    await self._reported.wait()
        told = self._ended_by
        return error if told is None or isinstance(told, LinkLostError) else told

    def _done_of(self, number: int) -> asyncio.Future[messages.RoundDone]:
        future = self._round_done.get(number)
        if future is None:
            future = self._round_done[number] = asyncio.get_running_loop().create_future()
        return future

    async def _run_rounds(self, transfer: Transfer) -> Any:
        self._precopy = Precopy(
            transfer,
            lambda: self.parameters,
            self._predict,
            self._done_of,
            self._env.config.limits.round_timeout_s,
            self._say_round,
        )
        return await self._precopy.run()

    async def _switch_over(self, transfer: Transfer, pending: Any) -> None:
        assert self._handover is not None
        assert self._session.welcome is not None
        if self.parameters.pause_before_switchover:
            self._hold = asyncio.Event()
        limits = self._session.limits(self.parameters)
        self._switchover = Switchover(
            transfer,
            self._handover,
            limits,
            SourceReserves(
                commit_ns=transfer.control.round_trip_ns() + self._session.welcome.resume_ns,
                own_resume_ns=self._env.resume_costs.reserve_ns(
                    self._guest.vmm.driver, self._session.costs, abort_limit_ns(limits)
                ),
            ),
            pending,
            self._inbox,
            self._env.config.limits,
            self._env.clock,
            self._hold,
            self._guest_stopped,
            self._tell_passes,
        )
        # From here on an operator's cancel is an event of the hand-over, not a cancellation of this task.
        await self._switchover.run()
        if self._switchover.gave_back_ns is not None and not self._session.was_paused:
            self._env.resume_costs.add(self._guest.vmm.driver, self._switchover.gave_back_ns, self._session.costs)
        if self._handover.state is SourceState.RETIRED:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_S):
                    await self._reported.wait()

    def _predict(self, dirty_pages: int, bandwidth: Bandwidth) -> Prediction:
        """What a stop now would cost: bases tried or measured here, corrected by what was learned."""
        transfer = self._transfer
        assert transfer is not None
        return self._env.knowledge.predict(
            self.guest_name,
            self.guest_class,
            self._session.bases(dirty_pages, transfer.final_device_bytes(), transfer.collect_ns, bandwidth),
            coverage=self.parameters.prediction_coverage_pct / 100,
            bandwidth_known=bandwidth.bytes_per_s > 0 or not dirty_pages,
        )

    # Section: the end

    def _outcome_of_handover(self) -> tuple[Outcome, str | None]:
        assert self._handover is not None
        match self._handover.state:
            case SourceState.RETIRED:
                return "completed", None
            case SourceState.COMMITTED:
                return "in-doubt", (
                    "COMMIT was sent and the destination has not answered; the guest stays stopped here until it does, "
                    "or until `migratectl resolve`"
                )
            case _:
                cancelled = isinstance(self._ended_by, CancelledByOperatorError)
                return ("cancelled" if cancelled else "aborted"), self._handover.reason

    async def _abandon(self, reason: str | None) -> None:
        """Tell the destination, when the attempt ended before the stop."""
        handover, control = self._handover, self._session.control
        if handover is not None and handover.state is SourceState.RUNNING:
            await handover.take(SourceEvent.FAULT, control, reason or "the source gave up")
        elif handover is None and control is not None and control.lost is None:
            with contextlib.suppress(LinkLostError):
                control.send(messages.Abort(epoch=self._epoch, reason=(reason or "the source gave up")[:2000]))

    async def _clean_up(self) -> None:
        """Leave nothing behind: threads, sockets, mappings, tracking, throttling."""
        guest_stays = self._handover is None or self._handover.state is not SourceState.RETIRED
        await self._session.close_state(stop_tracking=guest_stays)
        if self._session.sender is not None:
            self._ledger.encodings = self._session.sender.encodings
        if guest_stays and self._precopy is not None:
            with contextlib.suppress(VmmError):
                await self._precopy.end_throttle()

    async def _conclude(self, outcome: Outcome, reason: str | None) -> Record:
        """Write the record, hand it to the peer, and let the guest go."""
        ledger, env = self._ledger, self._env
        ledger.ended_ns = ledger.ended_ns or time.monotonic_ns()
        _log_outcome(ledger.finish(outcome, reason, []))
        self._tell_passes()
        record = ledger.finish(outcome, reason, env.take_log(self.migration_id))
        self.record = record
        if self._session.control is not None:
            with contextlib.suppress(LinkLostError, ProtocolError):
                self._session.control.send(messages.Record(), json.dumps(record.document()).encode())
            await self._session.close()
        await self._tasks.stop()
        if outcome != "in-doubt":
            env.journal.close_attempt(self.migration_id, "source")
            self._guest.migration_id = None
        self._set_status(STATUS_OF[outcome])
        env.finish(record, "source")
        if self.guest_class:
            env.knowledge.learn(record, self.guest_class)
        self.decided.set()
        return record

    async def _settle(self) -> None:
        """Wait until an attempt in doubt is decided, then write its final record."""
        assert self._handover is not None
        assert self._switchover is not None
        await self._handover.finished.wait()
        self._switchover.account()
        if self._handover.state is SourceState.ABORTED:
            with contextlib.suppress(VmmError):
                await self._guest.vmm.stop_dirty_log()
        self._ledger.ended_ns = time.monotonic_ns()
        outcome, reason = self._outcome_of_handover()
        await self._conclude(outcome, reason)
        self._settled.set()

    def _take_report(self, payload: bytes) -> None:
        try:
            self._ledger.half = DestinationHalf.model_validate_json(payload)
        except ValidationError as error:
            log.warning("the destination's half of the record cannot be read", reason=str(error))
        self._reported.set()

    def _became_doubtful(self, reason: str) -> None:
        self._set_status("in-doubt")
        self._env.publish(
            "X_MIGRATED_IN_DOUBT", {"guest": self.guest_name, "migration-id": self.migration_id, "reason": reason}
        )

    def _guest_stopped(self) -> None:
        """After STOP, as QEMU has it; one who cancels meanwhile is not told otherwise."""
        if self.status != "cancelling":
            self._set_status("device" if self._hold is None else "pre-switchover")

    def _set_status(self, status: Status) -> None:
        if self.status != status:
            self.status = status
            self._env.publish(
                "MIGRATION", {"status": status, "guest": self.guest_name, "migration-id": self.migration_id}
            )
            self._on_change()

    def _say(self, sentence: str) -> None:
        self._decision = sentence
        self._on_change()

    def _say_round(self, sentence: str, prediction: Prediction) -> None:
        self._prediction = prediction
        log.debug("round", round=self._ledger.round_count, decision=sentence)
        self._tell_passes()
        self._say(sentence)

    def _tell_passes(self) -> None:
        """MIGRATION_PASS for every read of the dirty log since the last time, as QEMU has it."""
        while self._passes_told < self._ledger.dirty_syncs:
            self._passes_told += 1
            self._env.publish(
                "MIGRATION_PASS",
                {"pass": self._passes_told, "guest": self.guest_name, "migration-id": self.migration_id},
            )

    def _sent_bytes(self) -> int:
        if self._session.channels and not self._ledger.ended_ns:
            return sum(channel.sent_bytes for channel in self._session.channels)
        return self._ledger.precopy_bytes + self._ledger.downtime_bytes


def _outcome_of_error(error: Exception) -> tuple[Outcome, str]:
    """The outcome of an attempt that ended before the stop."""
    reason = str(error) or repr(error)
    if isinstance(error, CancelledByOperatorError):
        return "cancelled", reason
    return ("refused" if isinstance(error, RefusedError) else "failed"), reason


def _log_outcome(record: Record) -> None:
    """The two lines of a downtime, breakdown first, or the reason why there is none."""
    downtime = record.downtime
    if downtime is not None:
        parts = " ".join(f"{group}={ns / 1e6:.1f}ms" for group, ns in downtime.by_group().items())
        log.debug(f"Migration downtime breakdown: {parts} unattributed={downtime.unattributed_ns / 1e6:.1f}ms")
    if record.outcome == "completed" and downtime is not None:
        predicted = downtime.predicted_ns
        expected = f", predicted {predicted / 1e6:.0f}ms" if predicted is not None else ""
        log.info(
            f"Migration complete: actual downtime was {downtime.measured_ns / 1e6:.0f}ms and migration took "
            f"{record.total_ns / 1e9:.2f}s (limit was {downtime.limit_ns / 1e6:.0f}ms{expected})"
        )
    elif record.outcome == "in-doubt":
        log.error("Migration in doubt", reason=record.reason)
    else:
        log.warning(f"Migration {record.outcome}", reason=record.reason)
