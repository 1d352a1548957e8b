"""The rounds of a migration on paper: how long until a stop fits, and how much is then left to send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from migrated.prediction.bandwidth import DirtyCurve
from protocol.guest import PAGE_SIZE

_ROUND_OVERHEAD_NS: Final = 10_000_000
_MAX_ROUNDS: Final = 50
_SETTLED: Final = 0.96
"""A round that leaves more than this of what it sent brings nothing."""


class Played(NamedTuple):
    """The course of an attempt that was only played.

    Attributes:
        fits: a stop fits after the last round.
        dirty_pages: what is left to send at the stop.
        elapsed_ns: the time of all rounds.
    """

    fits: bool
    dirty_pages: int
    elapsed_ns: int
    rounds: int


def play(
    fits: Callable[[int], bool], bytes_per_s: Callable[[int], float], curve: DirtyCurve, data_bytes: int, scan_ns: int
) -> Played:
    """Simulate the rounds: one of length t leaves F(t) pages, which the next one sends, until a stop fits or less does
    not remain any more.

    Args:
        fits: whether a stop with so many dirty pages fits its limit.
        bytes_per_s: the rate at which so many bytes move.
        curve: F, the unique pages that the guest dirties within a time.
        data_bytes: what the first round sends.
        scan_ns: what one collection of the dirty log costs.
    """
    remaining, elapsed_ns, rounds = data_bytes, 0, 0
    while True:
        rounds += 1
        round_ns = int(remaining * 1e9 / max(1.0, bytes_per_s(remaining))) + _ROUND_OVERHEAD_NS + scan_ns
        elapsed_ns += round_ns
        dirty_pages = int(curve.pages_within(round_ns))
        fitted = fits(dirty_pages)
        settled = rounds > 1 and dirty_pages * PAGE_SIZE >= remaining * _SETTLED
        if fitted or settled or rounds == _MAX_ROUNDS:
            return Played(fitted, dirty_pages, elapsed_ns, rounds)
        remaining = dirty_pages * PAGE_SIZE
