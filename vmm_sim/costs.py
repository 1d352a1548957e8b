"""Elapsed time that things cost: draws around a figure, and waits that are exact and can be interrupted."""

from __future__ import annotations

import math
import threading
import time
from random import Random

from vmm_sim.config import Costs
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
