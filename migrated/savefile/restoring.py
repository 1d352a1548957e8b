"""One restore: an empty guest is built, all that the file holds goes into it and is checked, and it runs.

    opened -> an equal guest -> every frame read, checked, loaded; guest time moved -> digests equal -> it runs

The file is only read. Whatever fails, the new guest is ended, and the file can be tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import time
from typing import Final

import structlog
import xxhash

from migrated.base.errors import CancelledByOperatorError, MigrationError, RefusedError, VmmError
from migrated.base.threads import in_thread
from migrated.destination.decoding import allowed_encodings
from migrated.destination.loading import Loading
from migrated.destination.pages import PageReceiver, RoundReceived
from migrated.destination.states import ArrivedState, ArrivingStates
from migrated.destination.view import View
from migrated.environment import Environment
from migrated.guests.registry import Guest
from migrated.observe.progress import Progress
from migrated.record.model import DestinationHalf, LogLine, Record
from migrated.record.terms import STATUS_OF, Outcome
from migrated.savefile.clock import SavedTime, boot_id
from migrated.savefile.desk import SCHEME
from migrated.savefile.reader import FileEndedError, FileFrames, SavedFile
from migrated.settings.parameters import MigrationParameters
from migrated.source.ending import outcome_of_error
from migrated.source.ledger import DeviceFigures, OutgoingLedger
from migrated.state.run_marks import RunMarkError
from protocol import messages
from protocol.clock import ClockError
from protocol.digest import MemoryDigest
from protocol.errors import ProtocolError
from protocol.guest_time import TimeAdjustError
from protocol.messages import TimeRules
from protocol.versions import CAPABILITIES, REQUIRED_CAPABILITIES, agree_capabilities

log = structlog.get_logger()

READERS: Final = max(2, min(4, len(os.sched_getaffinity(0))))
"""Threads that read a file: one for each processor, since checking and placing pages is work. Two at least, so that one
reads while the other does that; more than there are processors gain nothing."""

_REFUSED = (MigrationError, ProtocolError, TimeAdjustError, ClockError, RunMarkError, OSError, ValueError)


class Restore:
    """One attempt to restore a guest.

    Args:
        env: the daemon.
        file: opened, owned from here on.
        hello: what the file says of the guest, with the name that it gets here.
        parameters: of the guest's time, which the file does not decide.
        migration_id: 32 hex digits.
    """

    def __init__(
        self,
        env: Environment,
        file: SavedFile,
        hello: messages.Hello,
        parameters: MigrationParameters,
        migration_id: str,
    ) -> None:
        self.migration_id = migration_id
        self.guest_name = hello.guest.name
        self.record: Record | None = None
        self.decided = asyncio.Event()
        """Set when the attempt has its record."""
        self._env = env
        self._file = file
        self._hello = hello
        self._uri = f"{SCHEME}{file.path}"
        self._rules = TimeRules(
            policy=parameters.time_policy,
            max_time_jump_ns=int(parameters.max_time_jump_ms * 1e6),
            max_time_error_ns=int(parameters.max_time_error_ms * 1e6),
        )
        # What is shown goes by the id of this attempt, not by that of the save.
        self._view = View(env, hello.model_copy(update={"migration_id": migration_id}), self._uri)
        epoch = env.journal.next_epoch(hello.guest.name, hello.epoch)
        self._ledger = OutgoingLedger(migration_id, hello.guest.name, epoch, self._uri, hello.host, parameters)
        self._half = DestinationHalf(host=env.host)
        self._step = "preparing"
        self._guest: Guest | None = None
        self._work: asyncio.Task[None] | None = None
        self._ended_by: MigrationError | None = None
        self._runs = False

    # Section: what an operator can do

    @property
    def status(self) -> str:
        """The attempt's status, by QEMU's names."""
        return self._view.status

    def cancel(self, error: MigrationError | None = None) -> bool:
        """Give the restore up. Returns False when the guest is let run already."""
        if self.decided.is_set():
            return True
        if self._runs:
            return False
        if self._ended_by is None and self._work is not None:
            self._ended_by = error or CancelledByOperatorError("cancelled by the operator")
            self._view.set_status("cancelling")
            self._work.cancel()
        return True

    def guest_gone(self) -> None:
        """The new guest's process ended by itself."""
        self._guest = None
        self.cancel(VmmError("the guest's process ended while it was restored"))

    def progress(self) -> Progress:
        """A snapshot for an operator."""
        return self._view.progress(self._step, self._hello.limits, None)

    # Section: from begin to end

    async def run(self) -> None:
        """Run the attempt to its record."""
        structlog.contextvars.bind_contextvars(
            migration_id=self.migration_id, guest=self.guest_name, role="destination", peer=self._uri
        )
        self._work = asyncio.create_task(self._story())
        failure: Exception | None = None
        try:
            await self._work
        except asyncio.CancelledError:
            if self._ended_by is None:  # the daemon itself ends; a restarted one discards a guest that never ran
                self._work.cancel()
                await asyncio.gather(self._work, return_exceptions=True)
                raise
            failure = self._ended_by
        except _REFUSED as error:
            failure = error
        except Exception as error:
            log.exception("the incoming migration failed unexpectedly")
            failure = MigrationError(f"internal error: {error!r}")
        try:
            self._conclude(failure)
        finally:
            self._file.close()
            self.decided.set()

    async def _story(self) -> None:
        """Restore the guest. Whatever is raised, it is not here afterwards."""
        async with contextlib.AsyncExitStack() as undo:
            guest = await self._build(undo)
            await self._fill(guest)
            self._runs = True
            self._step = "resuming"
            await self._let_run(guest)
            undo.pop_all()
        guest.overlay, guest.migration_id = None, None
        if (sentence := await guest.vmm.settle()) is not None:
            log.info(sentence)

    async def _build(self, undo: contextlib.AsyncExitStack) -> Guest:
        """Start an empty guest that equals the saved one.

        Raises:
            RefusedError: this host cannot have such a guest.
        """
        env, description = self._env, self._hello.guest
        saved_on = self._file.preamble.architecture
        if saved_on != platform.machine():
            raise RefusedError(
                f"guest {description.name!r} was saved on a {saved_on} host and this one is {platform.machine()}: "
                "restore it on a host like the one that it ran on"
            )
        if description.memory_bytes > env.config.limits.max_memory_bytes:
            raise RefusedError(
                f"the guest has {description.memory_bytes >> 20} MiB of memory, this host takes at most "
                f"{env.config.limits.max_memory_bytes >> 20} MiB ([limits] max_memory_bytes)"
            )
        guest = self._guest = await env.guests.create_incoming(description)
        undo.push_async_callback(self._destroy)
        guest.migration_id = self.migration_id
        if differences := description.differences(await guest.vmm.describe()):
            raise RefusedError(f"this host cannot build an equal guest: {'; '.join(differences)}")
        return guest

    async def _fill(self, guest: Guest) -> None:
        """Read the whole file into the guest, and check that it is what was saved.

        Raises:
            SaveFileError: something in the file is damaged; the sentence says what and where.
        """
        hello, ledger, view = self._hello, self._ledger, self._view
        ledger.memory.pages = hello.guest.pages
        ledger.devices = {(d.name, d.kind): DeviceFigures(d) for d in hello.guest.devices}
        view.set_status("active")
        self._step = "reading the file"
        agreed = agree_capabilities(
            frozenset(hello.capabilities), CAPABILITIES, frozenset(hello.required) | REQUIRED_CAPABILITIES
        )
        read_to_end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        read_to_end.add_done_callback(_retrieved)
        frames = FileFrames(self._file, xxhash.xxh3_64_intdigest, READERS)
        reading = set(range(READERS))
        digest = MemoryDigest(hello.guest.pages)
        built = await guest.vmm.describe()
        states = ArrivingStates(guest.vmm.state_bounds(built))
        loading = Loading(
            guest.vmm, {(d.name, d.kind) for d in hello.guest.devices}, self._rules, self._env.clock, states
        )
        arrived = 0

        def round_arrived(number: int, received: RoundReceived) -> None:
            digest.add(received.digest_delta)
            tally = view.tally
            tally.rounds = number
            tally.received_bytes += received.payload_bytes
            tally.normal_pages += received.normal_pages
            tally.zero_pages += received.zero_pages

        def state_arrived(state: ArrivedState) -> None:
            nonlocal arrived
            arrived += 1
            loading.add_state(state)

        def ended(number: int, error: Exception) -> None:
            reading.discard(number)
            if read_to_end.done():
                return
            if not isinstance(error, FileEndedError):
                read_to_end.set_exception(frames.readers[number].where(error))
            elif not reading:
                read_to_end.set_result(None)

        memory = await guest.vmm.memory()
        receiver = PageReceiver(
            memory, states, digest, READERS, allowed_encodings(agreed), announced=False,
            on_round=round_arrived, on_state=state_arrived, on_failure=ended,
        )  # fmt: skip
        load = asyncio.create_task(loading.run())
        try:
            receiver.guest_stopped()  # it never ran: no page is prepared for later rounds
            await in_thread(memory.make_zero)
            for reader in frames.readers:
                receiver.add_channel(reader)
            await asyncio.wait({load, read_to_end}, return_when=asyncio.FIRST_COMPLETED)
            if load.done():
                await load  # a state could not be loaded
            await read_to_end
            self._check_end(frames, digest, arrived)
            if (data := frames.end.time) is not None:
                loading.add_time(self._saved_time(data))
            elif guest.vmm.time is not None:
                raise self._file.damaged("the closing part", self._file.closing.frames_end, _missing("guest time"))
            self._step = "loading the devices"
            loading.all_arrived(arrived)
            await load
        finally:
            load.cancel()
            read_to_end.cancel()
            await receiver.stop()
            await asyncio.gather(load, return_exceptions=True)
            await asyncio.to_thread(memory.release)
        self._account(loading, digest, frames)

    def _saved_time(self, data: messages.TimeData) -> SavedTime:
        closing = self._file.closing
        stamps_ns = (closing.exported_after_ns, closing.exported_before_ns) if closing.boot_id == boot_id() else None
        if stamps_ns is None:
            log.warning("the host has booted since the guest was saved: only the wall clocks tell how long ago it was")
        return SavedTime(data.time, stamps_ns, self._rules, self._env.clock)

    def _check_end(self, frames: FileFrames, digest: MemoryDigest, states: int) -> None:
        """Check that what was read is all that was saved."""
        end, where = frames.end.state_end, self._file.closing.frames_end
        if end is None or not frames.end.record:
            raise self._file.damaged("the closing part", where, _missing("end of the state, or the record,"))
        if end.devices != states:
            raise self._file.damaged(
                "the device states", self._file.frames_begin, _missing(f"{end.devices - states} device states")
            )
        if end.digest != digest.value:
            raise self._file.damaged(
                "the memory as a whole",
                self._file.frames_begin,
                ValueError(f"its digest is {digest.value:016x}, saved was {end.digest:016x}"),
            )

    def _account(self, loading: Loading, digest: MemoryDigest, frames: FileFrames) -> None:
        ledger, done, tally = self._ledger, loading.done, self._view.tally
        ledger.destination_host = self._env.host
        ledger.blackout.source_digest = None if (end := frames.end.state_end) is None else end.digest
        memory = ledger.memory
        memory.normal_pages, memory.zero_pages = tally.normal_pages, tally.zero_pages
        memory.precopy_bytes, memory.precopy_pages = frames.received_bytes, tally.normal_pages + tally.zero_pages
        self._half = DestinationHalf(
            host=self._env.host, load_ns=done.load_ns, time=done.time, digest=f"{digest.value:016x}"
        )

    async def _let_run(self, guest: Guest) -> None:
        """Let the guest do what it did when it was saved: run, or stand paused.

        Raises:
            VmmError, RunMarkError: it cannot be run.
        """
        epoch = self._ledger.epoch
        if self._hello.guest_paused:
            await guest.vmm.pause()
            return
        if (lock := guest.vmm.lock) is not None:
            await lock.take()
        self._env.run_marks.write(guest.place, epoch)
        await guest.vmm.resume(epoch)
        self._env.publish("RESUME", {"guest": guest.name})

    async def _destroy(self) -> None:
        if (guest := self._guest) is not None:
            with contextlib.suppress(VmmError):
                await self._env.guests.destroy(guest)

    def _conclude(self, failure: Exception | None) -> None:
        """Write the record."""
        ledger, env = self._ledger, self._env
        outcome: Outcome = "completed"
        reason = None
        if failure is not None:
            outcome, reason = outcome_of_error(failure)
        ledger.ended_ns = time.monotonic_ns()
        lines = tuple(LogLine(side="destination", **line) for line in env.take_log(self.migration_id, "destination"))
        ledger.half = self._half.model_copy(update={"events": lines})
        record = self.record = ledger.finish(outcome, reason, [])
        if outcome == "completed":
            log.info(f"Guest restored from {self._file.path} in {record.total_ns / 1e9:.2f}s")
        else:
            log.warning(f"Restore {outcome}", reason=reason)
        self._step, self._view.reason = "ended", reason
        self._view.set_status(STATUS_OF[outcome])
        env.finish(record, "destination")


def _retrieved(future: asyncio.Future[None]) -> None:
    """Mark the error of a task that ended as seen: another error is told already, and asyncio would log this one."""
    if not future.cancelled():
        future.exception()


def _missing(what: str) -> ValueError:
    return ValueError(f"it lacks the {what}")
