"""The shortest plan of a small job, found by trying everything: what the planner is measured against.

Every order of the guests, with every destination and every share of the link for each: each starts as early as slots,
links and memory allow, and not before the one in front of it. One of these orders is that of a best plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import NamedTuple

from migrated.fleet.costs import limit_of, move_cost
from migrated.fleet.mirror import Mirror, link_of
from migrated.fleet.model import GuestDocument, HostDocument, JobSpec
from migrated.fleet.placement import PossibleHosts


class Option(NamedTuple):
    """One way to move a guest."""

    guest: str
    memory_bytes: int
    host: str
    rate: int
    ns: int


@dataclass(frozen=True)
class Best:
    """The shortest plan and how many were tried; ``total_ns`` is None when no plan moves all guests."""

    total_ns: int | None
    tried: int


def best_plan(mirror: Mirror, spec: JobSpec, guests: Sequence[str]) -> Best:
    """Try all plans that move all ``guests`` within their limits."""
    source = mirror.hosts[spec.host]
    options = [list(_options(mirror, spec, source, mirror.guests[name])) for name in guests]
    best, tried = None, 0
    for choice in product(*options):
        if not _has_room(mirror, choice):
            continue
        for order in permutations(choice):
            tried += 1
            total_ns = _total_ns(mirror, source, spec, order, best)
            if total_ns is not None:
                best = total_ns
    return Best(best, tried)


def _options(mirror: Mirror, spec: JobSpec, source: HostDocument, guest: GuestDocument) -> Iterator[Option]:
    hosts, _ = PossibleHosts(mirror, spec.host, spec.to).of(guest)
    for host in hosts:
        rates = {min(link_of(source) // lanes, link_of(host)) for lanes in range(1, source.max_outbound + 1)}
        for rate in sorted(rates):
            cost = move_cost(guest, limit_of(guest, spec.downtime_limit_ns), rate)
            if cost.fits:
                yield Option(guest.name, guest.memory_bytes, host.name, rate, cost.total_ns)


def _has_room(mirror: Mirror, choice: Sequence[Option]) -> bool:
    return all(
        sum(one.memory_bytes for one in choice if one.host == host) <= mirror.free_bytes(mirror.hosts[host])
        for host in {one.host for one in choice}
    )


def _total_ns(
    mirror: Mirror, source: HostDocument, spec: JobSpec, order: Sequence[Option], best_ns: int | None
) -> int | None:
    """The end of the last one; None when that is not before ``best_ns``."""
    outbound = min(source.max_outbound, spec.max_parallel or source.max_outbound)
    running: list[tuple[int, Option]] = []
    now_ns = last_ns = 0
    for one in order:
        host = mirror.hosts[one.host]
        while not (
            len(running) < outbound
            and sum(other.rate for _, other in running) + one.rate <= link_of(source)
            and sum(other.host == one.host for _, other in running) < host.max_inbound
            and sum(other.rate for _, other in running if other.host == one.host) + one.rate <= link_of(host)
        ):
            now_ns = max(now_ns, min(end_ns for end_ns, _ in running))
            running = [(end_ns, other) for end_ns, other in running if end_ns > now_ns]
        running.append((now_ns + one.ns, one))
        last_ns = max(last_ns, now_ns + one.ns)
        if best_ns is not None and last_ns >= best_ns:
            return None
    return last_ns
