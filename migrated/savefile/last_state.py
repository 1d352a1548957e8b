"""The last state of a guest that stands still: its devices, its time, and the memory that is not in the file yet."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import get_args

from migrated.base.clock import HostClock
from migrated.record.parts import Part
from migrated.record.terms import Phase
from migrated.savefile.clock import boottime_ns
from migrated.savefile.desk import Desk
from migrated.source.ledger import OutgoingLedger
from protocol import messages
from protocol.guest import DeviceKind
from protocol.pages import Runs


@dataclass(frozen=True, slots=True)
class ReadTime:
    """The guest's time, None where it does not travel apart from its devices, and the boot-time clock around its
    reading (ns)."""

    data: messages.TimeData | None
    after_ns: int
    before_ns: int


async def save_devices(desk: Desk, clock: HostClock) -> ReadTime:
    """Save all devices and read the guest's time. Each state is written while the next is saved."""
    transfer = desk.transfer
    sending: list[asyncio.Future[int]] = []
    try:
        for kind in get_args(DeviceKind):
            async for parts in transfer.vmm.state_out(kind):
                sending.append(transfer.send_final(parts))  # noqa: PERF401 - the next is saved while this one is written
        read = await _read_time(desk, clock)
        transfer.ledger.memory.downtime_bytes += sum(await asyncio.gather(*sending))
    finally:
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
    return read


async def _read_time(desk: Desk, clock: HostClock) -> ReadTime:
    guest_time = desk.transfer.vmm.time
    after_ns, t2_ns = boottime_ns(), clock.hrtime_ns()
    data = None
    if guest_time is not None:
        exported = await guest_time.export_time()
        data = messages.TimeData(nonce=0, time=exported, t2_ns=t2_ns, t3_ns=clock.hrtime_ns())
    return ReadTime(data, after_ns, boottime_ns())


async def save_last_state(desk: Desk, pending: Runs, clock: HostClock) -> ReadTime:
    """Bring the rest of a guest that has just been stopped into the file, and account for the time.

    Args:
        pending: pages that are dirty and not written, shape (n, 2).
    """
    transfer, ledger = desk.transfer, desk.transfer.ledger
    begin_ns = time.monotonic_ns()
    transfer.dirty_log.restore(pending)
    collected_ns, runs = await _collect(desk, ledger, begin_ns, Part.FINAL_DIRTY_LOG_READ)
    pages = asyncio.create_task(_write_pages(desk, runs))
    try:
        read = await save_devices(desk, clock)
        pages_ns = await pages
    finally:
        pages.cancel()
        await asyncio.gather(pages, return_exceptions=True)
    saved_ns = time.monotonic_ns()
    ledger.part(Part.FINAL_PAGES, collected_ns, pages_ns)
    ledger.part(Part.DEVICE_SAVES, pages_ns, saved_ns)
    ledger.add_phase(Phase.FINAL_PAGES, begin_ns, pages_ns)
    ledger.add_phase(Phase.DEVICES, collected_ns, saved_ns)
    # Saving a device may write guest memory.
    again_ns, runs = await _collect(desk, ledger, saved_ns, Part.DIRTY_LOG_READ_AFTER_SAVES)
    if len(runs):
        ledger.part(Part.PAGES_AFTER_SAVES, again_ns, await _write_pages(desk, runs))
    return read


async def _collect(desk: Desk, ledger: OutgoingLedger, begin_ns: int, part: Part) -> tuple[int, Runs]:
    runs = await desk.transfer.collect()
    end_ns = time.monotonic_ns()
    fence_ns = desk.transfer.fence_ns
    ledger.part(part, begin_ns, end_ns - fence_ns)
    if fence_ns:
        ledger.add_part(Part.FENCE, fence_ns)
    return end_ns, runs


async def _write_pages(desk: Desk, runs: Runs) -> int:
    """Write one more round. Returns when all of it was handed to the kernel."""
    sent = await desk.send_pages(runs)
    memory = desk.transfer.ledger.memory
    memory.downtime_bytes += sent.wire_bytes
    memory.downtime_pages += sent.normal_pages + sent.zero_pages
    return time.monotonic_ns()
