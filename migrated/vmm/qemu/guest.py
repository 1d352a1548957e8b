"""One QEMU guest behind the seam: memory and its tracking by us and the kernel, device state and run state by QEMU.

source        start_dirty_log   a userfaultfd made inside QEMU (it stands still for 0.2 ms), all blocks registered
              fence             an empty block transaction: what is in flight past the page tables has landed
              pause             stop: vCPUs, then every drive drained and flushed, told apart by the event between
              state_out         one part, from xen-save-devices-state; the disks are let go with it
              resume            cont: takes the disks back
destination   memory            RAM in a file of ours; video memory and firmware in QEMU, written from here
              state_in          the part, as a migration stream; QEMU stays stopped
              resume            cont: opens the disks, then runs; after that the network is told where it is now

The module is longer than others because all that is asked of one QEMU shares its monitor and its state.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from migrated.base.errors import RefusedError, VmmError, VmmGoneError
from migrated.base.threads import in_thread, made_in_thread
from migrated.kernel.errors import OtherProcessError
from migrated.kernel.memory import swap_is_on
from migrated.kernel.tracking import WriteTracking, start_tracking
from migrated.vmm import spawn
from migrated.vmm.dirty_log import DirtyLog, PagemapScanLog
from migrated.vmm.memory import GuestMemory, Span
from migrated.vmm.qemu import access, handed_over, places
from migrated.vmm.qemu.agent import set_wall_clock
from migrated.vmm.qemu.blueprint import Blueprint, draw, unfit
from migrated.vmm.qemu.checks import check_guest, drives_bypass_page_tables
from migrated.vmm.qemu.costs import STEPS, Step, SwitchoverCosts, keys_of
from migrated.vmm.qemu.findings import Row, refusals
from migrated.vmm.qemu.handed_over import PrivateView
from migrated.vmm.qemu.lock import QemuLock
from migrated.vmm.qemu.offers import words
from migrated.vmm.qemu.places import Place, PlaceFile
from migrated.vmm.qemu.qmp import QUICK_S, Qmp, QmpCommandError
from migrated.vmm.qemu.ram import Ram, find_ram
from migrated.vmm.qemu.state import StateLoad, StateSave
from migrated.vmm.qemu.vcpus import Vcpus
from migrated.vmm.seam import (
    DirtyTracking,
    ExpectedCosts,
    GuestState,
    GuestStatus,
    PauseTime,
    Side,
    StatePart,
    VmmGuest,
)
from protocol.guest import PAGE_SIZE, DeviceDescription, DeviceKind, GuestDescription, MemoryRegion
from protocol.messages import DeviceCost

DEVICES: Final = "qemu devices"
"""The one part that all of QEMU's device state travels in."""
_GONE_S: Final = 10.0
_QUIT_S: Final = 2.0
_AGENT_S: Final = 2.0
_PRIOR_STATE_BYTES: Final = 160 << 10
_CALLS_TRIED: Final = 5


