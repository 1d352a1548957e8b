"""One schedule on paper: tasks in an order, started as soon as slots, links and memory allow.

    start what can start -> the next end -> start what can start -> ...

A migration gets a lane, an equal share of the source's link, or the widest share without which it would not converge.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from migrated.fleet.costs import MoveCost, move_cost, narrowest_share
from migrated.fleet.model import GuestDocument


class Choice(Enum):
    """The rule by which a task chooses among the hosts that can take it now. Whatever the rule, hosts with the fewest
    guests of its group come first."""

    SPREAD = "spread"
    """Where the smallest share of memory is used."""
    FAST = "fast"
    """Where it ends first."""
    TIGHT = "tight"
    """Where least memory stays free, which keeps room for large ones."""
    PATIENT = "patient"
    """Where it ends first, even if it must wait for that."""


@dataclass(slots=True)
class Task:
    """A guest to move.

    Attributes:
        limit_ns: its downtime limit.
        hosts: where it can go.
        groups: guests of its group at each host; empty when it has none.
        doubtful: it is not expected to converge with any share to any host, so that any will do.
    """

    guest: GuestDocument
    limit_ns: int
    hosts: Sequence[str]
    groups: Mapping[str, int] = field(default_factory=dict)
    doubtful: bool = False
    _costs: dict[int, MoveCost] = field(default_factory=dict)

    def cost(self, bytes_per_s: int) -> MoveCost:
        """Return the cost of moving it at a rate."""
        known = self._costs.get(bytes_per_s)
        if known is None:
            known = self._costs[bytes_per_s] = move_cost(self.guest, self.limit_ns, bytes_per_s)
        return known

    def share(self, link: int, lanes: int) -> int:
        """Its share of a link that is divided into lanes, as ``narrowest_share``."""
        return narrowest_share(self.cost, link, lanes)


@dataclass(frozen=True, slots=True)
class Destination:
    """A destination before the first move. Links are in bytes per second."""

    inbound: int
    link: int
    free_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends before the first move: the source's slots and link, and the destinations."""

    outbound: int
    link: int
    destinations: Mapping[str, Destination]


@dataclass(frozen=True, slots=True)
class Placed:
    """A task with its place in a schedule."""

    task: Task
    host: str
    rate: int
    begin_ns: int

    @property
    def end_ns(self) -> int:
        """When it will be over."""
        return self.begin_ns + self.task.cost(self.rate).total_ns


@dataclass(frozen=True, slots=True)
class Schedule:
    """The result: what has a place, and what is left because no memory was.

    Attributes:
        lanes: into how many shares the source's link is divided.
        clashes: pairs of a group that share a host.
        fullest: the largest share of used memory on any destination of a move.
    """

    placed: tuple[Placed, ...] = ()
    left: tuple[Task, ...] = ()
    lanes: int = 1
    clashes: int = 0
    fullest: float = 0.0

    @property
    def total_ns(self) -> int:
        """When the last one will be over."""
        return max((one.end_ns for one in self.placed), default=0)


def schedule(ends: Ends, tasks: Sequence[Task], *, lanes: int, choice: Choice, in_turn: bool) -> Schedule:
    """Make a schedule.

    Args:
        tasks: in the order in which they may start.
        lanes: into how many shares the source's link is divided.
        in_turn: a task that cannot start yet holds up those after it.
    """
    return _Paper(ends, lanes, choice).run(tasks, in_turn=in_turn)


