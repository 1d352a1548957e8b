"""How exactly a guest's writes are tracked: pages that its dirty log reports for each page that it wrote.

log starts | guest writes | guest stands | the log against the pages whose content says that they were written
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from migrated.vmm.dirty_log import PagemapScanLog
from migrated.vmm.memory import Span
from protocol.guest import PAGE_SIZE
from protocol.pages import indices_of
from scripts.rig.host import Host
from scripts.rig.waiting import until
from vmm_sim.config import build_config
from vmm_sim.workload import Workload

PROFILE: Final[dict[str, Any]] = {"workload": "random", "dirty_rate": "4MiB/s", "huge_pages": True}
STEPS: Final = 400
"""So many of the guest's steps are tracked; a step is a millisecond where the machine is quiet."""
_UUID: Final = "00000000-0000-0000-0000-000000000001"


class MissedWriteError(Exception):
    """The dirty log lacks a page that the guest wrote."""


async def reported_per_written(host: Host, name: str, memory_mib: int) -> float:
    """Track a running guest of ``PROFILE`` for a while. Returns pages reported for each page written.

    Raises:
        MissedWriteError: a page was written and not reported.
    """
    load = Workload(
        build_config({"name": name, "uuid": _UUID, "memory": f"{memory_mib}MiB", "touched": "100%", **PROFILE})
    )
    vmm = await host.vmm(name)
    try:
        first = (await vmm.call("pause")).meta["step"]
        started = await vmm.call("dirty-log-start", mode="pagemap-scan", present_only=True)
        span = Span(started.meta["address"], started.meta["bytes"] // PAGE_SIZE, 0)
        log = PagemapScanLog(started.fds[0], [span], started.meta["present_only"])
        try:
            await vmm.call("resume")

            async def has_run() -> bool:
                return bool((await vmm.call("status")).meta["step"] >= first + STEPS)

            await until(f"{name} has run {STEPS} steps", has_run)
            last = (await vmm.call("pause")).meta["step"]
            reported = indices_of(log.collect())
        finally:
            log.close()
            await vmm.call("dirty-log-stop")
        await vmm.call("resume")
    finally:
        await vmm.close()
    old, new = (load.expected(step, 0, 1, load.touched_pages).generations for step in (first, last))
    written = np.concatenate(([0], np.flatnonzero(old != new) + 1))  # the guest's heartbeat is in page 0
    if missed := np.setdiff1d(written, reported).tolist():
        raise MissedWriteError(f"{len(missed)} pages that {name} wrote are not in its dirty log: {missed[:5]} ...")
    return len(reported) / len(written)