class QemuGuest(VmmGuest):
    """A connected QEMU guest. Made by ``attach``."""

    driver = "qemu"
    dirty_tracking = frozenset({"pagemap-scan"})

    def __init__(
        self, qmp: Qmp, api_socket: Path, place: Place, ram: Ram, stop_timeout_s: float, costs: SwitchoverCosts
    ) -> None:
        self.name = place.name
        self.pid = qmp.pid
        self.api_socket = api_socket
        self._qmp = qmp
        self._record = PlaceFile(api_socket, place)
        self._ram = ram
        self._stop_timeout_s = stop_timeout_s
        self._vcpus = Vcpus(qmp, stop_timeout_s)
        self._may_have_run = False
        self._tracking: WriteTracking | None = None
        self._fenced = False
        self._hands_over = False
        self._private_view: PrivateView | None = None
        self._changed_for_good = place.published
        """An earlier daemon let what QEMU wrote into memory that was handed over, or began to: nobody can undo it."""
        self._costs = costs
        self._blueprint: Blueprint | None = None
        self._save = StateSave(qmp)
        self._load = StateLoad(qmp)

    @classmethod
    async def attach(
        cls,
        api_socket: Path,
        place: Place,
        costs: SwitchoverCosts,
        *,
        timeout_s: float | None = QUICK_S,
        stop_timeout_s: float = QUICK_S,
        lock_directory: Path | None = None,
    ) -> QemuGuest:
        """Connect to a guest.

        Args:
            api_socket: its QMP socket, or a link to it.
            place: what is remembered of it.
            costs: what moves took on this host.
            timeout_s: bound of the wait for QEMU's greeting.
            stop_timeout_s: how long QEMU may take to stop, resume or drain.
            lock_directory: where ownership locks lie, None where there are none.

        Raises:
            VmmGoneError, VmmSilentError, VmmError: as ``Driver.attach``.
        """
        qmp = await Qmp.connect(api_socket, timeout_s)
        try:
            guest = cls(qmp, api_socket, place, await find_ram(qmp), stop_timeout_s, costs)
            guest._fenced = drives_bypass_page_tables(await qmp.call("query-named-block-nodes"))
            if lock_directory is not None:
                guest.lock = QemuLock(qmp, lock_directory / f"{(await guest._draw()).uuid}.lock")
            return guest
        except BaseException:
            await qmp.close()
            raise

    async def describe(self) -> GuestDescription:
        self._ram = await find_ram(self._qmp)
        if self._ram.lost:
            names = ", ".join(block.name for block in self._ram.lost)
            raise VmmError(
                f"memory of guest {self.name!r} cannot be found in QEMU (process {self.pid}): {names}. The guest "
                "does not see it just now, and no one mapping has its size; start QEMU 10.0 or newer, which tells "
                "where it is"
            )
        blueprint = await self._draw()
        expected = {step: self._costs.expect(keys_of(blueprint), step).ns for step in STEPS}
        return GuestDescription(
            name=self.name,
            uuid=blueprint.uuid,
            vmm=self.driver,
            machine=blueprint.machine,
            page_size=PAGE_SIZE,
            memory=tuple(
                MemoryRegion(
                    name=carried.block.label,
                    guest_address=carried.block.guest_address if carried.block.role == "main" else 0,
                    size_bytes=carried.block.size,
                    offset_pages=carried.first_page,
                )
                for carried in self._ram.carried
            ),
            devices=(
                DeviceDescription(
                    name=DEVICES,
                    kind="non-iterable",
                    state_bytes=self._state_bytes(),
                    expected_save_ns=expected["save"],
                    expected_load_ns=expected["load"],
                ),
            ),
            vcpus=blueprint.vcpus,
            guest_freq=0,
            guest_time=False,
            expected_stop_ns=expected["stop"],
            expected_resume_ns=expected["resume"],
            vmm_config=blueprint.pack(),
        )

    @property
    def _place(self) -> Place:
        return self._record.known

    def _state_bytes(self) -> int:
        """Expected size of what ``state_out`` gives. Memory that is QEMU's own is in it where main memory is handed
        over; else it travels as pages."""
        own = handed_over.own_bytes(self._ram) if self._hands_over or self._place.private_view else 0
        return (self._place.state_bytes or _PRIOR_STATE_BYTES) + own

    async def _draw(self) -> Blueprint:
        blueprint = self._blueprint = await draw(self._qmp, self.name, self._ram)
        return blueprint

    async def status(self) -> GuestStatus:
        answer = await self._qmp.call("query-status")
        state: GuestState = "running" if answer["running"] else "paused"
        if not answer["running"] and self._place.incoming and not (self._has_run() or self._changed_for_good):
            state = "incoming"
        detail = {
            "qemu_status": answer["status"],
            "qemu_version": ".".join(str(part) for part in self._qmp.version),
            "injection_pause_ns": self._tracking.pause_ns if self._tracking is not None else 0,
        }
        return GuestStatus(state=state, pid=self.pid, epoch=self._place.epoch, detail=detail)

    def _has_run(self) -> bool:
        """Whether the vCPUs ran since the resume that was asked for last; whether they may have, where no log tells."""
        ran = places.ran_after(self._place.run_log, self._place.run_log_bytes)
        return self._may_have_run if ran is None else ran

    async def check(self) -> list[Row]:
        """Everything that could break the promise of a migration, each with its verdict."""
        return await check_guest(self._qmp, await find_ram(self._qmp))

    async def needs(self) -> frozenset[str]:
        machine = await self._qmp.call("qom-get", path="/machine", property="type")
        kvm = await self._qmp.call("query-kvm")
        return words(machines=[str(machine).removesuffix("-machine")], kvm=bool(kvm["enabled"]))

    async def why_not_migrate(self) -> str | None:
        return refusals(await self.check())

    async def memory_files(self) -> Sequence[int]:
        files = await made_in_thread(handed_over.close_files, handed_over.main_files, self.pid, self._ram)
        self._hands_over = bool(files)
        return files

    async def keep_memory_private(self) -> None:
        """Keep memory that was handed over from what QEMU writes to it, until it is resumed."""
        self._private_view = await made_in_thread(PrivateView.close, PrivateView, self.pid, self._ram)
        await in_thread(self._private_view.begin)
        self._record.change(private_view=True)

    async def memory(self) -> GuestMemory:
        self._hands_over = False  # all of it is copied: nothing of it travels with the devices
        return await made_in_thread(GuestMemory.release, access.open_memory, self.name, self.pid, self._ram)

    async def start_dirty_log(self, mode: DirtyTracking) -> DirtyLog:
        if mode == "logged":
            raise VmmError(f"QEMU keeps no dirty log that guest {self.name!r} could be followed by: use pagemap-scan")
        await self.stop_dirty_log()
        self._fenced = drives_bypass_page_tables(await self._qmp.call("query-named-block-nodes"))
        ranges = [carried.range for carried in self._ram.carried]
        all_pages = swap_is_on() and any(carried.block.shared for carried in self._ram.carried)
        try:
            tracking = await made_in_thread(WriteTracking.close, start_tracking, self.pid, ranges, all_pages=all_pages)
        except OtherProcessError as error:
            raise VmmError(f"guest {self.name!r} cannot be tracked: {error}") from error
        self._tracking = tracking
        spans = [Span(carried.address, carried.block.pages, carried.first_page) for carried in self._ram.carried]
        try:
            pagemap = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise VmmError(f"the page tables of QEMU (process {self.pid}) cannot be read: {error.strerror}") from error
        return PagemapScanLog(pagemap, spans, present_only=not all_pages)

    async def stop_dirty_log(self) -> None:
        tracking, self._tracking = self._tracking, None
        if tracking is not None:
            await in_thread(tracking.close)

    @property
    def needs_fence(self) -> bool:
        return self._fenced

    async def fence(self) -> int:
        if not self._fenced:
            return 0
        begin_ns = time.monotonic_ns()
        await self._qmp.call("transaction", self._stop_timeout_s, actions=[])
        return time.monotonic_ns() - begin_ns

    async def prepare_stop(self) -> None:
        await self._save.prepare()

    async def pause(self) -> PauseTime:
        pause, ran = await self._vcpus.stop()
        self._note("stop", pause.total_ns)
        if self._place.incoming:  # it arrives paused: its disks are opened when it is resumed
            await self._publish()
            self._now_ours(disks_released=True)
        elif ran and self._place.disks_released:  # somebody else let it run
            self._record.change(disks_released=False)
        return pause

    def _note(self, step: Step, took_ns: int) -> None:
        if self._blueprint is not None:  # never described, it was no part of a migration
            self._costs.note(keys_of(self._blueprint), step, took_ns)

    async def resume(self, epoch: int) -> int:
        begin_ns = time.monotonic_ns()
        if self.lock is not None:
            await self.lock.take()
        arriving = self._place.incoming
        # Of one that arrives, a daemon after this one must be able to tell whether it ran.
        change = self._record.change if arriving else self._record.change_if_possible
        log_bytes = places.log_size(self._place.run_log)
        change(epoch=epoch, run_log_bytes=log_bytes, published=self._place.private_view)
        await self._publish()
        self._may_have_run = True
        try:
            running_at_ns = await self._vcpus.run()
        except QmpCommandError:
            self._may_have_run = False
            raise
        self._note("resume", running_at_ns - begin_ns)
        self._hands_over = False
        await self._save.release()
        if not arriving and self._place.disks_released:
            self._record.change_if_possible(disks_released=False)
        if arriving:
            self._now_ours(disks_released=False)
            with contextlib.suppress(QmpCommandError):  # a guest without a network has nobody to tell
                await self._qmp.call("announce-self", initial=50, max=550, rounds=5, step=100)
        return running_at_ns

    async def _publish(self) -> None:
        """Let what QEMU writes reach memory that was handed over, with what it has written already."""
        if not self._place.private_view:
            return
        if self._private_view is None:  # a daemon before this one began it
            self._private_view = await made_in_thread(PrivateView.close, PrivateView, self.pid, self._ram)
        await in_thread(self._private_view.end)

    def _now_ours(self, *, disks_released: bool) -> None:
        """Note in the guest's record that it is this QEMU's now: it runs, or is paused as it was before. Memory that
        was handed over is this QEMU's alone."""
        self._record.change_if_possible(
            incoming=False, private_view=False, published=False, disks_released=disks_released
        )
        if self._private_view is not None:
            self._private_view.close()
            self._private_view = None

    async def settle(self) -> str | None:
        if self._place.agent is None:
            return None
        behind_ns = await set_wall_clock(self._place.agent, _AGENT_S)
        return f"The guest agent set the guest's wall clock, which was {behind_ns / 1e6:.0f}ms behind"

    async def interrupt(self) -> None:
        # A save takes milliseconds and cannot hang: it writes to memory.
        self._load.interrupt()

    async def state_out(self, kind: DeviceKind) -> AsyncIterator[Sequence[StatePart]]:
        if kind == "iterable":
            return
        machine = (self._blueprint or await self._draw()).machine
        released = self._place.disks_released
        # Before it is so: a QEMU that is asked to let go of its disks twice aborts.
        self._record.change(disks_released=True)
        try:
            data, took_ns = await self._save.save(machine, release_disks=not released)
        except QmpCommandError:
            self._record.change(disks_released=released)
            raise
        self._record.known = self._place.model_copy(update={"state_bytes": len(data)})
        if self._hands_over:
            begin_ns = time.monotonic_ns()
            data = handed_over.read_own(self.name, self.pid, self._ram) + data
            took_ns += time.monotonic_ns() - begin_ns
        self._note("save", took_ns)
        yield [StatePart(DEVICES, "non-iterable", data, took_ns)]

    async def state_in(self, parts: Sequence[StatePart]) -> Sequence[int]:
        if [part.name for part in parts] != [DEVICES]:
            names = ", ".join(part.name for part in parts)
            raise VmmError(f"a QEMU guest takes its state as one part named {DEVICES!r}, not as: {names}")
        state, begin_ns = parts[0].data, time.monotonic_ns()
        if self._place.private_view:
            state = handed_over.write_own(self.name, self.pid, self._ram, state)
        written_ns = time.monotonic_ns() - begin_ns
        took_ns = written_ns + await self._load.load(state)
        self._note("load", took_ns)
        return [took_ns]

    async def expected_costs(self, side: Side) -> ExpectedCosts:
        call_ns = 0
        for _ in range(_CALLS_TRIED):
            begin_ns = time.monotonic_ns()
            await self._qmp.call("query-status")
            call_ns = max(call_ns, time.monotonic_ns() - begin_ns)
        if side == "load":
            await self._load.prepare()
        self._costs.keep()
        keys = keys_of(self._blueprint or await self._draw())
        stop, device, resume = (self._costs.expect(keys, step) for step in ("stop", side, "resume"))
        return ExpectedCosts(
            devices=(DeviceCost(name=DEVICES, kind="non-iterable", ns=device.ns, spread_ns=device.spread_ns),),
            pause_ns=stop.ns,
            resume_ns=resume.ns,
            call_ns=call_ns,
            basis="learned" if device.tries else "guessed",
            pause_spread_ns=stop.spread_ns,
            whole_steps=True,
        )

    async def awaits(self, description: GuestDescription) -> bool:
        if self._place.started_here or (await self.status()).state != "incoming":
            return False
        if found := unfit(description, await self.describe()):
            raise RefusedError(
                f"the QEMU that waits for guest {self.name!r} here is another machine: {'; '.join(found)}. Start it as "
                "the source's was started"
            )
        return True

    async def own_operation(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """``check``: the rows of everything that was looked at."""
        if name == "check":
            return {"rows": [row._asdict() for row in await self.check()]}
        return await super().own_operation(name, arguments)

    async def destroy(self) -> None:
        view, self._private_view = self._private_view, None
        try:
            with contextlib.suppress(VmmError):
                await self._qmp.call("quit", _QUIT_S)
            await self.close()
            if not await spawn.make_sure_gone(self.pid, _GONE_S):
                raise VmmError(f"QEMU of guest {self.name!r} (process {self.pid}) does not end; end it by hand")
            if view is not None and not self._has_run():
                await in_thread(view.put_back)
        finally:
            if view is not None:
                view.close()
        places.forget(self.api_socket)

    async def close(self) -> None:
        self._save.close()
        self._load.close()
        if self._private_view is not None:
            self._private_view.close()
        self._costs.keep()
        with contextlib.suppress(VmmGoneError):
            await self.stop_dirty_log()
        await self._qmp.close()
