"""The cost of moving a guest with a share of the link: the rounds of its forecast, calculated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from migrated.fleet.model import Forecast, GuestDocument
from migrated.prediction.bandwidth import DirtyCurve
from migrated.prediction.play import play
from protocol.guest import PAGE_SIZE

_SHORTER: Final = 0.9
"""A downtime below this part of another one is worth a wider share of the link."""


class MoveCost(NamedTuple):
    """The expected cost of one migration.

    Attributes:
        total_ns: from the request to the end.
        downtime_ns, bound_ns: most likely downtime, and its upper bound.
        fits: the bound is below the limit; if not, the guest would not converge with this share.
    """

    total_ns: int
    downtime_ns: int
    bound_ns: int
    fits: bool


def limit_of(guest: GuestDocument, limit_ns: int | None) -> int:
    """The downtime limit of a migration (ns): the guest's own, or the job's where that is lower."""
    return guest.downtime_limit_ns if limit_ns is None else min(limit_ns, guest.downtime_limit_ns)


def move_cost(guest: GuestDocument, limit_ns: int, bytes_per_s: int) -> MoveCost:
    """The cost of moving a guest at a rate. A guest of which nothing is known moves all its memory once.

    Args:
        limit_ns: the downtime limit.
        bytes_per_s: its share of the link, above 0.
    """
    forecast = guest.forecast or Forecast(data_bytes=guest.memory_bytes)
    curve = DirtyCurve()
    for point in forecast.dirty:
        curve.add(point.ns, point.pages)

    def downtime_ns(dirty_pages: int) -> int:
        return forecast.fixed_ns + dirty_pages * PAGE_SIZE * 1_000_000_000 // bytes_per_s

    played = play(
        lambda dirty_pages: downtime_ns(dirty_pages) + forecast.margin_ns < limit_ns,
        lambda _size_bytes: float(bytes_per_s),
        curve,
        forecast.data_bytes,
        scan_ns=0,
    )
    stop_ns = downtime_ns(played.dirty_pages)
    return MoveCost(forecast.setup_ns + played.elapsed_ns + stop_ns, stop_ns, stop_ns + forecast.margin_ns, played.fits)


def narrowest_share(cost: Callable[[int], MoveCost], link: int, lanes: int) -> int:
    """Return the smallest share of a link with which a guest converges, not below a lane's. One that converges with
    none gets the whole link if that makes its downtime shorter, else a lane's share.

    Args:
        cost: of moving the guest at a rate (bytes per second).
        link: the link's throughput (bytes per second).
        lanes: into how many equal shares it is divided at most.
    """
    for lane in range(lanes, 0, -1):
        if cost(link // lane).fits:
            return link // lane
    helps = cost(link).bound_ns < _SHORTER * cost(link // lanes).bound_ns
    return link if helps else link // lanes
