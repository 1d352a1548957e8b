"""The host's clocks as the daemon reads them.

``hrtime_ns`` is CLOCK_MONOTONIC_RAW, never slewed: the clock of guest time and of everything that is compared across
hosts. Durations inside one daemon use ``time.monotonic_ns``. The offsets and the drift exist so that one machine can
play two hosts whose clocks differ; they are 0 in earnest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostClock:
    """One host's clocks, shifted by ``hrtime_offset_ns`` and ``wall_offset_ns`` and running ``drift_ppm`` fast."""

    hrtime_offset_ns: int = 0
    wall_offset_ns: int = 0
    drift_ppm: int = 0

    def hrtime_ns(self) -> int:
        """The monotonic raw clock (ns)."""
        raw = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        return self.hrtime_offset_ns + raw + raw * self.drift_ppm // 1_000_000

    def wall(self) -> tuple[int, int]:
        """The wall clock as (seconds, nanoseconds)."""
        seconds, nanoseconds = divmod(time.time_ns() + self.wall_offset_ns, 1_000_000_000)
        return seconds, nanoseconds
