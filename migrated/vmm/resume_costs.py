"""What it takes on this host to let a stopped guest run, beyond what its VMM says of itself: the journal, the call, and
until a busy host wakes those who wait. Measured whenever it happens here, and kept back from the downtime limit.
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
        guessed_ns: what to keep back where the costs of a guest are guessed, until something is known.
    """

    def __init__(self, guessed_ns: int) -> None:
        self._guessed_ns = guessed_ns
        self._over_ns = _recent()
        """What came on top of the expectation of VMMs that tried it."""
        self._whole_ns: defaultdict[str, deque[int]] = defaultdict(_recent)
        """Whole resumes of guests whose costs were guessed, by driver."""

    def add(self, driver: str, took_ns: int, expected: ExpectedCosts) -> None:
        """Remember one: how long it took from the moment it was due, and what the VMM had expected."""
        if expected.basis == "tried":
            self._over_ns.append(max(0, took_ns - expected.resume_ns))
        else:
            self._whole_ns[driver].append(took_ns)

    def expected_ns(self, driver: str, expected: ExpectedCosts, limit_ns: int) -> int:
        """What a resume in the VMM is counted with: its word where it tried, never 0 where it guessed.

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
        """What to keep back of a limit so that the guest runs again within it.

        Args:
            driver: of the guest.
            expected: its costs; their calls tell of this host what no resume has told yet.
            limit_ns: the whole limit.

        Returns:
            What the resume is counted with, and an upper quantile of what came on top of it, bounded by a part of the
            limit.
        """
        over_ns = expected.call_ns
        if self._over_ns and expected.basis == "tried":
            over_ns = max(over_ns, _quantile(self._over_ns, _QUANTILE))
        return self.expected_ns(driver, expected, limit_ns) + min(over_ns, limit_ns // _MOST_OF_LIMIT)


def _quantile(values: Iterable[int], share: float) -> int:
    ranked = sorted(values)
    return ranked[math.ceil(share * len(ranked)) - 1]
