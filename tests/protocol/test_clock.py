"""Clock exchanges against a simulated pair of drifting clocks whose truth is known exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.clock import (
    DEFAULT_RHO_PPB,
    ClockError,
    ClockExchange,
    ElapsedInterval,
    ExportExchange,
    FalsifiedStampsError,
    InconsistentClocksError,
    NoTransitBoundError,
    OffsetEstimate,
    OffsetInterval,
    one_way_transit,
)

MS = 1_000_000
SECOND = 1_000 * MS


class ClockQuality(TypedDict):
    """How well a simulated clock runs."""

    rho_ppb: int
    resolution_ns: int


EXACT: ClockQuality = {"rho_ppb": 0, "resolution_ns": 0}
# A shared machine may stall in the middle of an example.
unhurried = settings(deadline=None)
VECTOR = ExportExchange(t1=1000000, t2=500000000, exported_at=500010000, t3=500020000, t4=1130000, imported_at=1150000)


@dataclass(frozen=True)
class HostClock:
    """A host's monotonic clock as a function of true time: shifted, drifting, read in whole nanoseconds."""

    shift_ns: int
    drift_ppb: int

    def exact(self, true_ns: int) -> Fraction:
        return self.shift_ns + Fraction(true_ns * (10**9 + self.drift_ppb), 10**9)

    def read(self, true_ns: int) -> int:
        return int(self.exact(true_ns) // 1)


shifts = st.integers(-(1 << 62), 1 << 62)
drifts = st.integers(-DEFAULT_RHO_PPB, DEFAULT_RHO_PPB)
clocks = st.builds(HostClock, shifts, drifts)
transits = st.integers(0, 10 * SECOND)
pauses = st.integers(0, 10_000 * SECOND)


@st.composite
def exchanges(draw: st.DrawFn, local: HostClock, remote: HostClock, begin_ns: int = 0) -> tuple[ClockExchange, int]:
    """An honest exchange from true time ``begin_ns`` on, and the true time of its end."""
    asked = begin_ns + draw(st.integers(0, 100 * SECOND))
    heard = asked + draw(transits)
    answered = heard + draw(st.integers(0, SECOND))
    done = answered + draw(transits)
    return ClockExchange(local.read(asked), remote.read(heard), remote.read(answered), local.read(done)), done


@st.composite
def exports(draw: st.DrawFn) -> tuple[ExportExchange, int]:
    """An honest export exchange, and the true time from export to import."""
    destination, source = draw(clocks), draw(clocks)
    heard = draw(transits)
    exported = heard + draw(pauses)
    answered = exported + draw(pauses)
    replied = answered + draw(transits)
    imported = replied + draw(pauses)
    exchange = ExportExchange(
        t1=destination.read(0),
        t2=source.read(heard),
        exported_at=source.read(exported),
        t3=source.read(answered),
        t4=destination.read(replied),
        imported_at=destination.read(imported),
    )
    return exchange, imported - exported


@pytest.mark.parametrize(
    ("stamps", "lower", "upper"),
    [
        ((1000, 51500, 51510, 2010), 49_500, 50_500),
        ((1000, 51900, 51910, 2010), 49_900, 50_900),
    ],
)
def test_published_exchanges(stamps: tuple[int, int, int, int], lower: int, upper: int) -> None:
    exchange = ClockExchange(*stamps)
    assert exchange.delta_ns == 1000
    assert OffsetEstimate((exchange,), **EXACT).at(2010) == OffsetInterval(lower, upper)
    stepwise = OffsetEstimate((exchange,), rho_ppb=0, resolution_ns=1).at(2010)
    assert stepwise == OffsetInterval(lower - 1, upper + 1)


def test_both_published_exchanges_intersect() -> None:
    exchanges = (ClockExchange(1000, 51500, 51510, 2010), ClockExchange(1000, 51900, 51910, 2010))
    both = OffsetEstimate(exchanges, **EXACT).at(2010)
    assert both == OffsetInterval(49_900, 50_500)
    assert both.width_ns == 600


def test_published_export_exchange() -> None:
    interval = VECTOR.elapsed(**EXACT)
    assert interval == ElapsedInterval(30_000, 140_000)
    assert (interval.width_ns, interval.midpoint_ns, VECTOR.delta_ns) == (110_000, 85_000, 110_000)
    assert interval.error_ns(interval.midpoint_ns) == 55_000
    assert interval.error_ns(30_000) == interval.error_ns(140_000) == 110_000


def test_minimum_transits_narrow_the_published_exchange() -> None:
    assert VECTOR.elapsed(**EXACT, min_forward_ns=40_000, min_back_ns=20_000) == ElapsedInterval(50_000, 100_000)
    with pytest.raises(InconsistentClocksError):
        VECTOR.elapsed(**EXACT, min_forward_ns=100_000, min_back_ns=20_000)


def test_drift_terms_round_outwards() -> None:
    # T3 - S = 10 us, D - T4 = 20 us, D - T1 = 150 us, S - T2 = 10 us, each one step of the clock tighter or wider.
    assert VECTOR.elapsed(rho_ppb=100_000, resolution_ns=1) == ElapsedInterval(
        (9_999 + 19_999) * 10**9 // (10**9 + 10**5),
        -(-150_001 * 10**9 // (10**9 - 10**5)) - 9_999 * 10**9 // (10**9 + 10**5),
    )


def test_a_second_of_pause_costs_the_drift_of_one_clock_a_side() -> None:
    ideal = VECTOR.elapsed(**EXACT)
    paused = replace(VECTOR, imported_at=VECTOR.imported_at + SECOND)
    interval = paused.elapsed(rho_ppb=50_000)
    assert interval.lower_ns >= ideal.lower_ns + SECOND - 50_020
    assert interval.upper_ns <= ideal.upper_ns + SECOND + 50_020


@unhurried
@given(exports())
def test_the_truth_lies_in_the_interval(sample: tuple[ExportExchange, int]) -> None:
    exchange, truth = sample
    interval = exchange.elapsed()
    assert interval.lower_ns <= truth <= interval.upper_ns
    # As wide as the round trip, plus what the drift bound says for the time that was measured, plus clock steps.
    measured = exchange.imported_at - exchange.t1 + exchange.t3 - exchange.t2
    assert interval.width_ns <= exchange.delta_ns + 2 * DEFAULT_RHO_PPB * measured // (10**9 - DEFAULT_RHO_PPB) + 10


@unhurried
@given(exports(), shifts, shifts)
def test_shifting_either_clock_changes_nothing(
    sample: tuple[ExportExchange, int], on_destination: int, on_source: int
) -> None:
    exchange, _ = sample
    shifted = ExportExchange(
        t1=exchange.t1 + on_destination,
        t2=exchange.t2 + on_source,
        exported_at=exchange.exported_at + on_source,
        t3=exchange.t3 + on_source,
        t4=exchange.t4 + on_destination,
        imported_at=exchange.imported_at + on_destination,
    )
    assert shifted.elapsed() == exchange.elapsed()


@unhurried
@given(exports(), st.integers(-(1 << 63), 1 << 63), st.integers(0, 20 * SECOND), st.integers(0, 20 * SECOND))
def test_a_lying_source_stays_within_what_the_destination_measured(
    sample: tuple[ExportExchange, int], t2: int, to_export: int, to_reply: int
) -> None:
    exchange, _ = sample
    lie = replace(exchange, t2=t2, exported_at=t2 + to_export, t3=t2 + to_export + to_reply)
    try:
        interval = lie.elapsed(**EXACT)
    except FalsifiedStampsError:
        assert lie.delta_ns < 0
    else:
        assert interval.lower_ns >= lie.imported_at - lie.t4
        assert interval.upper_ns <= lie.imported_at - lie.t1


@pytest.mark.parametrize(
    "forged",
    [
        replace(VECTOR, exported_at=VECTOR.t2 - 1),
        replace(VECTOR, exported_at=VECTOR.t3 + 1),
        replace(VECTOR, t2=VECTOR.t3 + 1),
        replace(VECTOR, t3=VECTOR.t2 + (VECTOR.t4 - VECTOR.t1) + 1000),
        replace(VECTOR, t4=VECTOR.t1 - 1),
        replace(VECTOR, imported_at=VECTOR.t4 - 1),
        replace(VECTOR, t2=-(1 << 63), t3=(1 << 63) - 1),
    ],
)
def test_impossible_export_stamps_are_refused(forged: ExportExchange) -> None:
    with pytest.raises(FalsifiedStampsError):
        forged.elapsed()


@unhurried
@given(st.tuples(*[st.integers(-(1 << 64), 1 << 64)] * 6))
def test_no_export_stamps_give_anything_but_an_interval_or_a_clock_error(stamps: tuple[int, ...]) -> None:
    exchange = ExportExchange(*stamps)
    offset = (exchange.t1, exchange.t2, exchange.t3, exchange.t4)
    try:
        interval = exchange.elapsed(offset=OffsetEstimate((ClockExchange(*offset),)))
    except ClockError:
        return
    assert 0 <= interval.lower_ns <= interval.upper_ns


@unhurried
@given(st.data())
def test_the_true_offset_lies_in_every_estimate(data: st.DataObject) -> None:
    local, remote = data.draw(clocks), data.draw(clocks)
    samples, end = [], 0
    for _ in range(data.draw(st.integers(1, 6))):
        exchange, end = data.draw(exchanges(local, remote, end))
        samples.append(exchange)
    now = end + data.draw(pauses)
    truth = remote.exact(now) - local.exact(now)
    estimate = OffsetEstimate(tuple(samples))
    interval = estimate.at(local.read(now))
    assert interval.lower_ns <= truth <= interval.upper_ns

    assert OffsetEstimate(tuple(data.draw(st.permutations(samples)))).at(local.read(now)) == interval
    more = OffsetEstimate((*samples, data.draw(exchanges(local, remote, end))[0])).at(local.read(now))
    assert interval.lower_ns <= more.lower_ns <= more.upper_ns <= interval.upper_ns


def test_age_widens_by_the_drift_of_both_clocks() -> None:
    estimate = OffsetEstimate((ClockExchange(1000, 51500, 51510, 2010),), rho_ppb=100_000, resolution_ns=0)
    age = SECOND + 1010  # from the first stamp, the older one
    widening = -(-2 * 100_000 * age // (10**9 - 100_000))
    assert estimate.at(2010 + SECOND) == OffsetInterval(49_500 - widening, 50_500 + widening)


def test_exchanges_that_exclude_each_other_are_an_error() -> None:
    stepped = OffsetEstimate((ClockExchange(0, 500, 500, 1000), ClockExchange(2000, MS, MS, 3000)))
    with pytest.raises(InconsistentClocksError, match="2 clock exchanges exclude each other"):
        stepped.at(3000)
    # With enough age, drift alone explains the same stamps.
    assert stepped.at(3000 + 10 * SECOND).width_ns > 0


@pytest.mark.parametrize(
    "stamps",
    [
        (1000, 0, 0, 999),  # our clock ran backwards
        (1000, 60, 50, 2000),  # answered before it was asked
        (1000, 0, 2000, 2000),  # worked longer than the exchange took
        (0, -(1 << 63), (1 << 63) - 1, 1),
    ],
)
def test_impossible_exchanges_are_refused(stamps: tuple[int, int, int, int]) -> None:
    with pytest.raises(FalsifiedStampsError):
        OffsetEstimate((ClockExchange(*stamps),))


def test_a_negative_round_trip_within_drift_is_accepted() -> None:
    # Both transits were 0 and the remote clock is 200 ppm faster than ours, which two clocks of 100 ppm can be.
    exchange = ClockExchange(0, 0, SECOND + 200_000, SECOND)
    assert exchange.delta_ns < 0
    exchange.check(rho_ppb=100_000)
    with pytest.raises(FalsifiedStampsError):
        exchange.check(rho_ppb=90_000)


def test_earlier_samples_narrow_a_slow_export_exchange() -> None:
    destination, source = HostClock(0, 0), HostClock(7 * SECOND, 0)
    sample = ClockExchange(destination.read(0), source.read(50), source.read(60), destination.read(100))
    # The reply crawled: 400 ms of round trip, where the earlier sample knows the offset to a few hundred ns.
    slow = ExportExchange(
        t1=destination.read(MS),
        t2=source.read(2 * MS),
        exported_at=source.read(3 * MS),
        t3=source.read(3 * MS),
        t4=destination.read(402 * MS),
        imported_at=destination.read(403 * MS),
    )
    alone = slow.elapsed()
    together = slow.elapsed(offset=OffsetEstimate((sample,)))
    assert alone.width_ns > 399 * MS
    assert together.width_ns < MS // 2
    assert together.lower_ns <= 400 * MS <= together.upper_ns


@unhurried
@given(st.data())
def test_the_truth_lies_in_the_interval_with_earlier_samples(data: st.DataObject) -> None:
    destination, source = data.draw(clocks), data.draw(clocks)
    sample, end = data.draw(exchanges(destination, source))
    asked = end + data.draw(pauses)
    heard = asked + data.draw(transits)
    exported = heard + data.draw(transits)
    replied = exported + data.draw(transits)
    imported = replied + data.draw(pauses)
    exchange = ExportExchange(
        t1=destination.read(asked),
        t2=source.read(heard),
        exported_at=source.read(exported),
        t3=source.read(exported),
        t4=destination.read(replied),
        imported_at=destination.read(imported),
    )
    alone = exchange.elapsed()
    together = exchange.elapsed(offset=OffsetEstimate((sample,)))
    assert alone.lower_ns <= together.lower_ns <= imported - exported <= together.upper_ns <= alone.upper_ns


def test_samples_that_contradict_the_export_are_an_error() -> None:
    elsewhere = OffsetEstimate((ClockExchange(0, 9 * SECOND, 9 * SECOND, 1000),))
    with pytest.raises(InconsistentClocksError):
        VECTOR.elapsed(offset=elsewhere)


@unhurried
@given(st.data())
def test_the_true_transit_lies_in_its_bounds(data: st.DataObject) -> None:
    local, remote = data.draw(clocks), data.draw(clocks)
    sample, end = data.draw(exchanges(local, remote))
    asked = end + data.draw(pauses)
    sent = asked + data.draw(transits)
    received = sent + data.draw(transits)
    offset = OffsetEstimate((sample,)).at(local.read(received))
    known = one_way_transit(offset, remote.read(sent), local.read(received))
    fallback = one_way_transit(None, remote.read(sent), local.read(received), followed_local=local.read(asked))
    both = one_way_transit(offset, remote.read(sent), local.read(received), followed_local=local.read(asked))
    for lower, upper in (known, fallback, both):
        assert 0 <= lower <= received - sent <= upper
    assert fallback[0] == 0
    assert both == (known[0], min(known[1], fallback[1]))


def test_a_transit_without_any_bound_is_an_error() -> None:
    with pytest.raises(NoTransitBoundError):
        one_way_transit(None, 5, 10)


def test_a_message_from_the_future_is_refused() -> None:
    with pytest.raises(FalsifiedStampsError):
        one_way_transit(OffsetInterval(-10, 10), sent_at_remote=SECOND, received_at_local=0)
    with pytest.raises(FalsifiedStampsError):
        one_way_transit(None, sent_at_remote=0, received_at_local=0, followed_local=SECOND)


def test_an_understated_transit_is_capped_by_our_own_message() -> None:
    # The offset proves at least 1 s of transit, but our own message is only 1 ms old: the stamp is false.
    with pytest.raises(FalsifiedStampsError):
        one_way_transit(OffsetInterval(0, 10), 0, SECOND, followed_local=SECOND - MS)


def test_an_empty_or_negative_elapsed_interval_cannot_exist() -> None:
    for lower, upper in ((2, 1), (-1, 5)):
        with pytest.raises(InconsistentClocksError):
            ElapsedInterval(lower, upper)


@pytest.mark.parametrize(("rho_ppb", "resolution_ns"), [(-1, 1), (10**9, 1), (0, -1)])
def test_bounds_that_make_no_sense_are_refused(rho_ppb: int, resolution_ns: int) -> None:
    with pytest.raises(ValueError, match="rho_ppb"):
        VECTOR.elapsed(rho_ppb=rho_ppb, resolution_ns=resolution_ns)
    with pytest.raises(ValueError, match="rho_ppb"):
        one_way_transit(OffsetInterval(0, 0), 0, 0, rho_ppb=rho_ppb, resolution_ns=resolution_ns)


def test_an_estimate_needs_an_exchange() -> None:
    with pytest.raises(ValueError, match="at least one"):
        OffsetEstimate(())
