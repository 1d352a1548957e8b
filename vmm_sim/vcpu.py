"""The thread that is the guest's vCPUs: executes the workload in quanta, beats, and serves the timers.

start --> beat, [ quantum, beat, timers ]*, beat --> stopped, exactly between two steps

The workload writes at its rate for as long as the thread has a processor. Time that the host keeps it from running is
lost, as it is to a vCPU (KVM counts it as stolen): no burst follows, in which the guest would write just when it is to
stop what it was kept from writing before.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmm_sim.clock import GuestClock
from vmm_sim.content import PAGE_SIZE
from vmm_sim.heartbeat import Heartbeat
from vmm_sim.memory import GuestMemory
from vmm_sim.platform import Platform
from vmm_sim.workload import Workload

TICK_NS: Final = 1_000_000
LATE_TICK_NS: Final = 2 * TICK_NS
"""Most time whose writes are made at once (ns): a tick, and how late the next one may come."""
READ_ATTEMPTS: Final = 3
READ_TOLERANCE_NS: Final = 20_000
CRASHED: Final = 70


@dataclass(frozen=True, slots=True)
class StopGap:
    """The guest's last blackout: on its own clock, and on this machine's CLOCK_MONOTONIC."""

    guest_ns: int
    host_ns: int


class Pace:
    """The writes that are due at a rate.

    Args:
        now_ns: since when they are counted (CLOCK_MONOTONIC).
    """

    def __init__(self, now_ns: int) -> None:
        self._counted_ns = now_ns
        self._due = 0.0

    def due(self, now_ns: int, bytes_per_s: float) -> int:
        """Return how many writes of a page are due now, at a rate that was in force since the last call."""
        pages_per_ns = bytes_per_s / (1e9 * PAGE_SIZE)
        earned = (now_ns - self._counted_ns) * pages_per_ns
        self._due = min(self._due + earned, LATE_TICK_NS * pages_per_ns + 1)
        self._counted_ns = now_ns
        return int(self._due)

    def made(self, writes: int) -> None:
        """So many of them were made."""
        self._due -= writes


class Vcpu(threading.Thread):
    """Attributes that others read: ``step``, ``heartbeat``, ``stop_gap``, ``last_beat_monotonic_ns``; set:
    ``rate_bytes_per_s`` (0: unpaced), ``throttle_percent``."""

    def __init__(
        self,
        memory: GuestMemory,
        workload: Workload,
        clock: GuestClock,
        platform: Platform,
        rate_bytes_per_s: int,
        on_crash: Callable[[], None],
    ) -> None:
        super().__init__(name="vcpu", daemon=True)
        self._memory = memory
        self._workload = workload
        self._clock = clock
        self._platform = platform
        self._on_crash = on_crash
        self.rate_bytes_per_s = rate_bytes_per_s
        self.throttle_percent = 0
        self.step = 0
        self.heartbeat = Heartbeat()
        self.stop_gap: StopGap | None = None
        self.last_beat_monotonic_ns = 0
        self._counts_as_stop = True
        self._go = threading.Event()
        self._halt = threading.Event()
        self._halted = threading.Event()
        self._halted.set()

    @property
    def running(self) -> bool:
        """True while steps are executed."""
        return not self._halted.is_set()

    def start_running(self, *, counts_as_stop: bool = True) -> None:
        """Let the stopped vCPUs run. Only one caller at a time. ``counts_as_stop``: whether the pause that ends is
        one of the guest's, and goes into ``stop_gap``."""
        self._counts_as_stop = counts_as_stop
        self._halt.clear()
        self._halted.clear()
        self._go.set()

    def stop_running(self) -> None:
        """Stop at the next step boundary and return once stopped. Only one caller at a time."""
        self._halt.set()
        self._halted.wait()

    def run(self) -> None:
        try:
            while True:
                self._go.wait()
                self._go.clear()
                self._execute()
                self._halted.set()
        except BaseException:
            # A vCPU that fell over is a crashed VMM: nothing may wait for it, and nobody may take it for paused.
            traceback.print_exc()
            self._on_crash()
            os._exit(CRASHED)

    def _read_clocks(self) -> tuple[int, int]:
        """The host's hrtime and CLOCK_MONOTONIC at the same instant: the narrowest of a few bracketed readings, since
        the scheduler may come between any two."""
        narrowest, reading = 0, (0, 0)
        for attempt in range(READ_ATTEMPTS):
            before = time.monotonic_ns()
            hrtime = self._clock.host.hrtime_ns()
            width = time.monotonic_ns() - before
            if not attempt or width < narrowest:
                narrowest, reading = width, (hrtime, before + width // 2)
            if narrowest <= READ_TOLERANCE_NS:
                break
        return reading

    def _beat(self, *, resumed: bool = False) -> None:
        clock = self._clock
        hrtime, monotonic_ns = self._read_clocks()
        tsc = clock.tsc_at(hrtime)
        gap_ns = self.heartbeat.beat(self._memory, tsc, clock.guest_freq, clock.uptime_at(hrtime), self.step)
        if resumed and self.last_beat_monotonic_ns:
            self.stop_gap = StopGap(gap_ns, monotonic_ns - self.last_beat_monotonic_ns)
        self.last_beat_monotonic_ns = monotonic_ns
        self._platform.fire(hrtime, tsc)

    def _execute(self) -> None:
        self._beat(resumed=self._counts_as_stop)
        halt, workload = self._halt, self._workload
        idle = not workload.streams
        tick = time.monotonic_ns()
        pace, rest_until = Pace(tick), 0
        while not halt.is_set():
            begun = time.monotonic_ns()
            rate, awake = self.rate_bytes_per_s, 100 - self.throttle_percent
            beats = self.heartbeat.beats
            if rate and not idle:
                due = pace.due(begun, rate * awake / 100)
                while due and not halt.is_set():
                    steps = min(due, workload.quantum_steps)
                    self._quantum(steps)
                    pace.made(steps)
                    due -= steps
            elif not idle and begun >= rest_until:
                self._quantum(workload.quantum_steps)
                if awake == 100:
                    continue
                rest_until = begun + (time.monotonic_ns() - begun) * 100 // awake
            if self.heartbeat.beats == beats:
                self._beat()
            now = time.monotonic_ns()
            tick = max(tick + TICK_NS, now)
            wake = min(tick, rest_until) if rest_until > now else tick
            if wake > now:
                halt.wait((wake - now) / 1e9)
        self._beat()

    def _quantum(self, steps: int) -> None:
        self._workload.execute(self._memory, self.step, steps)
        self.step += steps
        self._beat()
