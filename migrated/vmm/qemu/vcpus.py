"""Stopping and running the vCPUs of one QEMU, and how long each took by QEMU's own stamps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from migrated.vmm.qemu.qmp import Event, Qmp, stamp_ns
from migrated.vmm.seam import PauseTime


class Vcpus:
    """The vCPUs of one guest.

    Args:
        qmp: the monitor of its QEMU.
        timeout_s: how long QEMU may take to stop or to run them.
    """

    def __init__(self, qmp: Qmp, timeout_s: float) -> None:
        self._qmp = qmp
        self._timeout_s = timeout_s

    async def stop(self) -> tuple[PauseTime, bool]:
        """Stop them, drain every drive and flush it. Returns also whether they ran until then.

        Raises:
            VmmError: QEMU refused it, or did not answer; it may stop them all the same, and ``run`` undoes that.
        """
        begin_ns = time.monotonic_ns()
        async with self._hear("STOP") as stopped:
            await self._qmp.call("stop", self._timeout_s)
            end_ns = time.monotonic_ns()
            if not stopped.done():  # they stood already
                return PauseTime(end_ns - begin_ns), False
            # QEMU sends the event when the vCPUs stand, before it drains and flushes.
            return PauseTime(end_ns - begin_ns, end_ns - _between(begin_ns, stopped.result(), end_ns)), True

    async def run(self) -> int:
        """Run them; QEMU takes the disks before. Returns since when they run (monotonic, ns).

        Raises:
            QmpCommandError: QEMU refused it, and they have not run.
            VmmError: QEMU did not answer; they may run all the same.
        """
        begin_ns = time.monotonic_ns()
        async with self._hear("RESUME") as resumed:
            await self._qmp.call("cont", self._timeout_s)
            end_ns = time.monotonic_ns()
            # The event's own stamp: the guest's clock goes on within 0.1 ms of it, the reply is heard later.
            return _between(begin_ns, resumed.result(), end_ns) if resumed.done() else end_ns

    @asynccontextmanager
    async def _hear(self, event: str) -> AsyncIterator[asyncio.Future[Event]]:
        """Hear the next event of a name while the block runs."""
        async with self._qmp.listen(event) as next_event:
            heard = asyncio.ensure_future(next_event())
            try:
                yield heard
            finally:
                heard.cancel()


def _between(begin_ns: int, event: Event, end_ns: int) -> int:
    """When an event was sent (monotonic, ns). Its stamp is of the wall clock, which somebody may have set since: it
    counts only within the call that the event belongs to."""
    return max(begin_ns, min(stamp_ns(event), end_ns))
