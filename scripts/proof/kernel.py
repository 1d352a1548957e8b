"""Virtual time: a queue of calls, hosts with clocks that drift, and processes that die and freeze.

Everything random comes from one seeded generator, so a seed is one run, event for event.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

MS = 1_000_000
SECOND = 1_000 * MS

Call: TypeAlias = Callable[[], None]
Steps: TypeAlias = Generator[int | Callable[[Call], None], None, None]
"""A procedure of a process: yields how long the next step takes (ns of its host's clock), or something that is given
a call to make when the procedure may go on."""


class BrokenRuleError(Exception):
    """A rule of the hand-over does not hold in this run."""


class World:
    """True time, and what happens when.

    Args:
        seed: of everything random.

    Attributes:
        now_ns: true time.
        lines: what happened, for people.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ns = 0
        self.lines: list[str] = []
        self.events = 0
        self._queue: list[tuple[int, int, Call]] = []

    def after(self, delay_ns: int, call: Call) -> None:
        """Do something later; what is due at the same instant happens in the order in which it was asked for."""
        self.events += 1
        heapq.heappush(self._queue, (self.now_ns + max(0, delay_ns), self.events, call))

    def run(self, until_ns: int, done: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass until then, or until ``done``. Returns what ``done`` says."""
        while not done() and self._queue and self._queue[0][0] <= until_ns:
            self.now_ns, _, call = heapq.heappop(self._queue)
            call()
        finished = done()
        if not finished:
            self.now_ns = max(self.now_ns, until_ns)
        return finished

    def say(self, who: str, text: str) -> None:
        """Note what happened."""
        self.lines.append(f"{self.now_ns / MS:12.3f} ms  {who:12} {text}")

    def require(self, holds: bool, rule: str) -> None:
        """Check a rule.

        Raises:
            BrokenRuleError: it does not hold.
        """
        if not holds:
            raise BrokenRuleError(rule)

    def between(self, low: int, high: int) -> int:
        """A random duration, small ones as likely as large ones (logarithmic)."""
        return int(low * (high / low) ** self.random.random())


@dataclass
class Host:
    """One host: its name, and a monotonic clock with its own zero and rate. ``disk_full`` lets the journal fail."""

    world: World
    name: str
    offset_ns: int
    drift_ppb: int
    disk_full: bool = False

    def clock_ns(self) -> int:
        """The reading of the host's clock."""
        now = self.world.now_ns
        return self.offset_ns + now + now * self.drift_ppb // 1_000_000_000

    def true_ns(self, local_ns: int) -> int:
        """How much true time passes while the clock advances by this (rounded up)."""
        return -(-local_ns * 1_000_000_000 // (1_000_000_000 + self.drift_ppb))


class Process:
    """One life of a daemon: its timers and procedures end with it, and wait while it is frozen (SIGSTOP)."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.world = host.world
        self.name = name
        self.alive = True
        self.frozen_until_ns = 0
        self.disturbed_ns = -1
        """When it was last frozen: promises about time hold for daemons that get to run."""

    def freeze(self, true_ns: int) -> None:
        """Do nothing for a while."""
        self.frozen_until_ns = max(self.frozen_until_ns, self.world.now_ns + true_ns)
        self.disturbed_ns = self.frozen_until_ns

    def wake(self, call: Call) -> None:
        """Call now, or once it is no longer frozen, or never when it is dead."""
        if not self.alive:
            return
        if self.world.now_ns < self.frozen_until_ns:
            self.world.after(self.frozen_until_ns - self.world.now_ns, lambda: self.wake(call))
        else:
            call()

    def after(self, local_ns: int, call: Call) -> None:
        """Call after a time of the host's clock."""
        self.world.after(self.host.true_ns(max(0, local_ns)), lambda: self.wake(call))

    def start(self, steps: Steps) -> None:
        """Run a procedure."""
        try:
            pause = next(steps)
        except StopIteration:
            return
        if isinstance(pause, int):
            self.after(pause, lambda: self.start(steps))
        else:
            pause(lambda: self.wake(lambda: self.start(steps)))
