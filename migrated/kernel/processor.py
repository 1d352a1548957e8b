"""The time that a thread waits for a processor while others have it, from the kernel's own account of the thread."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

_ACCOUNT: Final = Path("/proc/thread-self/schedstat")
_WINDOW_NS: Final = 2_000_000_000
_LEAST_RUN_NS: Final = 5_000_000
"""A thread that ran for less tells nothing of how long it waits."""


class _Mark(NamedTuple):
    """The account at an instant: running and waiting to run (ns), and when (monotonic, ns)."""

    ran_ns: int
    waited_ns: int
    at_ns: int


class ProcessorLoad:
    """The factor by which everything takes longer in the calling thread as it waits for a processor: 1 where it never
    does, 3 where it waits twice as long as it runs. Made and asked in the same thread.

    It speaks of this thread's own waiting, whatever the others on the host are and how urgent they are. Where the
    kernel keeps no such account (CONFIG_SCHED_INFO) the mean number of ready tasks for each processor stands in.
    """

    def __init__(self) -> None:
        self._older = self._newer = _mark()

    def now(self) -> float:
        """The load since two to four seconds ago, or since this was made; at least 1."""
        mark = _mark()
        if mark is None or self._older is None or self._newer is None:
            return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        if mark.at_ns - self._newer.at_ns > _WINDOW_NS:
            self._older, self._newer = self._newer, mark
        ran_ns = max(mark.ran_ns - self._older.ran_ns, _LEAST_RUN_NS)
        return 1.0 + (mark.waited_ns - self._older.waited_ns) / ran_ns


def _mark() -> _Mark | None:
    """The calling thread's account now, None where the kernel keeps none."""
    try:
        ran_ns, waited_ns, _ = map(int, _ACCOUNT.read_bytes().split())
    except (OSError, ValueError):
        return None
    return _Mark(ran_ns, waited_ns, time.monotonic_ns())
