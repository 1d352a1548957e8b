"""Duration of a round: setup + pages x cost + bytes x cost, fitted to the rounds of one attempt.

Bytes over bandwidth says little of a small round on a fast link: threads are woken, pages fault at the destination, a
barrier goes around. The rounds that an attempt has made show all of it. Those that are recent and of the size in
question weigh most; the fit is bounded (no cost is negative, nothing moves faster than was ever seen) and one odd round
does not bend it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

_ROUNDS_KEPT: Final = 32
_AGEING: Final = 0.85
"""Weight of a round in the fit, relative to the next later one."""
_ALIKE: Final = 1.5
"""By how many powers of e two rounds differ in size until one weighs a third of what it would."""
_UNLIKE: Final = 0.1
"""Weight of a round that went otherwise than the blackout will, once there is one that went so."""
_NOTHING_BYTES: Final = 64 << 10
_NOISE, _NOISE_NS = 0.08, 200_000.0
"""How far a round lies from its usual time: a share of it, and wake-ups."""
_SETUP_NS: Final = 700_000.0
_SETUP_SPREAD_NS: Final = 1_000_000.0
_PAGE_SPREAD_NS: Final = 3_000.0
_BYTE_SPREAD: Final = 0.5
_FITS: Final = 5
_HUBER: Final = 1.5
_FASTER: Final = 1.1
"""By how much a final round may be faster than the fastest that was seen."""
_UNKNOWN_SPREAD: Final = 0.15
_UNKNOWN_WORTH: Final = 2.0
_MIDDLE: Final = 0.68

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Expected duration of a round, and the usual deviation of a single one from it (ns)."""

    ns: int
    spread_ns: int


class RoundCosts:
    """The rounds of one attempt."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[int, int, int, bool]] = deque(maxlen=_ROUNDS_KEPT)

    def add(self, pages: int, size_bytes: int, ns: int, *, as_the_blackout: bool) -> None:
        """A round of ``pages`` and ``size_bytes``, device states counted, took ``ns`` to its acknowledgement.

        Args:
            as_the_blackout: whether its threads went before others, as in the blackout.
        """
        if ns > 0:
            self._rounds.append((pages, size_bytes, ns, as_the_blackout))

    def forget(self) -> None:
        """The link changed."""
        self._rounds.clear()

    def expect(self, pages: int, size_bytes: int, bytes_per_s: float) -> RoundTime:
        """Return the expected duration of a round and its spread; 0 for both while nothing is known.

        Args:
            bytes_per_s: the bandwidth of transfers of this size, which the fit starts from.
        """
        if not self._rounds or bytes_per_s <= 0:
            return RoundTime(0, 0)
        table = np.array(self._rounds, np.float64)
        features = np.column_stack((np.ones(len(table)), table[:, 0], table[:, 1]))
        ns = table[:, 2]
        ages = np.arange(len(table))[::-1]
        unlike = np.abs(np.log((table[:, 1] + _NOTHING_BYTES) / (size_bytes + _NOTHING_BYTES)))
        weights = np.asarray(_AGEING**ages * np.exp(-unlike / _ALIKE), np.float64)
        if (alike := table[:, 3] > 0).any():
            weights *= np.where(alike, 1.0, _UNLIKE)
        costs = _fit(features, ns, weights, 1e9 / bytes_per_s)
        fitted = features @ costs
        fastest = float((table[:, 1] / ns).max()) * _FASTER  # bytes per ns
        expected = max(float(np.array((1.0, pages, size_bytes)) @ costs), size_bytes / fastest if fastest else 0.0)
        off = np.abs(ns - fitted) / np.maximum(fitted, _NOISE_NS)
        order = np.argsort(off)
        cumulated = np.cumsum(weights[order])
        typical = float(off[order][np.searchsorted(cumulated, _MIDDLE * cumulated[-1])])
        known = float(cumulated[-1])
        share = (known * typical + _UNKNOWN_WORTH * _UNKNOWN_SPREAD) / (known + _UNKNOWN_WORTH)
        return RoundTime(int(expected), int(share * expected))


def _fit(features: Floats, ns: Floats, weights: Floats, byte_ns: float) -> Floats:
    """Costs of a setup, a page, a byte (ns), none negative, near to what is usual where the rounds do not tell."""
    start = np.array((_SETUP_NS, 0.0, byte_ns))
    ridge = np.array((_SETUP_SPREAD_NS, _PAGE_SPREAD_NS, _BYTE_SPREAD * byte_ns)) ** -2
    precision = weights / (_NOISE * ns + _NOISE_NS) ** 2
    costs: Floats = start
    for _ in range(_FITS):
        off = np.abs(ns - features @ costs) / (_NOISE * ns + _NOISE_NS)
        trusted = precision * np.minimum(1.0, _HUBER / np.maximum(off, 1e-9))
        costs = _least_squares(features, ns, trusted, start, ridge)
    return costs


def _least_squares(features: Floats, ns: Floats, precision: Floats, start: Floats, ridge: Floats) -> Floats:
    """Weighted least squares around ``start``; costs that came out negative are nothing, and the rest fits again."""
    free = np.ones(len(start), np.bool_)
    while True:
        costs = np.zeros(len(start))
        used = features[:, free]
        matrix = used.T @ (precision[:, None] * used) + np.diag(ridge[free])
        costs[free] = np.linalg.solve(matrix, used.T @ (precision * ns) + ridge[free] * start[free])
        negative = costs < 0
        if not negative.any():
            return costs
        free &= ~negative
        if not free.any():
            return np.zeros(len(start))
