"""Durations of resumes on this host beyond the VMM's own estimate: the journal, the call, and the time until a busy
host wakes the waiting threads. Every resume is measured, and the result is reserved from the downtime limit.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Final

from migrated.vmm.seam import ExpectedCosts

_KEPT: Final = 64
_QUANTILE: Final = 0.95
_MOST_OF_LIMIT: Final = 10
"""One part in so many of the limit is kept back at most for stalls: a host that stalled once must not abort all that
follows."""


def _recent() -> deque[int]:
    return deque(maxlen=_KEPT)


class ResumeCosts:
    """The resumes of one host.

    Args:
        guessed_ns: reserve for a guest whose costs are guessed, until a resume was measured (ns).
    """

    def __init__(self, guessed_ns: int) -> None:
        self._guessed_ns = guessed_ns
        self._over_ns = _recent()
        """Excess over the expected cost (ns), for VMMs that rehearsed it."""
        self._whole_ns: defaultdict[str, deque[int]] = defaultdict(_recent)
        """Whole resumes of guests whose costs were not tried, by driver."""

    def add(self, driver: str, took_ns: int, expected: ExpectedCosts) -> None:
        """Remember one resume: its duration from the moment it was due, and the VMM's expectation."""
        if expected.basis == "tried":
            self._over_ns.append(max(0, took_ns - expected.resume_ns))
        else:
            self._whole_ns[driver].append(took_ns)

    def expected_ns(self, driver: str, expected: ExpectedCosts, limit_ns: int) -> int:
        """Return the expected cost of a resume in the VMM (ns): the VMM's figure where it rehearsed, never 0 where it
        did not.

        Args:
            driver: of the guest.
            expected: its costs.
            limit_ns: the whole downtime limit; it bounds how much one stall can add.
        """
        if expected.basis == "tried":
            return expected.resume_ns
        learned_ns = self._guessed_ns
        if seen := self._whole_ns[driver]:
            middle_ns = _quantile(seen, 0.5)
            learned_ns = middle_ns + min(_quantile(seen, _QUANTILE) - middle_ns, limit_ns // _MOST_OF_LIMIT)
        return max(expected.resume_ns, learned_ns)

    def reserve_ns(self, driver: str, expected: ExpectedCosts, limit_ns: int) -> int:
        """Return the part of a limit to reserve so that the guest runs again within it (ns).

        Args:
            driver: of the guest.
            expected: its costs; the duration of calls stands in while no resume was measured on this host.
            limit_ns: the whole limit.

        Returns:
            The expected cost of the resume, plus an upper quantile of the measured excess, bounded by a part of the
            limit.
        """
        over_ns = expected.call_ns
        if self._over_ns and expected.basis == "tried":
            over_ns = max(over_ns, _quantile(self._over_ns, _QUANTILE))
        return self.expected_ns(driver, expected, limit_ns) + min(over_ns, limit_ns // _MOST_OF_LIMIT)


def _quantile(values: Iterable[int], share: float) -> int:
    ranked = sorted(values)
    return ranked[math.ceil(share * len(ranked)) - 1]
