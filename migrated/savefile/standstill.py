"""The stop of a guest for its save, and its way back: whatever fails, it runs again as it did before."""

from __future__ import annotations

import contextlib
import time

import structlog

from migrated.base.errors import VmmError
from migrated.environment import Environment
from migrated.record.parts import Part
from migrated.record.terms import Phase, QemuCheckpoint
from migrated.source.ledger import OutgoingLedger
from migrated.vmm.seam import VmmGuest
from protocol.budget import DowntimeInterval

log = structlog.get_logger()


class Standstill:
    """One stop, at most, of a guest that is saved.

    Args:
        env: the daemon, which publishes events.
        vmm: of the guest.
        epoch: that the guest runs in, before and after.
        ledger: takes what the stop and the resume took.

    Attributes:
        began_ns: when the stop was asked for (monotonic), 0 where it was not.
    """

    def __init__(self, env: Environment, vmm: VmmGuest, epoch: int, ledger: OutgoingLedger) -> None:
        self.began_ns = 0
        self._env = env
        self._vmm = vmm
        self._epoch = epoch
        self._ledger = ledger
        self._ended = False

    async def begin(self) -> None:
        """Stop the guest.

        Raises:
            VmmError: it may be stopped, or not; ``go_on`` sees to that.
        """
        began_ns = self.began_ns = time.monotonic_ns()
        pause = await self._vmm.pause()
        stopped_ns = time.monotonic_ns()
        ledger = self._ledger
        self._env.publish("STOP", {"guest": ledger.guest})
        ledger.part(Part.STOP, began_ns, stopped_ns - pause.drain_ns)
        if pause.drain_ns:
            ledger.add_part(Part.STOP_DRAIN, pause.drain_ns)
        ledger.add_phase(Phase.PAUSE, began_ns, stopped_ns)
        ledger.checkpoint(QemuCheckpoint.DOWNTIME_START, 0)
        ledger.checkpoint(QemuCheckpoint.VM_STOPPED, stopped_ns - began_ns)

    async def end(self, *, given_up: bool = False) -> None:
        """Let the guest run as it did before, and work out how long it stood still. A second call does nothing.

        Args:
            given_up: whether the save failed while it stood.

        Raises:
            VmmError: it cannot be resumed.
        """
        if not self.began_ns or self._ended:
            return
        ledger, begin_ns = self._ledger, time.monotonic_ns()
        await self._vmm.interrupt()
        running_at_ns = await self._vmm.resume(self._epoch)
        self._ended = True
        self._env.publish("RESUME", {"guest": ledger.guest})
        accounted_ns = self.began_ns + sum(part.ns for part in ledger.blackout.parts)
        if given_up:
            ledger.part(Part.UNTIL_ABORT, min(accounted_ns, begin_ns), begin_ns)
        ledger.part(Part.RESUME_ON_SOURCE, begin_ns, running_at_ns)
        pause_ns = running_at_ns - self.began_ns
        ledger.checkpoint(QemuCheckpoint.DOWNTIME_END, pause_ns)
        ledger.blackout.interval = DowntimeInterval(pause_ns, pause_ns)

    async def go_on(self) -> None:
        """Leave the guest as it was before, whatever has become of the save."""
        if not self.began_ns:
            with contextlib.suppress(VmmError):
                await self._vmm.interrupt()
            return
        try:
            await self.end(given_up=True)
        except VmmError as error:
            log.error("the guest could not be resumed after its save", reason=str(error))

    def forget(self) -> None:
        """The guest's process has ended: there is nothing to resume."""
        self.began_ns = 0
