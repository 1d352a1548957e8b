"""Documents of the fleet about this host and its guests: computed from what they are given."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from migrated.fleet.model import MAX_CURVE_POINTS, CurvePoint, Forecast, GuestDocument
from migrated.member.local import LocalGuest
from migrated.record.model import Record
from protocol.guest import PAGE_SIZE

_TELLING_BYTES: Final = 8 << 20
"""A round smaller than this measures the round trip, not the link."""
MEASURED: Final = frozenset({"completed", "aborted"})
"""Outcomes of attempts whose rounds say something."""


def link_bytes_per_s(newest_first: Sequence[Record]) -> int:
    """Return the throughput of a host's link, by the rounds of its migrations (bytes per second); 0 while none has
    shown it. Those that ran at the same time shared it. One whose bandwidth was capped can only show that the link is
    faster than was thought."""
    rates = [(record, _fastest_round(record)) for record in reversed(newest_first)]
    speed = 0
    for record, rate in rates:
        if rate:
            together = int(sum(other_rate for other, other_rate in rates if _ran_together(record, other)))
            capped = record.parameters.max_bandwidth_bytes_per_s > 0
            speed = max(speed, together) if capped else together
    return speed


def _fastest_round(record: Record) -> float:
    return max((row.bandwidth_bytes_per_s for row in record.rounds if row.bytes >= _TELLING_BYTES), default=0.0)


def _ran_together(one: Record, other: Record) -> bool:
    """Whether two attempts overlapped for most of the shorter one; each overlaps itself."""
    begins = [datetime.fromisoformat(record.started_at).timestamp() for record in (one, other)]
    ends = [begin + record.total_ns / 1e9 for begin, record in zip(begins, (one, other), strict=True)]
    return 2 * (min(ends) - max(begins)) >= min(one.total_ns, other.total_ns) / 1e9


def forecast(record: Record) -> Forecast | None:
    """Return the expected cost of moving a guest, by its last migration; None when that shows nothing."""
    if record.outcome not in MEASURED or not record.rounds:
        return None
    first, *later = record.rounds
    points = sorted((row.ns, row.dirty_pages) for row in later if row.ns > 0)
    dirty = tuple(CurvePoint(ns=ns, pages=pages) for ns, pages in points[-MAX_CURVE_POINTS:])
    fixed_ns = margin_ns = 0
    if (downtime := record.downtime) is not None:
        last_ns = 0
        if first.bandwidth_bytes_per_s > 0:
            last_ns = int(record.ram.downtime_pages * PAGE_SIZE * 1e9 / first.bandwidth_bytes_per_s)
        fixed_ns = max(0, downtime.measured_ns - last_ns)
        if downtime.predicted_upper_ns is not None and downtime.predicted_ns is not None:
            margin_ns = max(0, downtime.predicted_upper_ns - downtime.predicted_ns)
    return Forecast(
        data_bytes=first.bytes, setup_ns=record.setup_ns, dirty=dirty, fixed_ns=fixed_ns, margin_ns=margin_ns
    )


def guest_document(
    guest: LocalGuest,
    downtime_limit_ns: int,
    last: Record | None,
    groups: Sequence[str],
    cpu_features: tuple[str, ...],
) -> GuestDocument:
    """Return a guest's requirements of a host.

    Args:
        last: the record of its last migration.
        groups: patterns of names; guests of one are kept apart.
        cpu_features: of this host: a QEMU guest may use each, so its next host must have them all.
    """
    return GuestDocument(
        name=guest.name,
        vmm=guest.vmm,
        memory_bytes=guest.memory_bytes,
        downtime_limit_ns=downtime_limit_ns,
        group=next((pattern for pattern in groups if fnmatch.fnmatchcase(guest.name, pattern)), None),
        cpu_features=cpu_features if guest.vmm == "qemu" else (),
        forecast=forecast(last) if last is not None else None,
    )
