"""One save: an operator's commands on it, and its course from begin to end.

    --running   rounds into the file -> a stop fits the limit -> the rest, while the guest stands still -> it runs on
                -> overtaken batches given back -> closing part, fsync, name
    --stop      the guest is stopped -> devices, time, all memory -> closing part, fsync, name -> it is ended

Until the file has its name nothing is decided: whatever fails, the unfinished file is removed and the guest runs as it
did before. A guest that was paused when it began stays so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time

import structlog
import xxhash

from migrated.base.collector import QuietCollector
from migrated.base.errors import CancelledByOperatorError, MigrationError, VmmError
from migrated.base.threads import in_thread
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.guests.reservation import Reservation
from migrated.kernel.processor import ProcessorLoad
from migrated.kernel.scheduling import Precedence, threads_of
from migrated.observe.progress import Progress
from migrated.prediction.bandwidth import Bandwidth
from migrated.prediction.knowledge import class_key
from migrated.prediction.model import Prediction
from migrated.record.model import Record
from migrated.record.terms import STATUS_OF, Outcome, Phase
from migrated.savefile.clock import boot_id
from migrated.savefile.desk import Desk, SaveOrder, open_desk
from migrated.savefile.last_state import ReadTime, save_devices, save_last_state
from migrated.savefile.standstill import Standstill
from migrated.savefile.writer import check_target, part_of
from migrated.savefile.writing import Silent, Writing
from migrated.settings.parameters import MigrationParameters, limit_of
from migrated.source.ending import outcome_of_error
from migrated.source.ledger import DeviceFigures, OutgoingLedger
from migrated.source.offer import bases_of, offer_of
from migrated.source.precopy import Precopy
from migrated.source.view import View
from migrated.state.save_notes import SaveNote, SaveNotes
from protocol import messages
from protocol.errors import ProtocolError
from protocol.pages import Runs, count_pages
from protocol.savefile import Closing

log = structlog.get_logger()


class Save:
    """One attempt to save a guest.

    Args:
        env: the daemon.
        notes: of saves under way, for a restart.
        guest: the guest.
        reservation: holds the guest for this attempt.
        order: what is wanted.
        parameters: in force at the start; ``set_parameters`` changes them.
        migration_id: 32 hex digits, which also name the file.
        epochs: the guest's own, and that of the hand-over to the file.
    """

    def __init__(
        self,
        env: Environment,
        notes: SaveNotes,
        guest: Guest,
        reservation: Reservation,
        order: SaveOrder,
        parameters: MigrationParameters,
        migration_id: str,
        epochs: tuple[int, int],
    ) -> None:
        self.migration_id = migration_id
        self.guest_name = guest.name
        self.parameters = parameters.model_copy(update={"digest": True, "xor_delta": False})
        self.record: Record | None = None
        self.decided = asyncio.Event()
        """Set when the attempt has its record."""
        self._env = env
        self._notes = notes
        self._guest = guest
        self._reservation = reservation
        self._order = order
        self._ledger = OutgoingLedger(migration_id, guest.name, epochs[1], order.uri, env.host, self.parameters)
        self._view = View(env, self._ledger, Silent())
        self._phase = Writing(self._ledger)
        self._standstill = Standstill(env, guest.vmm, epochs[0], self._ledger)
        self._work: asyncio.Task[None] | None = None
        self._ended_by: MigrationError | None = None
        self._too_late = False

    # Section: what an operator can do

    @property
    def status(self) -> str:
        """The attempt's status, by QEMU's names."""
        return self._view.status

    def cancel(self, error: MigrationError | None = None) -> bool:
        """Give the save up; the guest goes on. Returns False when the file is being completed already."""
        if self.decided.is_set():
            return True
        if self._too_late:
            return False
        if self._ended_by is None and self._work is not None:
            self._ended_by = error or CancelledByOperatorError("cancelled by the operator")
            self._view.set_status("cancelling")
            self._work.cancel()
        return True

    def guest_gone(self) -> None:
        """The guest's process ended by itself."""
        self._standstill.forget()
        self.cancel(VmmError("the guest's process ended while it was saved"))

    def set_parameters(self, parameters: MigrationParameters) -> None:
        """Change the cap on the bandwidth; the other parameters are fixed when a save begins."""
        self._phase.pace(parameters.max_bandwidth_bytes_per_s)

    def progress(self) -> Progress:
        """A snapshot for an operator."""
        reason = self.record.reason if self.record is not None else None
        return self._view.progress(self._phase, self._phase.label, reason)

    # Section: from begin to end

    async def run(self) -> None:
        """Run the attempt to its record."""
        structlog.contextvars.bind_contextvars(
            migration_id=self.migration_id, guest=self.guest_name, role="source", peer=self._order.uri
        )
        self._work = asyncio.create_task(self._story())
        failure: Exception | None = None
        try:
            await self._work
        except asyncio.CancelledError:
            if self._ended_by is None:  # the daemon itself ends; a restarted one finds the note
                self._work.cancel()
                await asyncio.gather(self._work, return_exceptions=True)
                raise
            failure = self._ended_by
        except (MigrationError, ProtocolError, OSError, ValueError) as error:
            failure = error
        except Exception as error:
            # A bug must not cost more than this attempt: the guest goes on, and the log says where it was.
            log.exception("the migration failed unexpectedly")
            failure = MigrationError(f"internal error: {error!r}")
        try:
            await self._conclude(failure)
        finally:
            self.decided.set()

    async def _story(self) -> None:
        """Save the guest. Whatever is raised, the guest is as it was before, and the file is not there."""
        order, parameters = self._order, self.parameters
        async with contextlib.AsyncExitStack() as undo:
            with self._ledger.phase(Phase.SYNC):
                desk = await self._set_up(undo)
            self._ledger.setup_ns = time.monotonic_ns() - self._ledger.began_ns
            self._view.set_status("active")
            if order.ends_guest or desk.offer.was_paused:
                read = await self._write_standing(desk)
            else:
                read = await self._write_running(desk, undo, parameters)
            await self._complete(desk, read)
        if order.ends_guest:
            self._guest.overlay = "retired"
            try:
                await self._env.guests.destroy(self._guest)
            except VmmError as error:
                log.error("the saved guest's process does not end; it stays stopped", reason=str(error))
                return  # with its note, by which the next daemon ends it
        await asyncio.to_thread(self._notes.remove, self.migration_id)

    async def _set_up(self, undo: contextlib.AsyncExitStack) -> Desk:
        """Make everything that can be made while the guest runs undisturbed."""
        ledger, vmm, order = self._ledger, self._guest.vmm, self._order
        self._view.say("preparing the file")
        await asyncio.to_thread(check_target, order.path, force=order.force)
        description = await vmm.describe()
        ledger.memory.pages = description.pages
        ledger.devices = {(d.name, d.kind): DeviceFigures(d) for d in description.devices}
        ledger.destination_host = str(order.path)
        offer = await offer_of(vmm, description, self.parameters)
        note = SaveNote(
            save_id=self.migration_id,
            guest=self.guest_name,
            part=str(part_of(order.path, bytes.fromhex(self.migration_id))),
            target=str(order.path),
            ends_guest=order.ends_guest,
            was_running=not offer.was_paused,
        )
        await asyncio.to_thread(self._notes.write, note)
        undo.push_async_callback(self._forget_note)
        desk = self._phase.desk = await open_desk(
            self._env, vmm, offer, order, self.parameters, ledger, undo,
            tracked=not (order.ends_guest or offer.was_paused),
        )  # fmt: skip
        ledger.memory.dirty_tracking = desk.tracking.log.mode
        undo.push_async_callback(self._leave_guest)
        return desk

    async def _forget_note(self) -> None:
        """Remove the note of a save that left nothing behind. That of a guest to be ended stays until it is."""
        if not (self._too_late and self._order.ends_guest):
            await asyncio.to_thread(self._notes.remove, self.migration_id)

    async def _write_standing(self, desk: Desk) -> ReadTime:
        """Write a guest that stands still all the while."""
        desk.book.in_blackout = True  # the whole file is flushed in the end, and nothing is predicted from the rounds
        self._phase.name = Phase.PAUSE
        await self._send_iterations(desk)
        if not desk.offer.was_paused:
            await self._standstill.begin()
        self._phase.name = Phase.DEVICES
        self._view.say("saving the devices")
        with self._ledger.phase(Phase.DEVICES):
            read = await save_devices(desk, self._env.clock)
        self._phase.name = Phase.FINAL_PAGES
        self._view.say("writing the memory of the stopped guest")
        with self._ledger.phase(Phase.FINAL_PAGES):
            runs = await in_thread(desk.memory.data_runs)
            memory = self._ledger.memory
            memory.sparse_pages = desk.memory.pages - count_pages(runs)
            sent = await desk.send_pages(runs)
            memory.downtime_bytes += sent.wire_bytes
            memory.downtime_pages += sent.normal_pages + sent.zero_pages
        self._phase.name = Phase.FINISH
        return read

    async def _send_iterations(self, desk: Desk) -> None:
        """Save what iterable devices have to send before their final state."""
        transfer = desk.transfer
        if (iterations := transfer.vmm.iterations) is not None:
            for device in transfer.guest.devices:
                if device.kind == "iterable":
                    await transfer.send_iteration(iterations, device, 0)

    async def _write_running(
        self, desk: Desk, undo: contextlib.AsyncExitStack, parameters: MigrationParameters
    ) -> ReadTime:
        """Write a guest that runs, until it can be stopped for the rest within its limit."""
        env, ledger, vmm = self._env, self._ledger, self._guest.vmm
        resume_ns = env.resume_costs.expected_ns(vmm.driver, desk.offer.costs)
        load = ProcessorLoad()
        kind = f"file|{class_key(desk.offer.description)}"

        def predict(dirty_pages: int, bandwidth: Bandwidth) -> Prediction:
            bases = bases_of(
                desk.offer,
                bandwidth,
                dirty_pages=dirty_pages,
                device_bytes=desk.transfer.final_device_bytes(),
                scan_ns=desk.transfer.collect_cost_ns,
                resume_ns=resume_ns,
                load=load,
            )
            return env.knowledge.predict(
                f"{self.guest_name} to a file", kind, bases, coverage=parameters.prediction_coverage_pct / 100,
                bandwidth_known=bandwidth.bytes_per_s > 0 or not dirty_pages,
            )  # fmt: skip

        precopy = Precopy(
            desk.transfer,
            lambda: parameters,
            predict,
            desk.book.acknowledged,
            env.config.limits.round_timeout_s,
            self._view.say_round,
        )
        self._phase.precopy, self._phase.name = precopy, Phase.PRE_COPY
        undo.push_async_callback(precopy.end_throttle)
        with ledger.phase(Phase.PRE_COPY):
            pending = await precopy.run()
        desk.book.in_blackout = True
        return await self._black_out(desk, pending, parameters)

    async def _black_out(self, desk: Desk, pending: Runs, parameters: MigrationParameters) -> ReadTime:
        """Stop the guest, write the rest, let it run again: all within the limit, where that is enforced."""
        env, vmm = self._env, self._guest.vmm
        limit_ns = limit_of(parameters)
        reserve_ns = env.resume_costs.reserve_ns(vmm.driver, desk.offer.costs, limit_ns)
        desk.writer.lets_go = False
        await vmm.prepare_stop()
        env.hold_events(self.migration_id)
        with QuietCollector(), Precedence(threads_of(os.getpid(), vmm.pid)):
            await self._standstill.begin()
            self._view.guest_stopped(held=False)
            self._phase.name = Phase.FINAL_PAGES
            left_s = (self._standstill.began_ns + limit_ns - reserve_ns - time.monotonic_ns()) / 1e9
            try:
                async with asyncio.timeout(max(0.0, left_s) if parameters.switchover_abort else None):
                    read = await save_last_state(desk, pending, env.clock)
            except TimeoutError as error:
                raise MigrationError(
                    f"the guest would have stood still for longer than its limit of {limit_ns / 1e6:g} ms; it runs on "
                    "and nothing was saved. Raise --downtime-limit, or save it with --stop"
                ) from error
            await self._standstill.end()
        self._view.set_status("active")
        self._phase.name = Phase.FINISH
        self._view.tell_passes()
        return read

    async def _complete(self, desk: Desk, read: ReadTime) -> None:
        """Write what stands at the end of the file, and give it its name."""
        order, ledger, writer, transfer = self._order, self._ledger, desk.writer, desk.transfer
        self._view.say("completing the file")
        if not order.ends_guest:
            await desk.tracking.end()
            freed_bytes = await in_thread(writer.give_back)
            log.debug("overtaken batches were given back", mib=freed_bytes >> 20)
        ledger.blackout.source_digest = desk.digest.value
        ledger.memory.encodings = transfer.sender.encodings
        end = messages.StateEnd(
            epoch=ledger.epoch,
            last_round=transfer.round,
            devices=transfer.state_order,
            digest=desk.digest.value,
            source_downtime_ns=0,
            sent_at_ns=self._env.clock.hrtime_ns(),
        )
        record = json.dumps(ledger.finish("completed", None, []).document()).encode()
        tail: list[tuple[messages.Message, bytes]] = [] if read.data is None else [(read.data, b"")]
        tail += [(end, b""), (messages.Record(), record)]

        def closing(frames_end: int, frames: int) -> Closing:
            return Closing(
                save_id=writer.save_id,
                frames_end=frames_end,
                frames=frames,
                record_hash=xxhash.xxh3_64_intdigest(record),
                boot_id=boot_id(),
                exported_after_ns=read.after_ns,
                exported_before_ns=read.before_ns,
            )

        published = False

        def complete() -> None:
            nonlocal published
            for message, payload in tail:
                writer.append(message, [memoryview(payload)])
            writer.publish(closing, force=order.force)
            published = True

        self._too_late = True
        try:
            await in_thread(complete)
        except BaseException:  # the daemon may end meanwhile: what has its name keeps it, and the guest stays stopped
            self._too_late = published
            raise

    async def _leave_guest(self) -> None:
        """Leave the guest as it was before, unless it was saved to be ended."""
        if not (self._order.ends_guest and self._too_late):
            await self._standstill.go_on()

    async def _conclude(self, failure: Exception | None) -> None:
        """Write the record and let the guest go."""
        ledger, env = self._ledger, self._env
        outcome, reason = self._outcome(failure)
        self._phase.end()
        ledger.ended_ns = time.monotonic_ns()
        if outcome == "completed":
            interval, total_s = ledger.blackout.interval, (ledger.ended_ns - ledger.began_ns) / 1e9
            stood = f", it stood still for {interval.measured_ns / 1e6:.0f}ms" if interval is not None else ""
            log.info(f"Guest saved in {self._order.path} in {total_s:.2f}s{stood}")
        else:
            log.warning(f"Save {outcome}", reason=reason)
        self._view.tell_passes()
        record = self.record = ledger.finish(outcome, reason, env.take_log(self.migration_id, "source"))
        self._reservation.end()
        self._view.set_status(STATUS_OF[outcome])
        env.finish(record, "source")

    def _outcome(self, failure: Exception | None) -> tuple[Outcome, str | None]:
        if failure is None:
            return "completed", None
        outcome, reason = outcome_of_error(failure)
        return ("aborted" if outcome == "failed" and self._standstill.began_ns else outcome), reason
