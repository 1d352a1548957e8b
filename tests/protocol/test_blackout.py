"""The budget of a blackout, instant by instant.

0 ms stop asked        100 ms limit
|--- counted ---|=== held, not counted ===|--- counted ---|
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.blackout import (
    TICK_NS,
    VOTE_NS,
    DestinationBudget,
    SourceBudget,
    SourceReserves,
    destination_reserve_ns,
)
from protocol.budget import DowntimeCount
from protocol.handover import DestinationEvent, SourceEvent
from protocol.messages import Limits

MS = 1_000_000
T0 = 7_000 * MS
ns = st.integers(0, 10_000 * MS)


def limits(downtime_ms: int, switchover_ms: int = 0, *, abort: bool = True) -> Limits:
    return Limits(downtime_limit_ns=downtime_ms * MS, switchover_limit_ns=switchover_ms * MS, switchover_abort=abort)


def source_budget(
    rule: Limits | None = None, *, commit_ms: int = 10, own_resume_ms: int = 5, t0_ns: int = T0
) -> SourceBudget:
    budget = SourceBudget(rule or limits(100), SourceReserves(commit_ms * MS, own_resume_ms * MS))
    budget.stop_asked(t0_ns)
    return budget


def destination_budget(rule: Limits | None = None, *, claim_ms: int = 40, own_resume_ms: int = 5) -> DestinationBudget:
    return DestinationBudget(rule or limits(100), own_resume_ms * MS, DowntimeCount(claim_ms * MS, T0))


class TestSource:
    def test_a_hold_is_not_counted_while_it_lasts_nor_after(self) -> None:
        budget = source_budget()
        budget.hold_begins(T0 + 10 * MS)
        assert budget.counted_ns(T0 + 60 * MS) == 10 * MS
        assert budget.held_ns == 0, "a hold has a length once it ended"
        budget.hold_ends(T0 + 70 * MS)
        assert budget.held_ns == 60 * MS
        assert budget.counted_ns(T0 + 75 * MS) == 15 * MS

    def test_the_end_of_a_hold_that_never_began_changes_nothing(self) -> None:
        budget = source_budget()
        budget.hold_ends(T0 + 70 * MS)
        assert budget.counted_ns(T0 + 75 * MS) == 75 * MS

    @given(st.lists(st.tuples(ns, ns), max_size=4), ns)
    def test_counted_and_held_time_are_all_the_time(self, phases: list[tuple[int, int]], last: int) -> None:
        budget, now_ns, counted_ns = source_budget(), T0, 0
        for counting, holding in phases:
            now_ns += counting
            budget.hold_begins(now_ns)
            now_ns += holding
            budget.hold_ends(now_ns)
            counted_ns += counting
        now_ns += last
        assert budget.counted_ns(now_ns) == counted_ns + last
        assert budget.counted_ns(now_ns) + budget.held_ns == now_ns - T0

    @pytest.mark.parametrize(
        ("at_ns", "patience_ns", "overdue_ns"),
        [
            (0, 95 * MS, None),
            (1, 94 * MS, None),  # rather early than late
            (94 * MS, 1 * MS, None),
            (94 * MS + 1, 0, -MS + 1),  # a timer cannot wait for less than a millisecond: it is time now
            (95 * MS, 0, 0),
            (97 * MS, 0, 2 * MS),
        ],
    )
    def test_the_deadline_in_whole_milliseconds(self, at_ns: int, patience_ns: int, overdue_ns: int | None) -> None:
        budget = source_budget()
        assert budget.deadline_ns == 95 * MS
        assert budget.patience_ns(T0 + at_ns) == patience_ns
        assert budget.overdue_ns(T0 + at_ns) == overdue_ns

    @given(ns, ns, ns)
    def test_a_timer_that_rings_when_it_was_set_for_finds_the_deadline_due(
        self, limit: int, reserve: int, at: int
    ) -> None:
        rule = Limits(downtime_limit_ns=limit, switchover_limit_ns=0, switchover_abort=True)
        budget = SourceBudget(rule, SourceReserves(0, reserve))
        budget.stop_asked(T0)
        patience_ns = budget.patience_ns(T0 + at)
        assert patience_ns is not None
        assert patience_ns % TICK_NS == 0
        assert budget.overdue_ns(T0 + at + patience_ns) is not None

    def test_a_hold_moves_the_deadline(self) -> None:
        budget = source_budget()
        budget.hold_begins(T0 + 20 * MS)
        assert budget.overdue_ns(T0 + 5_000 * MS) is None
        budget.hold_ends(T0 + 5_000 * MS)
        assert budget.patience_ns(T0 + 5_000 * MS) == 75 * MS

    def test_without_enforcement_there_is_no_deadline_and_late_is_in_time(self) -> None:
        budget = source_budget(limits(100, abort=False))
        assert budget.deadline_ns is None
        assert budget.patience_ns(T0) is None
        assert budget.overdue_ns(T0 + 10_000 * MS) is None
        assert budget.judge_ready(1, 1, T0 + 10_000 * MS).event is SourceEvent.READY_IN_TIME

    @pytest.mark.parametrize(
        ("at_ns", "event"), [(90 * MS, SourceEvent.READY_IN_TIME), (90 * MS + 1, SourceEvent.READY_LATE)]
    )
    def test_ready_needs_room_for_commit_and_resume(self, at_ns: int, event: SourceEvent) -> None:
        assert source_budget().judge_ready(5, 5, T0 + at_ns).event is event

    def test_the_tolerance_counts_and_the_sentence_says_all_figures(self) -> None:
        verdict = source_budget(limits(60, 40)).judge_ready(5, 5, T0 + 93 * MS)
        assert verdict.reason == (
            "the switchover did not fit its limit of 100 ms: READY came after 93.0 ms and the rest needs up to 10.0 ms"
        )

    def test_another_digest_is_late_whatever_the_time(self) -> None:
        verdict = source_budget(limits(100, abort=False)).judge_ready(5, 6, T0)
        assert verdict.event is SourceEvent.READY_LATE
        assert verdict.reason == "the destination's memory digest differs from the source's"

    def test_without_a_digest_any_will_do(self) -> None:
        assert source_budget().judge_ready(5, None, T0) == source_budget().judge_ready(5, 5, T0)

    def test_no_vote_in_time(self) -> None:
        verdict = source_budget().no_vote("Finish", T0 + 96 * MS)
        assert verdict.event is SourceEvent.DEADLINE
        assert verdict.reason == (
            "the switchover did not fit its limit of 100 ms: after 96.0 ms in phase Finish the destination has not "
            "voted"
        )


class TestDestination:
    def test_the_reserve_is_vote_legs_and_the_slower_resume(self) -> None:
        assert destination_reserve_ns(4 * MS, 5 * MS, 0) == VOTE_NS + 9 * MS
        assert destination_reserve_ns(4 * MS, 5 * MS, 8 * MS) == VOTE_NS + 12 * MS
        budget = destination_budget()
        budget.set_terms(limits(100), 8 * MS)
        assert budget.reserve_ns(4 * MS) == destination_reserve_ns(4 * MS, 5 * MS, 8 * MS)

    def test_the_time_that_remains(self) -> None:
        budget = destination_budget()
        assert budget.remaining_ns(2 * MS, T0) == 100 * MS - 40 * MS - 10 * MS
        assert budget.patience_ns(2 * MS, T0 + 1) == 49 * MS, "rather early than late"
        assert budget.patience_ns(2 * MS, T0 + 60 * MS) == 0

    def test_downtime_replaces_the_limits_of_hello(self) -> None:
        budget = destination_budget(limits(50))
        assert budget.vote(1, 1, 2 * MS, T0).event is DestinationEvent.LIMIT
        budget.set_terms(limits(100), 0)
        assert budget.vote(1, 1, 2 * MS, T0).event is DestinationEvent.LOADED

    def test_limits_that_are_not_enforced_have_no_deadline(self) -> None:
        budget = destination_budget(limits(1, abort=False))
        assert budget.remaining_ns(0, T0 + 1_000 * MS) is None
        assert budget.patience_ns(0, T0 + 1_000 * MS) is None
        assert budget.vote(1, 1, 0, T0 + 1_000 * MS).event is DestinationEvent.LOADED

    @pytest.mark.parametrize(
        ("at_ns", "event"), [(50 * MS - 1, DestinationEvent.LOADED), (50 * MS, DestinationEvent.LIMIT)]
    )
    def test_equal_to_the_limit_is_over(self, at_ns: int, event: DestinationEvent) -> None:
        vote = destination_budget().vote(1, 1, 2 * MS, T0 + at_ns)
        assert vote.event is event
        assert (vote.cause == "limit") is (event is DestinationEvent.LIMIT)

    def test_the_sentence_over_the_limit(self) -> None:
        assert destination_budget().over_limit(2 * MS, T0 + 55 * MS).reason == (
            "the downtime limit of 100 ms cannot be kept: 95.0 ms have passed and READY, COMMIT and the resume need up "
            "to 10.0 ms more"
        )

    def test_unequal_copies_are_a_fault_even_when_it_is_late(self) -> None:
        vote = destination_budget().vote(0xAB, 0xCD, 2 * MS, T0 + 1_000 * MS)
        assert (vote.event, vote.cause) == (DestinationEvent.FAULT, "digest")
        assert vote.reason == (
            "the memory digest is 00000000000000ab here and 00000000000000cd on the source: the copies are not equal"
        )

    def test_without_a_digest_nothing_is_compared(self) -> None:
        assert destination_budget().vote(None, 0xCD, 2 * MS, T0).event is DestinationEvent.LOADED
