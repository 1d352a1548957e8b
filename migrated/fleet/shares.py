"""The paces of first rounds, out of the shares of links that lie idle.

    setting-up    nothing is sent: its share lies idle
    first-round   one after the other: the first to begin takes all that lies idle, the others wait at a slow pace
    later         keeps to its share, as it was promised: these rounds show what the blackout will cost

A first round moves most of the data and decides nothing, so its pace may change at any moment. Of two that share a link
evenly both end late; one after the other they move as much in the same time, and while the second one sends, the
migration after the first is set up. Both ends of a link are minded: at the destination, migrations from other hosts
keep what they were promised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from migrated.fleet.mirror import Mirror, link_of
from migrated.record.terms import Stage

_WAITING: Final = 8
"""A first round that waits for another one sends at this part of its share, so that its connections stay alive."""


class Promised(NamedTuple):
    """One migration away from a host, with the share of the links that it was promised (bytes per second)."""

    destination: str
    bytes_per_s: int
    stage: Stage


def first_round_paces(mirror: Mirror, source: str, migrations: Mapping[str, Promised]) -> dict[str, int]:
    """Return how fast each migration in its first round is to send now (bytes per second).

    Args:
        source: the host that they leave.
        migrations: all those that it has begun, by their ids, the first to begin first.
    """
    here = mirror.hosts.get(source)
    left = link_of(here) if here is not None else 0
    left_at = {one.destination: _left_at(mirror, source, one.destination) for one in migrations.values()}
    first = {name: one for name, one in migrations.items() if one.stage == "first-round"}
    for one in migrations.values():
        taken = {"setting-up": 0, "first-round": one.bytes_per_s // _WAITING, "later": one.bytes_per_s}[one.stage]
        left -= taken
        left_at[one.destination] -= taken
    paces = {}
    for name, one in first.items():
        more = max(0, min(left, left_at[one.destination]))
        left -= more
        left_at[one.destination] -= more
        paces[name] = max(1, one.bytes_per_s // _WAITING + more)
    return paces


def _left_at(mirror: Mirror, source: str, destination: str) -> int:
    """The part of a destination's link that migrations from other hosts leave, 0 for one that is not there."""
    there = mirror.hosts.get(destination)
    if there is None:
        return 0
    return link_of(there) - sum(one.bytes_per_s for one in mirror.slots_of(destination).arriving if one.peer != source)
