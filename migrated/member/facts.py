"""Documents of the fleet about this host and its guests: computed from what they are given."""

from __future__ import annotations

import fnmatch
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from statistics import median
from typing import Final, NamedTuple

from pydantic import ValidationError

from migrated.fleet.mirror import UNKNOWN_LINK_BYTES_PER_S
from migrated.fleet.model import MAX_CURVE_POINTS, CurvePoint, Forecast, GuestDocument
from migrated.member.local import LocalGuest
from migrated.record.model import Record
from migrated.vmm.seam import KVM
from protocol.guest import PAGE_SIZE

_MOST_BYTES_PER_S: Final = 1 << 40
"""No link moves more. Figures of a round are its source's word, and this host may have been the destination."""
_TELLING_BYTES: Final = 8 << 20
"""A round smaller than this measures the round trip, not the link."""
_AS_FAST_AS_CAPPED: Final = 0.9
"""A round that reached this part of its cap was held back by it and not by the link."""
_ATTEMPTS_COUNTED: Final = 4
_ATTEMPTS_USUAL: Final = 9
MEASURED: Final = frozenset({"completed", "aborted"})
"""Outcomes of attempts whose rounds say something."""


def link_bytes_per_s(newest_first: Sequence[Record]) -> int:
    """Return the throughput of a host's link, by the rounds of its migrations (bytes per second); 0 while none has
    shown it.

    What counts is what all migrations together moved while a round ran, the most of the newest attempts: one that ran
    while the hosts were busy shows less than the link moves. A round that was as fast as its cap can only show that the
    link is faster than was thought.
    """
    attempts = [(record, _rounds_of(record)) for record in reversed(newest_first)]
    speed, shown = 0, deque[int](maxlen=_ATTEMPTS_COUNTED)
    for record, rounds in attempts:
        telling = [one for one in rounds if one.bytes >= _TELLING_BYTES]
        if not telling:
            continue
        together = max(_carried(one, attempts) for one in telling)
        cap = record.parameters.max_bandwidth_bytes_per_s
        if cap and max(one.rate for one in telling) >= _AS_FAST_AS_CAPPED * cap:
            speed = together if together > (speed or UNKNOWN_LINK_BYTES_PER_S) else speed
        else:
            shown.append(together)
            speed = max(shown)
    return speed


class _Round(NamedTuple):
    """A round on the wall clock of its source (s). ``seconds``: how long it took, which is above 0, however far off
    that clock is."""

    begin: float
    seconds: float
    bytes: int

    @property
    def end(self) -> float:
        """When it was over."""
        return self.begin + self.seconds

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds


def _rounds_of(record: Record) -> list[_Round]:
    """The rounds of an attempt, one after the other from the end of its setting up on."""
    begin = datetime.fromisoformat(record.started_at).timestamp() + record.setup_ns / 1e9
    rounds = []
    for row in record.rounds:
        begin += row.scan_ns / 1e9
        if row.ns > 0 and 0 <= row.bytes * 1_000_000_000 <= _MOST_BYTES_PER_S * row.ns:
            rounds.append(_Round(begin, row.ns / 1e9, row.bytes))
        begin += max(0, row.ns) / 1e9
    return rounds


def _carried(one: _Round, attempts: Sequence[tuple[Record, Sequence[_Round]]]) -> int:
    """Return the throughput of all attempts together while a round ran (bytes per second)."""
    moved = 0.0
    for _, rounds in attempts:
        if rounds and rounds[0].begin < one.end and rounds[-1].end > one.begin:
            for other in rounds:
                moved += other.rate * max(0.0, min(one.end, other.end) - max(one.begin, other.begin))
    return min(_MOST_BYTES_PER_S, int(moved / one.seconds))


def forecast(record: Record) -> Forecast | None:
    """Return the expected cost of moving a guest, by its last migration; None when that shows nothing, or its source
    told figures that none can have."""
    try:
        return _forecast(record)
    except (ValidationError, OverflowError):
        return None


def _forecast(record: Record) -> Forecast | None:
    if record.outcome not in MEASURED or not record.rounds:
        return None
    first, *later = record.rounds
    points = sorted((row.ns, row.dirty_pages) for row in later if row.ns > 0)
    dirty = tuple(CurvePoint(ns=ns, pages=pages) for ns, pages in points[-MAX_CURVE_POINTS:])
    fixed_ns = margin_ns = 0
    if (downtime := record.downtime) is not None:
        last_ns = 0
        rate = first.bandwidth_bytes_per_s
        if cap := record.parameters.max_bandwidth_bytes_per_s:
            rate = min(rate, cap)  # a first round may go faster, the blackout may not
        if rate > 0:
            last_ns = int(record.ram.downtime_pages * PAGE_SIZE * 1e9 / rate)
        fixed_ns = max(0, downtime.measured_ns - last_ns)
        if downtime.predicted_upper_ns is not None and downtime.predicted_ns is not None:
            margin_ns = max(0, downtime.predicted_upper_ns - downtime.predicted_ns)
    return Forecast(
        data_bytes=first.bytes, setup_ns=record.setup_ns, dirty=dirty, fixed_ns=fixed_ns, margin_ns=margin_ns
    )


def usual_forecast(newest_first: Sequence[Record]) -> Forecast | None:
    """Return the setup and the downtime of this host's last migrations, the median of each; None while there were none.
    It stands for guests that have not moved yet, without the memory that they will have to move."""
    found = [known for record in newest_first if (known := forecast(record)) is not None][:_ATTEMPTS_USUAL]
    if not found:
        return None
    setup_ns, fixed_ns, margin_ns = (
        int(median(values))
        for values in zip(*((one.setup_ns, one.fixed_ns, one.margin_ns) for one in found), strict=True)
    )
    return Forecast(data_bytes=0, setup_ns=setup_ns, fixed_ns=fixed_ns, margin_ns=margin_ns)


def guest_document(
    guest: LocalGuest,
    downtime_limit_ns: int,
    expected: Forecast | None,
    groups: Sequence[str],
    needs: frozenset[str],
    cpu_features: tuple[str, ...],
) -> GuestDocument:
    """Return a guest's requirements of a host.

    Args:
        expected: the expected cost of moving it, None while nothing shows it.
        groups: patterns of names; guests of one are kept apart.
        needs: what its next host must have of what not every host has.
        cpu_features: of this host: a guest under KVM may use each, so its next host must have them all.
    """
    return GuestDocument(
        name=guest.name,
        vmm=guest.vmm,
        memory_bytes=guest.memory_bytes,
        downtime_limit_ns=downtime_limit_ns,
        group=next((pattern for pattern in groups if fnmatch.fnmatchcase(guest.name, pattern)), None),
        devices=tuple(sorted(needs)),
        cpu_features=cpu_features if KVM in needs else (),
        forecast=expected,
    )
