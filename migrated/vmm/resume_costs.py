"""Durations of resumes on this host beyond the VMM's own estimate: the journal, the call, and the time until a busy
host wakes the waiting threads. Every resume is measured, at home after an abort and abroad after a COMMIT, and an upper
quantile of that is reserved from the downtime limit.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from migrated.vmm.seam import ExpectedCosts

_VERSION: Final = 1
_KEPT: Final = 64
_DRIVERS_KEPT: Final = 16
_QUANTILE: Final = 0.95
_MOST_OF_LIMIT: Final = 10
"""One part in so many of the limit is kept back at most for stalls: a host that stalled once must not abort all that
follows."""
_MOST_NS: Final = 10_000_000_000
"""No resume that is kept counts as longer: a bound of what a file can say."""


def _recent() -> deque[int]:
    return deque(maxlen=_KEPT)


class ResumeCosts:
    """The resumes of one host; ``document`` and ``read`` keep them over a restart.

    Args:
        guessed_ns: reserve for a guest whose costs are guessed, until a resume was measured (ns).
    """

    def __init__(self, guessed_ns: int) -> None:
        self._guessed_ns = guessed_ns
        self._over_ns = _recent()
        """Excess over the expected cost (ns), for VMMs that rehearsed it."""
        self._whole_ns: defaultdict[str, deque[int]] = defaultdict(_recent)
        """Whole resumes of guests whose costs were not tried, by driver."""
        self._commit_over_ns = _recent()
        """Excess of COMMIT legs and resumes on destinations over what was expected of them (ns)."""

    def add(self, driver: str, took_ns: int, expected: ExpectedCosts) -> None:
        """Remember one resume: its duration from the moment it was due, and the VMM's expectation."""
        if expected.basis == "tried":
            self._over_ns.append(max(0, took_ns - expected.resume_ns))
        else:
            self._whole_ns[driver].append(took_ns)

    def add_commit(self, took_ns: int, expected_ns: int) -> None:
        """Remember how long it took from a COMMIT until the guest ran on the destination, and what was expected."""
        self._commit_over_ns.append(max(0, took_ns - expected_ns))

    def expected_ns(self, driver: str, expected: ExpectedCosts) -> int:
        """Return what a resume in the VMM will most likely take (ns), never 0 where the VMM did not rehearse it: the
        VMM's figure, or the median of what resumes took on this host where that is more.

        Args:
            driver: of the guest.
            expected: its costs.
        """
        if expected.basis == "tried":
            return expected.resume_ns
        if seen := self._whole_ns[driver]:
            return max(expected.resume_ns, _quantile(seen, 0.5))
        return expected.resume_ns or self._guessed_ns

    def reserve_ns(self, driver: str, expected: ExpectedCosts, limit_ns: int) -> int:
        """Return the part of a limit to reserve so that the guest runs again within it (ns).

        Args:
            driver: of the guest.
            expected: its costs; the duration of calls stands in while no resume was measured on this host.
            limit_ns: the whole limit.

        Returns:
            The expected cost of the resume, and no less than the reserve for guesses before the first was measured;
            plus an upper quantile of the measured excess, bounded by a part of the limit.
        """
        most_over_ns = limit_ns // _MOST_OF_LIMIT
        reserve_ns, over_ns = self.expected_ns(driver, expected), expected.call_ns
        if expected.basis == "tried":
            if self._over_ns:
                over_ns = max(over_ns, _quantile(self._over_ns, _QUANTILE))
        elif seen := self._whole_ns[driver]:
            middle_ns = _quantile(seen, 0.5)
            reserve_ns = max(reserve_ns, middle_ns + min(_quantile(seen, _QUANTILE) - middle_ns, most_over_ns))
        else:
            reserve_ns = max(reserve_ns, self._guessed_ns)
        return reserve_ns + min(over_ns, most_over_ns)

    def commit_reserve_ns(self, driver: str, expected: ExpectedCosts, committed_ns: int, limit_ns: int) -> int:
        """Return the part of a limit to reserve for a COMMIT leg and the resume on the destination (ns).

        Args:
            driver: of the guest.
            expected: its costs here. What is reserved here beyond the expected resume stands in for the excess until a
                COMMIT was measured.
            committed_ns: the longest of the recent round trips, and the destination's own word for the resume.
            limit_ns: the whole limit; a part of it bounds the measured excess.
        """
        if self._commit_over_ns:
            over_ns = min(_quantile(self._commit_over_ns, _QUANTILE), limit_ns // _MOST_OF_LIMIT)
        else:
            over_ns = self.reserve_ns(driver, expected, limit_ns) - self.expected_ns(driver, expected)
        return committed_ns + over_ns

    def document(self) -> dict[str, Any]:
        """Return the measured costs as JSON values (ns)."""
        return {
            "version": _VERSION,
            "over": list(self._over_ns),
            "whole": {driver: list(taken) for driver, taken in self._whole_ns.items() if taken},
            "commit_over": list(self._commit_over_ns),
        }

    def read(self, document: Mapping[str, Any]) -> None:
        """Take up what ``document`` gave.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is no such document.
        """
        if document["version"] != _VERSION:
            raise ValueError(f"resume costs of version {document['version']} cannot be read")
        over, commit_over = _durations(document["over"]), _durations(document["commit_over"])
        whole = {str(driver): _durations(taken) for driver, taken in document["whole"].items()}
        self._over_ns.extend(over)
        self._commit_over_ns.extend(commit_over)
        for driver, taken in list(whole.items())[:_DRIVERS_KEPT]:
            self._whole_ns[driver].extend(taken)


def _durations(values: Iterable[Any]) -> list[int]:
    """Durations from a file (ns), each within sensible limits.

    Raises:
        ValueError, TypeError: they are none.
    """
    return [min(max(int(value), 0), _MOST_NS) for value in values]


def _quantile(values: Iterable[int], share: float) -> int:
    ranked = sorted(values)
    return ranked[math.ceil(share * len(ranked)) - 1]
