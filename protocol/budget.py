"""The downtime budget: limits, reserves, deadlines, and the interval that contains the downtime.

    t0 stop requested                                    abort limit = downtime limit + switchover limit
    |---- source ----|-- transit --|---- destination ----|- reserve -|

Everything is integer nanoseconds; the clocks are read by the caller. Each rule is written here once; both daemons, the
tests and the simulator use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.clock import DEFAULT_RHO_PPB
from protocol.messages import Limits

_PPB: Final = 1_000_000_000


def abort_limit_ns(limits: Limits) -> int:
    """Return the downtime at which the destination aborts (ns): the downtime limit plus the tolerance."""
    return limits.downtime_limit_ns + limits.switchover_limit_ns


def may_commit(limits: Limits, elapsed_ns: int, reserve_ns: int) -> bool:
    """Return whether the source may still commit: the rest of the budget must cover the COMMIT leg and the
    destination's resume.

    Args:
        elapsed_ns: since the stop was requested, on the source's clock.
        reserve_ns: upper bound of the COMMIT leg plus the destination's resume.
    """
    return not limits.switchover_abort or elapsed_ns + reserve_ns <= abort_limit_ns(limits)


def source_deadline_ns(limits: Limits, resume_reserve_ns: int) -> int | None:
    """Return the time after t0 at which the source stops waiting and resumes its guest, so that the guest runs within
    the limit (ns). None when the limit is not enforced."""
    if not limits.switchover_abort:
        return None
    return max(0, abort_limit_ns(limits) - resume_reserve_ns)


def destination_remaining_ns(limits: Limits, counted_ns: int, reserve_ns: int) -> int | None:
    """Return how long the destination may still load before it must vote NO.

    Args:
        counted_ns: the downtime as the destination counts it now (reported, plus transit, plus its own time).
        reserve_ns: upper bound of the READY leg, the COMMIT leg and its own resume.

    Returns:
        Nanoseconds, negative when the vote is overdue; None when the limit is not enforced.
    """
    if not limits.switchover_abort:
        return None
    return abort_limit_ns(limits) - reserve_ns - counted_ns


@dataclass(slots=True)
class DowntimeCount:
    """The downtime as the destination counts it: the largest claim seen, carried forward on its own clock.

    ``base_ns`` is the claim (source's figure plus the upper bound of its transit) that held at ``at_ns`` on the
    destination's clock.
    """

    base_ns: int
    at_ns: int

    def now(self, now_ns: int) -> int:
        """The count at ``now_ns`` of the destination's clock."""
        return self.base_ns + (now_ns - self.at_ns)

    def hear(self, source_downtime_ns: int, transit_upper_ns: int, now_ns: int) -> None:
        """Take a later DOWNTIME message into account: the larger count stands."""
        claim = source_downtime_ns + transit_upper_ns
        if claim > self.now(now_ns):
            self.base_ns, self.at_ns = claim, now_ns


@dataclass(frozen=True, slots=True)
class DowntimeInterval:
    """The final downtime on the source's clock. The destination resumed during the COMMIT exchange, so the true
    downtime lies between ``lower_ns`` and ``upper_ns``."""

    lower_ns: int
    upper_ns: int

    @property
    def measured_ns(self) -> int:
        """The middle of the interval, the figure of the record."""
        return (self.lower_ns + self.upper_ns) // 2


def measured_downtime(
    committed_ns: int,
    running_ns: int,
    resumed_after_ns: int,
    sent_after_ns: int,
    *,
    rho_ppb: int = DEFAULT_RHO_PPB,
) -> DowntimeInterval:
    """Bound the downtime from the COMMIT exchange.

    Args:
        committed_ns: when COMMIT was written, since t0, source's clock.
        running_ns: when RUNNING was read, since t0, source's clock.
        resumed_after_ns: from reading COMMIT to running vCPUs, destination's clock.
        sent_after_ns: from reading COMMIT to writing RUNNING, destination's clock.
        rho_ppb: bound of either clock's rate error. It matters when RUNNING came long after, out of doubt.

    The two transits are unknown but not negative, so the guest ran no earlier than ``committed + resumed_after`` and
    no later than ``running - (sent_after - resumed_after)``, each duration as short as the source's clock may have
    seen it. Whatever the destination says, it ran between the two instants that the source itself saw. Clocks that
    disagree beyond that give an empty interval; it is returned as the single later point.
    """

    def least(ns: int) -> int:
        return ns * (_PPB - rho_ppb) // (_PPB + rho_ppb)

    lower = min(committed_ns + least(resumed_after_ns), running_ns)
    upper = max(lower, running_ns - least(max(0, sent_after_ns - resumed_after_ns)))
    return DowntimeInterval(lower, upper)
