"""The time that a guest lay in a file: by the clock that goes on while a host is suspended, as long as the same kernel
runs; else by the wall clocks, which nothing proves right.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from migrated.base.clock import HostClock
from protocol.clock import ElapsedInterval
from protocol.guest_time import TimeAdjustError, VmTimeData
from protocol.messages import TimeRules

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> bytes:
    """16 bytes that name the run of the kernel, until the host boots again."""
    return UUID(_BOOT_ID.read_text(encoding="ascii").strip()).bytes


def boottime_ns() -> int:
    """The clock that counts from the host's boot, suspended time included (ns)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class SavedTime:
    """A guest's time from a file (``destination.loading.ExportedTime``).

    Attributes:
        time: as it was exported.
        stamps_ns: the boot-time clock just before and just after the export; None after another boot of the host.
        rules: how it is carried over.
        clock: this host's clocks.
    """

    time: VmTimeData
    stamps_ns: tuple[int, int] | None
    rules: TimeRules
    clock: HostClock

    @property
    def round_trip_ns(self) -> int:
        """None was made."""
        return 0

    def elapsed(self, imported_at_ns: int, wall: tuple[int, int]) -> ElapsedInterval:
        """Bounds of the time since the export.

        Raises:
            TimeAdjustError: only the wall clocks could tell, and they contradict each other, or a proof was asked for.
        """
        if self.stamps_ns is not None:
            after_ns, before_ns = self.stamps_ns
            begin_ns, now_ns, end_ns = self.clock.hrtime_ns(), boottime_ns(), self.clock.hrtime_ns()
            least_ns, most_ns = now_ns - (end_ns - imported_at_ns), now_ns - (begin_ns - imported_at_ns)
            return ElapsedInterval(max(0, least_ns - before_ns), max(0, most_ns - after_ns))
        if self.rules.max_time_error_ns:
            raise TimeAdjustError(
                "TimeErrorTooLarge",
                "The guest was saved before this host's last boot, or on another host, so only the wall clocks tell "
                "how long ago that was, and nothing proves them right: restore it without max-time-error.",
            )
        passed_ns = wall[0] * 1_000_000_000 + wall[1] - self.time.wall_ns
        if passed_ns < 0 and self.rules.policy != "freeze":
            raise TimeAdjustError(
                "InvalidWallClock",
                f"The wall clock of this host is {-passed_ns / 1e9:.3f} s before the time at which the guest was "
                "saved: set it, or restore with the time policy freeze, which leaves the guest's time as it was.",
            )
        return ElapsedInterval(max(0, passed_ns), max(0, passed_ns))