class _Paper:
    """The state of both ends at one moment of a schedule."""

    def __init__(self, ends: Ends, lanes: int, choice: Choice) -> None:
        self._ends = ends
        self._lanes = lanes
        self._choice = choice
        self._outbound, self._link = ends.outbound, ends.link
        self._inbound = {name: host.inbound for name, host in ends.destinations.items()}
        self._links = {name: host.link for name, host in ends.destinations.items()}
        self._free = {name: host.free_bytes for name, host in ends.destinations.items()}
        self._groups: dict[tuple[str, str | None], int] = defaultdict(int)
        self._clashes = 0
        self._now_ns = 0
        self._running: list[tuple[int, int, Placed]] = []
        self._placed: list[Placed] = []

    def run(self, tasks: Sequence[Task], *, in_turn: bool) -> Schedule:
        """Start and end tasks until none is left that can start."""
        waiting, left = list(tasks), list[Task]()
        while waiting:
            waiting = self._start(waiting, in_turn=in_turn)
            if self._running:
                self._end_next()
            elif waiting:  # both ends are idle, so nothing but memory keeps the first one from starting
                left.append(waiting.pop(0))
        hosts = {one.host for one in self._placed}
        fullest = max(map(self._used, hosts), default=0.0)
        return Schedule(tuple(self._placed), tuple(left), self._lanes, self._clashes, fullest)

    def _start(self, waiting: list[Task], *, in_turn: bool) -> list[Task]:
        """Start what can start now. Returns the others."""
        left: list[Task] = []
        for number, task in enumerate(waiting):
            if not self._outbound or not self._link or (in_turn and left):
                return [*left, *waiting[number:]]
            found = self._best(task)
            if found is None:
                left.append(task)
            else:
                self._place(task, *found)
        return left

    def _best(self, task: Task) -> tuple[str, int] | None:
        """The host that a task starts to now, and its rate; None when none can take it yet."""
        share = task.share(self._ends.link, self._lanes)
        if share > self._link:
            return None
        able = [(host, rate) for host in task.hosts if (rate := self._rate(task, host, share))]
        best = min(able, key=lambda found: self._rank(task, *found), default=None)
        if best is None or self._choice is not Choice.PATIENT:
            return best
        ends_ns = self._now_ns + task.cost(best[1]).total_ns
        return None if any(self._sooner(task, host, share, ends_ns) for host in task.hosts) else best

    def _sooner(self, task: Task, host: str, share: int, ends_ns: int) -> bool:
        """Whether a task would end before ``ends_ns`` at a host that cannot take it now, at its full rate there."""
        rate = min(share, self._ends.destinations[host].link)
        if self._links[host] >= rate and self._inbound[host]:
            return False  # it can take it now, or never
        if self._free[host] < task.guest.memory_bytes or self._group(task, host):
            return False
        free_at_ns = min(one.end_ns for _, _, one in self._running if one.host == host)
        return free_at_ns + task.cost(rate).total_ns < ends_ns

    def _rate(self, task: Task, host: str, share: int) -> int:
        """The rate at which a task could start to a host now, 0 for not at all."""
        if not self._inbound[host] or self._free[host] < task.guest.memory_bytes:
            return 0
        rate = min(share, self._links[host])
        if 2 * rate < min(share, self._ends.destinations[host].link):
            return 0  # a fuller share, a little later, is sooner done
        return rate if rate and (task.doubtful or task.cost(rate).fits) else 0

    def _rank(self, task: Task, host: str, rate: int) -> tuple[float, float, str]:
        group = float(self._group(task, host))
        match self._choice:
            case Choice.SPREAD:
                return group, self._used(host), host
            case Choice.FAST | Choice.PATIENT:
                return group, float(task.cost(rate).total_ns), host
            case Choice.TIGHT:
                return group, float(self._free[host]), host

    def _group(self, task: Task, host: str) -> int:
        """Guests of the task's group at a host."""
        return task.groups.get(host, 0) + self._groups[host, task.guest.group] if task.guest.group else 0

    def _used(self, host: str) -> float:
        """The share of a host's memory that is used."""
        return 1 - self._free[host] / max(1, self._ends.destinations[host].memory_bytes)

    def _place(self, task: Task, host: str, rate: int) -> None:
        one = Placed(task, host, rate, self._now_ns)
        self._clashes += self._group(task, host)
        self._groups[host, task.guest.group] += 1
        self._free[host] -= task.guest.memory_bytes
        self._inbound[host] -= 1
        self._links[host] -= rate
        self._outbound -= 1
        self._link -= rate
        self._placed.append(one)
        heapq.heappush(self._running, (one.end_ns, len(self._placed), one))

    def _end_next(self) -> None:
        """Go on to the next end, and give back slots and links."""
        self._now_ns, _, one = heapq.heappop(self._running)
        self._inbound[one.host] += 1
        self._links[one.host] += one.rate
        self._outbound += 1
        self._link += one.rate
