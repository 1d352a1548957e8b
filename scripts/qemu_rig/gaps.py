"""Silences between beats: they show a stop as the guest noticed it, and whether two copies of it ever ran.

    QEMU a   b b b b b b|                     the last beat of a, the first of b: the gap
    QEMU b               |      b b b b b     every sequence number appears once, over all QEMUs

A guest that moves goes on counting where it was stopped. If a copy of it ran as well, both would say the same numbers;
that shows however the two are timed. If it went on from older memory, it would say numbers again too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from scripts.qemu_rig.console import Beat
from scripts.rig.waiting import RigError

_NEAR: Final = 300
"""Beats on one side of a move that are near it: the two clocks do not drift apart by what matters within them."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A silence: host times of the beats around it, and how much the guest's own clock went on meanwhile."""

    begin_ns: int
    end_ns: int
    guest_clock_ns: int

    @property
    def ns(self) -> int:
        """How long the host heard nothing."""
        return self.end_ns - self.begin_ns

    @property
    def stood_ns(self) -> int:
        """How much of it the guest's own clock did not go on: it was stopped. For the rest it ran and was slow to say
        so, as an emulated guest is whose code is translated anew where it arrives, or one that waits for a CPU."""
        return self.ns - self.guest_clock_ns


def largest_gap(beats: Sequence[Beat], begin_ns: int, end_ns: int) -> Gap:
    """The longest silence that has a part of it between the two host times.

    Args:
        beats: in the order of arrival, of one QEMU or merged by ``merged``.

    Raises:
        RigError: there are no two beats around or in that span.
    """
    gaps = [
        Gap(before.arrival_ns, after.arrival_ns, after.guest_ns - before.guest_ns)
        for before, after in pairwise(beats)
        if after.arrival_ns > begin_ns and before.arrival_ns < end_ns
    ]
    if not gaps:
        raise RigError("There are no beats around that moment, so no gap can be told.")
    return max(gaps, key=lambda gap: gap.ns)


def handover_gap(before: Sequence[Beat], after: Sequence[Beat]) -> Gap:
    """The silence between the last beat on one QEMU and the first on the next.

    Raises:
        RigError: one of them has none, or the second was heard before the first had ended: both ran.
    """
    if not before or not after:
        raise RigError("The guest did not beat on both sides of the move, so no gap can be told.")
    gap = Gap(before[-1].arrival_ns, after[0].arrival_ns, after[0].guest_ns - before[-1].guest_ns)
    if gap.ns < 0:
        raise RigError("The guest's second copy was heard before the first one was silent: both ran at once.")
    return gap


def clock_stood_ns(before: Sequence[Beat], after: Sequence[Beat]) -> int:
    """By how much the guest's clock fell behind the host's over a move: how long it was stopped.

    A beat is heard later than the guest read its clock, by its way through QEMU and by what an emulated guest, or one
    that waits for a CPU, takes to say it. Of many beats on a side one had little of that, so the least is taken.

    Raises:
        RigError: there are none on one side.
    """
    if not before or not after:
        raise RigError("The guest did not beat on both sides of the move, so it cannot be told how long it stood.")
    behind_ns = [min(beat.arrival_ns - beat.guest_ns for beat in side) for side in (before[-_NEAR:], after[:_NEAR])]
    return behind_ns[1] - behind_ns[0]


def merged(*sides: Sequence[Beat]) -> list[Beat]:
    """The beats of all QEMUs in the order of their arrival."""
    return sorted((beat for side in sides for beat in side), key=lambda beat: beat.arrival_ns)


def said_twice(*sides: Sequence[Beat]) -> list[int]:
    """Sequence numbers that were said more than once: two copies ran, or one went on from older memory."""
    counts = Counter(beat.sequence for side in sides for beat in side)
    return sorted(sequence for sequence, times in counts.items() if times > 1)
