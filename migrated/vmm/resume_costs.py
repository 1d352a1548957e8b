"""What it takes on this host to let a stopped guest run, beyond what its VMM says of itself: the journal, the call, and
until a busy host wakes those who wait. Measured whenever it happens here, and kept back from the downtime limit.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from migrated.vmm.base import DryRun

_KEPT: Final = 64
_QUANTILE: Final = 0.95
_MOST_OF_LIMIT: Final = 10
"""One part in so many of the limit is kept back at most: a host that stalled once must not abort all that follows."""


class ResumeCosts:
    """The resumes of one host."""

    def __init__(self) -> None:
        self._over_ns: deque[int] = deque(maxlen=_KEPT)

    def add(self, took_ns: int, expected_ns: int) -> None:
        """Remember one: how long it took from the moment it was due, and what the VMM had expected."""
        self._over_ns.append(max(0, took_ns - expected_ns))

    def reserve_ns(self, dry: DryRun, limit_ns: int) -> int:
        """What to keep back of a limit so that the guest runs again within it.

        Args:
            dry: the guest's; its calls tell of this host what no resume has told yet.
            limit_ns: the whole limit.

        Returns:
            The VMM's word, and an upper quantile of what came on top of it, bounded by a part of the limit.
        """
        over_ns = dry.call_ns
        if ranked := sorted(self._over_ns):
            over_ns = max(over_ns, ranked[math.ceil(_QUANTILE * len(ranked)) - 1])
        return dry.resume_ns + min(over_ns, limit_ns // _MOST_OF_LIMIT)
