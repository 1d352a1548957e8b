"""The clocks of a (virtual) host: the real ones, shifted and drifting as configured, so that two daemons on one
machine can stand for two hosts."""

from __future__ import annotations

import time
from dataclasses import dataclass

NS_PER_SEC = 1_000_000_000


@dataclass(frozen=True)
class HostClock:
    """``hrtime`` is CLOCK_MONOTONIC_RAW, run ``drift_ppm`` fast, plus ``offset_ns``; the wall clock is
    CLOCK_REALTIME plus ``wall_offset_ns``."""

    offset_ns: int = 0
    wall_offset_ns: int = 0
    drift_ppm: int = 0

    def hrtime_ns(self) -> int:
        """Monotonic time of this host in ns; may be negative under a negative offset."""
        raw = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        return self.offset_ns + raw + raw * self.drift_ppm // 1_000_000

    def wall(self) -> tuple[int, int]:
        """Wall clock: seconds, nanoseconds."""
        return divmod(time.clock_gettime_ns(time.CLOCK_REALTIME) + self.wall_offset_ns, NS_PER_SEC)
