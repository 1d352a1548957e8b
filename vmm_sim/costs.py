"""Elapsed time that things cost: draws around a figure, and waits that are exact and can be interrupted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from random import Random
from typing import Literal

from vmm_sim.config import Costs, DeviceConfig
from vmm_sim.errors import VmmError

# A wait on an event overshoots by the timer slack and the scheduler; the rest is spun.
SPIN_NS = 120_000


def draw_ns(random: Random, costs: Costs, figure_us: int) -> int:
    """One draw around ``figure_us``, in ns: log-normal jitter, and now and then an outlier.

    Always takes two numbers from ``random``, so that one device's settings do not shift the draws of the next.
    """
    spread, chance = random.gauss(0.0, 1.0), random.random()
    value = figure_us * 1000 * math.exp(costs.jitter * spread)
    if chance < costs.outlier_probability:
        value *= costs.outlier_factor
    return int(value)


class CostDraws:
    """All draws of one VMM. Rehearsals draw from a generator of their own, so that they do not shift the real costs.

    Threads may draw at the same time.

    Args:
        seed: of both generators.
    """

    def __init__(self, seed: int) -> None:
        self.real = Random(seed)
        self._rehearsed = Random(self.real.getrandbits(64))
        self._lock = threading.Lock()

    def device_ns(self, device: DeviceConfig, side: Literal["save", "load"], *, rehearsal: bool = False) -> int:
        """Draw what saving or loading a device takes (ns)."""
        with self._lock:
            return draw_ns(self._of(rehearsal), device, device.save_us if side == "save" else device.load_us)

    def transition_ns(
        self, which: Literal["stop", "resume"], parts: Iterable[Costs], *, rehearsal: bool = False
    ) -> int:
        """Draw what a stop or a resume takes (ns): the sum over the guest and its devices."""
        with self._lock:
            random = self._of(rehearsal)
            return sum(draw_ns(random, part, part.stop_us if which == "stop" else part.resume_us) for part in parts)

    def fresh_seed(self) -> int:
        """Return a seed for another VMM's draws."""
        with self._lock:
            return self._rehearsed.getrandbits(63)

    def _of(self, rehearsal: bool) -> Random:
        return self._rehearsed if rehearsal else self.real


def wait_until(deadline_ns: int, interrupt: threading.Event | None = None) -> None:
    """Return at ``deadline_ns`` (time.monotonic_ns), at once if it has passed. Raises VmmError Interrupted."""
    while True:
        if interrupt is not None and interrupt.is_set():
            raise VmmError("Interrupted", "The operation was interrupted before it ended.")
        left = deadline_ns - time.monotonic_ns()
        if left <= 0:
            return
        if left > SPIN_NS:
            seconds = (left - SPIN_NS) / 1e9
            if interrupt is not None:
                interrupt.wait(seconds)
            else:
                time.sleep(seconds)
        else:
            time.sleep(0)
