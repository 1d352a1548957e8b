"""Figures of link and guest from the rounds so far: the bandwidth, and the curve of unique dirty pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Final

from migrated.prediction.rounds import RoundCosts, RoundTime
from protocol.guest import PAGE_SIZE

_ROUNDS_KEPT: Final = 32
_TELLING_BYTES: Final = 1 << 20
"""A round smaller than this measures the round trip, not the link."""


class Bandwidth:
    """Acknowledged bandwidth under load (bytes per second), from the rounds of one attempt."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[int, int, bool]] = deque(maxlen=_ROUNDS_KEPT)
        self._costs = RoundCosts()

    def add(self, pages: int, acknowledged_bytes: int, ns: int, *, as_the_blackout: bool = False) -> None:
        """A round of ``pages`` and ``acknowledged_bytes``, device states counted, took ``ns`` from its first byte to
        its acknowledgement.

        Args:
            as_the_blackout: whether its threads went before others, as in the blackout. Such rounds tell most of it.
        """
        if acknowledged_bytes > 0 and ns > 0:
            self._rounds.append((acknowledged_bytes, ns, as_the_blackout))
            self._costs.add(pages, acknowledged_bytes, ns, as_the_blackout=as_the_blackout)

    def forget(self) -> None:
        """Forget all rounds, because the cap on the bandwidth changed."""
        self._rounds.clear()
        self._costs.forget()

    def expect(self, pages: int, device_bytes: int) -> RoundTime:
        """Return the expected duration of a round of so many pages and bytes of device state; 0 ns while nothing is
        known."""
        size_bytes = pages * PAGE_SIZE + device_bytes
        return self._costs.expect(pages, size_bytes, self.for_bytes(size_bytes))

    @property
    def rehearsed(self) -> bool:
        """Whether any of the rounds went as the blackout will."""
        return any(alike for _, _, alike in self._rounds)

    def for_bytes(self, remaining_bytes: int) -> float:
        """Return the rate at which ``remaining_bytes`` would move (bytes per second): the median of the last three
        rounds that were not much smaller, and that went as the blackout will if any of them did. 0 before anything was
        acknowledged. While no round was large enough, the fastest there was: it is low, never high."""
        least_bytes = max(_TELLING_BYTES, remaining_bytes // 4)
        telling = [(size * 1e9 / ns, alike) for size, ns, alike in self._rounds if size >= least_bytes]
        rates = [rate for rate, alike in telling if alike] or [rate for rate, _ in telling]
        if rates:
            return float(median(rates[-3:]))
        return max((size * 1e9 / ns for size, ns, _ in self._rounds), default=0.0)

    @property
    def bytes_per_s(self) -> float:
        """The rate of large transfers, for display."""
        return self.for_bytes(0)


class DirtyCurve:
    """F(t): unique pages dirtied within t, as far as the rounds measured it.

    Every round is one point: its length, and the number of pages that were dirty at its end. The curve begins at the
    origin, is a straight line between points, and never falls. Beyond the longest round it stays at its highest value;
    while only one round is known, it goes on with the slope of that round.

    Where processors are few, a round that goes before others keeps the guest from writing: of such a round the curve
    believes only that so many pages are dirtied at least.
    """

    def __init__(self) -> None:
        self._points: deque[tuple[int, int]] = deque(maxlen=_ROUNDS_KEPT)
        self._least: deque[tuple[int, int]] = deque(maxlen=_ROUNDS_KEPT)

    def add(self, ns: int, pages: int, *, ahead: bool = False) -> None:
        """Add a round of ``ns`` in which the guest dirtied ``pages`` unique pages.

        Args:
            ahead: the round went before others.
        """
        if ns > 0:
            (self._least if ahead else self._points).append((ns, pages))

    def __len__(self) -> int:
        return len(self._points) + len(self._least)

    def pages_within(self, ns: int) -> float:
        """Return the number of unique pages that the guest would dirty within ``ns``."""
        points = sorted(self._points)
        higher = [point for point in self._least if point[1] > _on_the_curve(points, point[0])]
        return _on_the_curve(sorted(points + higher), ns)

    def pages_meanwhile(self, round_ns: int, ns: int, *, kept_to: int | None = None) -> int:
        """Return how many pages the guest dirties in the ``ns`` after a round of ``round_ns``.

        Args:
            kept_to: the pages that it dirtied in the round, where that went before others and kept it from writing
                more: it goes on as soon as it can.
        """
        written = self.pages_within(round_ns) if kept_to is None else kept_to
        return max(0, int(self.pages_within(round_ns + ns) - written))

    def reachable(self, memory_budget_ns: int, bandwidth_bytes_per_s: float, page_bytes: int, margin: float) -> bool:
        """Return whether rounds can get the remaining memory inside a budget: the guest dirties less within the budget
        than moves within it. "Dirty rate above bandwidth" is the wrong test: a bounded working set converges anyway."""
        movable = bandwidth_bytes_per_s * memory_budget_ns / 1e9
        return self.pages_within(memory_budget_ns) * page_bytes < movable * margin


def _on_the_curve(points: Sequence[tuple[int, int]], ns: int) -> float:
    """The pages within ``ns`` of the curve through ascending points."""
    if not points or ns <= 0:
        return 0.0
    before = (0, 0.0)
    highest = 0.0
    for length, pages in points:
        highest = max(highest, float(pages))
        if length >= ns:
            span = length - before[0]
            return before[1] + (highest - before[1]) * (ns - before[0]) / span if span else highest
        before = (length, highest)
    return before[1] * ns / before[0] if len(points) == 1 else before[1]
