"""The downtime budget at its edges."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.budget import (
    DowntimeCount,
    abort_limit_ns,
    destination_remaining_ns,
    may_commit,
    measured_downtime,
    source_deadline_ns,
)
from protocol.messages import Limits

MS = 1_000_000
ns = st.integers(0, 10_000 * MS)


def limits(downtime_ns: int, switchover_ns: int = 0, *, abort: bool = True) -> Limits:
    return Limits(downtime_limit_ns=downtime_ns, switchover_limit_ns=switchover_ns, switchover_abort=abort)


def test_a_limit_of_nothing_leaves_no_time() -> None:
    assert source_deadline_ns(limits(0), 5 * MS) == 0
    assert destination_remaining_ns(limits(0), 0, 0) == 0
    assert not may_commit(limits(0), 0, 1)


@given(ns, ns, ns, ns)
def test_limit_and_tolerance_are_one_budget(limit: int, tolerance: int, counted: int, reserve: int) -> None:
    split, whole = limits(limit, tolerance), limits(limit + tolerance)
    assert abort_limit_ns(split) == limit + tolerance
    assert destination_remaining_ns(split, counted, reserve) == destination_remaining_ns(whole, counted, reserve)
    assert source_deadline_ns(split, reserve) == source_deadline_ns(whole, reserve)
    assert may_commit(split, counted, reserve) is may_commit(whole, counted, reserve)


@pytest.mark.parametrize(
    ("elapsed_ns", "reserve_ns", "fits"),
    [
        (0, 0, True),
        (90 * MS, 10 * MS, True),
        (90 * MS, 10 * MS + 1, False),
        (90 * MS + 1, 10 * MS, False),
        (100 * MS, 0, True),
        (100 * MS, 1, False),
        (0, 100 * MS, True),
        (0, 100 * MS + 1, False),
    ],
)
def test_commit_needs_room_for_its_own_leg(elapsed_ns: int, reserve_ns: int, fits: bool) -> None:
    assert may_commit(limits(100 * MS), elapsed_ns, reserve_ns) is fits
    assert may_commit(limits(60 * MS, 40 * MS), elapsed_ns, reserve_ns) is fits
    assert may_commit(limits(100 * MS, abort=False), elapsed_ns, reserve_ns)


@given(ns, ns)
def test_at_its_deadline_the_source_still_has_its_resume_reserve(limit: int, reserve: int) -> None:
    deadline = source_deadline_ns(limits(limit), reserve)
    assert deadline is not None
    assert deadline >= 0
    assert deadline + reserve == max(limit, reserve)
    assert source_deadline_ns(limits(limit, abort=False), reserve) is None


@given(ns, ns, ns)
def test_the_destinations_time_ends_where_the_limit_would_be_reached(limit: int, counted: int, reserve: int) -> None:
    remaining = destination_remaining_ns(limits(limit), counted, reserve)
    assert remaining is not None
    assert counted + remaining + reserve == abort_limit_ns(limits(limit))
    assert destination_remaining_ns(limits(limit, abort=False), counted, reserve) is None


@given(
    st.lists(st.tuples(ns, ns, ns), min_size=1, max_size=6),
    ns,
)
def test_the_count_is_the_largest_claim_carried_forward(messages: list[tuple[int, int, int]], later: int) -> None:
    (source, transit, at), *rest = messages
    count = DowntimeCount(source + transit, at)
    heard = [(source, transit, at)]
    for source, transit, gap in rest:
        at += gap
        before = count.now(at)
        count.hear(source, transit, at)
        heard.append((source, transit, at))
        assert count.now(at) >= before, "a later message shortened the downtime"
    now = at + later
    assert count.now(now) == max(source + transit + now - at for source, transit, at in heard)


@given(ns, ns, ns, ns, ns, st.integers(-100_000, 100_000), st.integers(-100_000, 100_000))
def test_the_true_downtime_lies_in_the_interval(
    committed: int, there: int, resumed_after: int, tail: int, back: int, drift_here: int, drift_there: int
) -> None:
    """Transits, a resume and a wait in true time, each read on a clock that drifts."""

    def here(true_ns: int) -> int:
        return true_ns + true_ns * drift_here // 10**9

    def there_on_its_clock(true_ns: int) -> int:
        return true_ns + true_ns * drift_there // 10**9

    truth = committed + there + resumed_after
    interval = measured_downtime(
        here(committed),
        here(truth + tail + back),
        there_on_its_clock(resumed_after),
        there_on_its_clock(resumed_after + tail),
    )
    rounding = 6
    assert interval.lower_ns - rounding <= here(truth) <= interval.upper_ns + rounding
    drift = 4 * (resumed_after + tail) // 10_000
    assert interval.upper_ns - interval.lower_ns <= here(there + back) + drift + rounding
    assert interval.measured_ns == Fraction(interval.lower_ns + interval.upper_ns, 2) // 1


def test_without_drift_the_interval_is_the_two_transits() -> None:
    interval = measured_downtime(100, 1_000, 200, 500, rho_ppb=0)
    assert (interval.lower_ns, interval.upper_ns) == (300, 700)


def test_clocks_that_disagree_give_the_later_point() -> None:
    interval = measured_downtime(committed_ns=100, running_ns=170, resumed_after_ns=50, sent_after_ns=80, rho_ppb=0)
    assert (interval.lower_ns, interval.upper_ns) == (150, 150)


@given(ns, ns, st.integers(0, (1 << 63) - 1), st.integers(0, (1 << 63) - 1))
def test_a_destination_that_lies_moves_the_downtime_only_between_what_the_source_saw(
    committed: int, exchange: int, resumed_after: int, sent_after: int
) -> None:
    interval = measured_downtime(committed, committed + exchange, resumed_after, sent_after)
    assert committed <= interval.lower_ns <= interval.upper_ns <= committed + exchange
