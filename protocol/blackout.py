"""The budget of one blackout on each side: which time counts, when the deadline is, and how that decides the vote.

    source       stop -> [held by the operator: not counted] -> DOWNTIME ... STATE_END -> READY: commit or take back
    destination             DOWNTIME: the count and the limits -> load -> the vote: READY or NO

Neither object reads a clock: every method is given the instant ``now_ns`` on its own host's monotonic clock. This
module says which event happened, with a sentence that gives the reason; ``protocol.handover`` decides what the event
means for the guest. The plain arithmetic of limits and reserves is in ``protocol.budget``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from protocol.budget import (
    DowntimeCount,
    abort_limit_ns,
    destination_remaining_ns,
    may_commit,
    source_deadline_ns,
)
from protocol.handover import DestinationEvent, SourceEvent
from protocol.messages import Limits, NoCause

TICK_NS: Final = 1_000_000
"""The event loop's timers count whole milliseconds."""
MAX_INSTANT_NS: Final = (1 << 63) - 1
VOTE_NS: Final = 3_000_000
"""Kept back for the vote itself: timers count whole milliseconds on both hosts, and a vote is journaled before it is
sent."""


def _whole_ticks(remaining_ns: int) -> int:
    """Return the delay of a timer for this much time (ns): whole milliseconds, rounded so that it fires early, never
    late."""
    return max(0, remaining_ns // TICK_NS) * TICK_NS


@dataclass(frozen=True, slots=True)
class SourceReserves:
    """The parts of the limit that the source reserves (ns).

    Attributes:
        commit_ns: for the COMMIT leg and the destination's resume.
        own_resume_ns: for the own resume after an abort.
    """

    commit_ns: int
    own_resume_ns: int


@dataclass(frozen=True, slots=True)
class SourceVerdict:
    """The hand-over event for the destination's answer, or for its absence. ``reason`` is set when the event ends the
    attempt."""

    event: SourceEvent
    reason: str | None


@dataclass(slots=True)
class SourceBudget:
    """The source's side of one blackout.

    Attributes:
        limits: the budget, fixed from here on: the destination is told it with every DOWNTIME.
        reserves: the parts of it that are reserved.
        t0_ns: instant of the stop request; the downtime begins here.
        held_ns: how long the operator held the switchover (pause-before-switchover); a hold that still lasts is not in
            it.
    """

    limits: Limits
    reserves: SourceReserves
    t0_ns: int = field(default=0, init=False)
    held_ns: int = field(default=0, init=False)
    _holding_since_ns: int | None = field(default=None, init=False)

    def stop_asked(self, now_ns: int) -> None:
        """Note that the stop is requested now: the downtime begins."""
        self.t0_ns = now_ns

    @property
    def deadline_ns(self) -> int | None:
        """Counted downtime up to which the source waits for the vote (ns); None when the limit is not enforced."""
        return source_deadline_ns(self.limits, self.reserves.own_resume_ns)

    def hold_begins(self, now_ns: int) -> None:
        """Note that the operator's hold begins: time does not count until it ends."""
        self._holding_since_ns = now_ns

    def hold_ends(self, now_ns: int) -> None:
        """Note that the operator lets the switchover go on."""
        if self._holding_since_ns is not None:
            self.held_ns += now_ns - self._holding_since_ns
            self._holding_since_ns = None

    def counted_ns(self, now_ns: int) -> int:
        """The downtime so far that counts against the limit: without what the operator held (ns)."""
        holding_ns = now_ns - self._holding_since_ns if self._holding_since_ns is not None else 0
        return now_ns - self.t0_ns - self.held_ns - holding_ns

    def patience_ns(self, now_ns: int) -> int | None:
        """Return how long a timer may wait for the vote from now on (ns, whole milliseconds); None: nothing limits the
        wait."""
        if (deadline_ns := self.deadline_ns) is None:
            return None
        return _whole_ticks(deadline_ns - self.counted_ns(now_ns))

    def overdue_ns(self, now_ns: int) -> int | None:
        """Return the time since the deadline passed (ns), None when it has not passed.

        The deadline counts as passed up to one millisecond early (the result is then negative), because timers of the
        event loop count whole milliseconds.
        """
        if (deadline_ns := self.deadline_ns) is None:
            return None
        late_ns = self.counted_ns(now_ns) - deadline_ns
        return late_ns if late_ns > -TICK_NS else None

    def commit_by_ns(self, now_ns: int) -> int:
        """The instant until which a decision to commit that is being carried out may take: later, COMMIT would not
        leave its own time and that of the resume, or giving up not that of the source's resume (ns, MAX_INSTANT_NS when
        nothing is enforced)."""
        if (deadline_ns := self.deadline_ns) is None:
            return MAX_INSTANT_NS
        latest_ns = min(deadline_ns, abort_limit_ns(self.limits) - self.reserves.commit_ns)
        return now_ns + latest_ns - self.counted_ns(now_ns)

    def judge_ready(self, destination_digest: int, source_digest: int | None, now_ns: int) -> SourceVerdict:
        """Judge READY: commit if the copies are equal and the rest of the budget covers the remaining steps.

        Args:
            destination_digest: the digest of guest memory that READY carries.
            source_digest: the source's own, None when this migration keeps none.
        """
        if source_digest is not None and destination_digest != source_digest:
            return SourceVerdict(SourceEvent.READY_LATE, "the destination's memory digest differs from the source's")
        counted_ns = self.counted_ns(now_ns)
        if may_commit(self.limits, counted_ns, self.reserves.commit_ns):
            return SourceVerdict(SourceEvent.READY_IN_TIME, None)
        return SourceVerdict(
            SourceEvent.READY_LATE,
            f"{self._did_not_fit()}: READY came after {counted_ns / 1e6:.1f} ms and the rest needs up to "
            f"{self.reserves.commit_ns / 1e6:.1f} ms",
        )

    def no_vote(self, phase: str, now_ns: int) -> SourceVerdict:
        """Return the verdict when the deadline passed without a vote.

        Args:
            phase: what the source was doing, for the sentence.
        """
        return SourceVerdict(
            SourceEvent.DEADLINE,
            f"{self._did_not_fit()}: after {self.counted_ns(now_ns) / 1e6:.1f} ms in phase {phase} the destination "
            "has not voted",
        )

    def _did_not_fit(self) -> str:
        return f"the switchover did not fit its limit of {abort_limit_ns(self.limits) / 1e6:g} ms"


def destination_reserve_ns(round_trip_ns: int, own_resume_ns: int, source_resume_ns: int) -> int:
    """Return an upper bound of the time after the destination's vote (ns): the READY leg, the COMMIT leg and the
    resume, here or, after a NO, on the source. The vote itself is included, so that a NO reaches the source before the
    source's own deadline.

    Args:
        round_trip_ns: upper bound of a round trip between the hosts, as known now.
        own_resume_ns: time that the destination keeps back for its VMM's resume.
        source_resume_ns: time that the source reserves for its own resume, 0 until DOWNTIME states it.
    """
    return VOTE_NS + round_trip_ns + max(own_resume_ns, source_resume_ns)


@dataclass(frozen=True, slots=True)
class Vote:
    """The destination's vote. ``cause`` and ``reason`` explain a NO and are empty for LOADED."""

    event: DestinationEvent
    cause: NoCause
    reason: str | None


@dataclass(slots=True)
class DestinationBudget:
    """The destination's side of one blackout, made when the first message that carries the source's downtime is read.

    Attributes:
        limits: HELLO's, until DOWNTIME replaces them.
        own_resume_ns: what the destination keeps back for its VMM's resume.
        count: the downtime so far by the destination's count.
        source_resume_ns: what the source keeps back for its own resume, 0 until DOWNTIME says it.
    """

    limits: Limits
    own_resume_ns: int
    count: DowntimeCount
    source_resume_ns: int = 0

    def set_terms(self, limits: Limits, source_resume_ns: int) -> None:
        """Take the limits and the source's resume reserve from a DOWNTIME message: an operator may have changed the
        limits since HELLO."""
        self.limits, self.source_resume_ns = limits, source_resume_ns

    def reserve_ns(self, round_trip_ns: int) -> int:
        """Return an upper bound of the time after the vote (ns); see ``destination_reserve_ns``."""
        return destination_reserve_ns(round_trip_ns, self.own_resume_ns, self.source_resume_ns)

    def remaining_ns(self, round_trip_ns: int, now_ns: int) -> int | None:
        """Return how long the destination may still load before it must vote NO (ns): 0 or less when the vote is
        overdue, None when the limit is not enforced."""
        return destination_remaining_ns(self.limits, self.count.now(now_ns), self.reserve_ns(round_trip_ns))

    def patience_ns(self, round_trip_ns: int, now_ns: int) -> int | None:
        """Return the delay of the deadline's timer from now on (ns, whole milliseconds); None: there is no deadline.
        The caller sets the timer anew after every message that carries the source's downtime."""
        remaining_ns = self.remaining_ns(round_trip_ns, now_ns)
        return None if remaining_ns is None else _whole_ticks(remaining_ns)

    def vote(self, own_digest: int | None, source_digest: int, round_trip_ns: int, now_ns: int) -> Vote:
        """Vote, once all state is in place.

        Args:
            own_digest: the digest of guest memory here, None when this migration keeps none.
            source_digest: the one that STATE_END carries.

        Returns:
            LOADED (vote READY), FAULT with the cause "digest", or LIMIT.
        """
        if own_digest is not None and own_digest != source_digest:
            return Vote(
                DestinationEvent.FAULT,
                "digest",
                f"the memory digest is {own_digest:016x} here and {source_digest:016x} on the source: the copies are "
                "not equal",
            )
        remaining_ns = self.remaining_ns(round_trip_ns, now_ns)
        if remaining_ns is not None and remaining_ns <= 0:
            return self.over_limit(round_trip_ns, now_ns)
        return Vote(DestinationEvent.LOADED, "fault", None)

    def over_limit(self, round_trip_ns: int, now_ns: int) -> Vote:
        """Return the vote NO for a deadline that passed."""
        return Vote(
            DestinationEvent.LIMIT,
            "limit",
            f"the downtime limit of {abort_limit_ns(self.limits) / 1e6:g} ms cannot be kept: "
            f"{self.count.now(now_ns) / 1e6:.1f} ms have passed and READY, COMMIT and the resume need up to "
            f"{self.reserve_ns(round_trip_ns) / 1e6:.1f} ms more",
        )
