"""A real QEMU is tracked from outside, and runs on whatever becomes of whoever does it."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest

from migrated.kernel import process_memory
from migrated.kernel.injection import tracer_of
from migrated.kernel.tracking import start_tracking, why_no_tracking
from migrated.vmm.dirty_log import PagemapScanLog
from migrated.vmm.memory import Span
from migrated.vmm.qemu.ram import find_ram
from protocol.pages import indices_of
from tests.migrated.injectors import Injectors
from tests.migrated.qemu.conftest import BareQemu

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def can_track() -> None:
    if (reason := why_no_tracking()) is not None:
        pytest.skip(reason)


async def test_killed_at_any_moment_the_tracking_leaves_qemu_running_and_untracked(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu("-device", "VGA")
    address, size = (await find_ram(qmp)).carried[0].range
    with Injectors(qmp.pid, [(address, size)]) as injectors:
        for number in range(25):
            injector = await asyncio.to_thread(injectors.begin_loop)
            await asyncio.sleep(number * 0.000_731)  # somewhere else every time
            await asyncio.to_thread(injectors.end_loop, injector)
            assert (await qmp.call("query-status"))["status"] == "running"
            assert tracer_of(qmp.pid) is None
    # Nobody's tracking is left behind: another one can have all of the memory.
    (await asyncio.to_thread(start_tracking, qmp.pid, [(address, size)])).close()


async def test_writes_to_every_kind_of_block_are_found(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu(
        "-device", "VGA", "-object", "memory-backend-ram,id=n0,size=32M",
        "-object", "memory-backend-memfd,id=n1,size=32M,share=on", "-numa", "node,memdev=n0", "-numa", "node,memdev=n1",
        "-S",
    )  # fmt: skip
    carried = (await find_ram(qmp)).carried
    tracking = await asyncio.to_thread(start_tracking, qmp.pid, [one.range for one in carried])
    spans = [Span(one.address, one.block.pages, one.first_page) for one in carried]
    log = PagemapScanLog(os.open(f"/proc/{qmp.pid}/pagemap", os.O_RDONLY), spans, present_only=True)
    log.collect()
    assert log.collect().tolist() == []

    def write_one_page_each() -> None:
        for one in carried:
            place = np.array([[one.address + 3 * 4096, 8]], np.uint64)
            process_memory.write(qmp.pid, place, np.array([7], np.uint64))

    written = [one.first_page + 3 for one in carried]
    write_one_page_each()
    # Where there was nothing the kernel may have put a huge page, all of it new.
    assert set(written) <= set(indices_of(log.collect()).tolist())
    write_one_page_each()
    assert indices_of(log.collect()).tolist() == written
    log.close()
    tracking.close()
