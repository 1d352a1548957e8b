"""The plan of a job: which guest goes where, in which order, with which share of the link, and when it will be there.

    for each number of lanes, order and way to choose a destination: a schedule on paper (migrated.fleet.schedule)
    keep the one that leaves the fewest guests, keeps groups apart, ends first, spreads best

A migration gets a share of the source's link, half of it with two lanes, and keeps to it, so that what is predicted
for it holds whatever runs beside it. A guest that would not converge within a lane gets the widest share that it needs,
at most the whole link, and then goes alone. The figures are those of ``migrated.fleet.costs``.

Which of all schedules is best is a hard problem; these tries come close to it (a test compares them with an exhaustive
search).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Final, NamedTuple

from migrated.fleet.costs import MoveCost, limit_of
from migrated.fleet.mirror import Mirror, link_of
from migrated.fleet.model import GuestDocument, HostDocument, JobSpec
from migrated.fleet.placement import PossibleHosts, group_at
from migrated.fleet.schedule import Choice, Destination, Ends, Placed, Schedule, Task, schedule
from protocol.units import format_duration_ns

_MOST_LANES: Final = 8
_HOSTS_CONSIDERED: Final = 32
"""Destinations that a guest chooses from, or as many as there are guests; a fleet has more."""
_EFFORT: Final = 60_000
"""Looks of a guest at a host in all tries together, about."""
_LEAST_TRIES: Final = 6
_AS_GOOD: Final = 1.05
"""A schedule that ends within this of the first counts as equally long, and the better spread decides."""
_IMPROVED: Final = 8
"""How many schedules are changed to see whether that makes them better."""
_OTHER_HOSTS: Final = 4
"""To how many other hosts a guest is sent to see whether that ends earlier."""


@dataclass(frozen=True, slots=True)
class Move:
    """One migration of a plan. Times are since the begin of the job.

    Attributes:
        bytes_per_s: its share of the link.
        cost: what is expected of it.
        doubt: a sentence when it is not expected to converge, else empty.
    """

    guest: str
    destination: str
    bytes_per_s: int
    begin_ns: int
    cost: MoveCost
    doubt: str = ""

    @property
    def end_ns(self) -> int:
        """When it will be over."""
        return self.begin_ns + self.cost.total_ns


@dataclass(frozen=True, slots=True)
class Plan:
    """The moves in the order of their begin.

    Attributes:
        refusals: a sentence for each guest that cannot move.
        lanes: into how many shares the source's link is divided.
    """

    moves: tuple[Move, ...]
    refusals: dict[str, str]
    lanes: int = 1

    @property
    def total_ns(self) -> int:
        """When the last one will be over."""
        return max((move.end_ns for move in self.moves), default=0)

    def late(self, deadline_ns: int) -> tuple[Move, ...]:
        """The moves that a deadline is too short for."""
        return tuple(move for move in self.moves if deadline_ns and move.end_ns > deadline_ns)


_ORDERS: Final[tuple[Callable[[Task, int], int], ...]] = (
    lambda task, share: -task.cost(share).total_ns,  # the longest first, so that none is left over at the end
    lambda task, share: -task.guest.memory_bytes,  # the largest first, while there is room for it
    lambda task, share: task.cost(share).total_ns,  # the shortest first
)


def plan(mirror: Mirror, spec: JobSpec) -> Plan:
    """Plan a job: the moves of all its guests, as far as they can move."""
    refusals: dict[str, str] = {}
    names, source = guests_of(mirror, spec), mirror.hosts.get(spec.host)
    if source is None:
        gone = f"The host {spec.host} is not there: its daemon holds no lease."
        return Plan((), dict.fromkeys(names, gone))
    if not source.max_outbound:
        return Plan((), dict.fromkeys(names, f"The host {spec.host} allows no outbound migrations."))
    tasks = []
    possible = PossibleHosts(mirror, spec.host, spec.to)
    for name in names:
        guest = mirror.guests.get(name)
        if guest is None:
            refusals[name] = f"Nothing is known of {name} but its owner: its host has not described it yet."
            continue
        hosts, refusal = possible.of(guest)
        if hosts:
            tasks.append(_task(mirror, guest, source, hosts[: max(_HOSTS_CONSIDERED, len(names))], spec))
        else:
            refusals[name] = refusal
    best = _best(_ends(mirror, source, spec, tasks), tasks) if tasks else Schedule()
    for task in best.left:
        refusals[task.guest.name] = (
            f"The hosts that could take {task.guest.name} have no memory left for it once the other guests are there."
        )
    return Plan(tuple(_move(one) for one in best.placed), refusals, best.lanes)


def guests_of(mirror: Mirror, spec: JobSpec) -> list[str]:
    """The guests of a job that are still on its host, in the order of their names."""
    owned = mirror.by_owner.get(spec.host, set())
    return sorted(owned.intersection(spec.guests) if spec.guests else owned)


def _task(mirror: Mirror, guest: GuestDocument, source: HostDocument, hosts: list[HostDocument], spec: JobSpec) -> Task:
    """Return a guest with the hosts that it chooses from."""
    task = Task(guest, limit_of(guest, spec.downtime_limit_ns), [host.name for host in hosts], group_at(mirror, guest))
    task.doubtful = not any(task.cost(rate).fits for rate in {min(link_of(source), link_of(host)) for host in hosts})
    return task


def _free_inbound(mirror: Mirror, host: HostDocument) -> int:
    return host.max_inbound - len(mirror.slots_of(host.name).arriving)


def _ends(mirror: Mirror, source: HostDocument, spec: JobSpec, tasks: list[Task]) -> Ends:
    """Return the slots and link shares that both ends have to give. Slots and shares that other jobs hold are left out
    where some remain; times count from when those have ended where none do."""
    held = mirror.slots_of(source.name)
    outbound = source.max_outbound - len(held.outbound)
    outbound = outbound if outbound > 0 else source.max_outbound
    destinations = {}
    for name in {name for task in tasks for name in task.hosts}:
        host = mirror.hosts[name]
        inbound = _free_inbound(mirror, host)
        destinations[name] = Destination(
            inbound if inbound > 0 else host.max_inbound,
            _room(link_of(host), mirror.slots_of(name).inbound_bytes_per_s),
            mirror.free_bytes(host),
            host.memory_bytes,
        )
    return Ends(
        min(outbound, spec.max_parallel) if spec.max_parallel else outbound,
        _room(link_of(source), held.outbound_bytes_per_s),
        destinations,
    )


def _room(link: int, promised: int) -> int:
    """Return the free share of a link, or all of it when nearly none is free."""
    return link - promised if 4 * promised < 3 * link else link


class _Try(NamedTuple):
    """The input of a schedule: the tasks in their order, and the rules by which they start."""

    tasks: list[Task]
    lanes: int
    choice: Choice
    in_turn: bool

    def made(self, ends: Ends) -> Schedule:
        """The schedule."""
        return schedule(ends, self.tasks, lanes=self.lanes, choice=self.choice, in_turn=self.in_turn)


def _best(ends: Ends, tasks: list[Task]) -> Schedule:
    """Return the best of the schedules that are tried, and of the changed ones that come from the first among them; or
    the first that ends about as early as any could."""
    looks = len(tasks) * max(len(task.hosts) for task in tasks)
    tries = max(_LEAST_TRIES, _EFFORT // looks)
    enough_ns = int(_AS_GOOD * _least_ns(ends, tasks))
    found: list[tuple[Schedule, _Try]] = []
    for one in islice(_tries(ends, tasks), tries):
        found.append((one.made(ends), one))
        if _rank(*found[-1]) <= (0, 0, enough_ns):
            return found[-1][0]
    found.sort(key=lambda pair: _rank(*pair))
    found += [_improved(ends, made, one, tries // _IMPROVED) for made, one in found[:_IMPROVED]]
    best = min(_rank(made, one) for made, one in found)
    as_good = ((made, one) for made, one in found if _rank(made, one) <= (*best[:2], int(_AS_GOOD * best[2])))
    return min(as_good, key=lambda pair: (pair[0].fullest, pair[0].total_ns))[0]


def _least_ns(ends: Ends, tasks: list[Task]) -> int:
    """Return about the least time in which the tasks can end: as long as the longest takes, as the slots need for all,
    and as the source's link does. Shares in between those that are planned with are left out."""
    lanes = range(1, min(_MOST_LANES, ends.outbound, len(tasks)) + 1)
    links = {ends.destinations[host].link for task in tasks for host in task.hosts}
    rates = {min(ends.link // lane, link) for lane in lanes for link in links}
    longest_ns = all_ns = link_ns = 0
    for task in tasks:
        costs = {rate: task.cost(rate) for rate in rates}
        able = {rate: cost.total_ns for rate, cost in costs.items() if cost.fits or task.doubtful}
        quickest_ns = min(able.values(), default=0)
        longest_ns = max(longest_ns, quickest_ns)
        all_ns += quickest_ns
        link_ns += min((rate * total_ns // ends.link for rate, total_ns in able.items()), default=0)
    return max(longest_ns, all_ns // ends.outbound, link_ns)


def _rank(made: Schedule, _one: _Try) -> tuple[int, int, int]:
    """Fewest guests left, then groups kept apart, then the earliest end."""
    return len(made.left), made.clashes, made.total_ns


def _tries(ends: Ends, tasks: list[Task]) -> Iterator[_Try]:
    """Tries, the most promising ones first."""
    lanes = range(1, min(_MOST_LANES, ends.outbound, len(tasks)) + 1)
    for in_turn, choice, order, count in product((False, True), Choice, _ORDERS, reversed(lanes)):
        ordered = sorted(tasks, key=lambda task: (order(task, ends.link // count), task.guest.name))
        yield _Try(ordered, count, choice, in_turn)


def _improved(ends: Ends, best: Schedule, one: _Try, tries: int) -> tuple[Schedule, _Try]:
    """Send one guest elsewhere, or first, those that end last before others, as long as that makes it better."""
    better = True
    while better and tries > 0:
        better = False
        for changed in islice(_changes(ends, best, one), tries):
            tries -= 1
            made = changed.made(ends)
            if _rank(made, changed) < _rank(best, one):
                best, one, better = made, changed, True
                break
    return best, one


def _changes(ends: Ends, made: Schedule, one: _Try) -> Iterator[_Try]:
    """The same try with one guest bound to another host, one of the fastest that it can go to; or with one in front."""
    for last in sorted(made.placed, key=lambda placed: -placed.end_ns):
        rest = [task for task in one.tasks if task is not last.task]
        yield one._replace(tasks=[last.task, *rest])
        others = sorted(set(last.task.hosts) - {last.host}, key=lambda host: (-ends.destinations[host].link, host))
        for host in others[:_OTHER_HOSTS]:
            bound = replace(last.task, hosts=[host])
            yield one._replace(tasks=[bound if task is last.task else task for task in one.tasks])
            yield one._replace(tasks=[bound, *rest])


def _move(one: Placed) -> Move:
    cost = one.task.cost(one.rate)
    doubt = ""
    if not cost.fits:
        doubt = (
            f"{one.task.guest.name} is not expected to converge even alone on the link: its downtime may reach "
            f"{format_duration_ns(cost.bound_ns)}, its limit is {format_duration_ns(one.task.limit_ns)}."
        )
    return Move(one.task.guest.name, one.host, one.rate, one.begin_ns, cost, doubt)
