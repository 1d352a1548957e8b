"""The link and the guest as the rounds of an attempt show them: bandwidth, what a round costs, the dirty curve."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrated.prediction.bandwidth import Bandwidth, DirtyCurve
from tests.migrated.predictions import MS


def test_bandwidth_counts_only_rounds_that_load_the_link() -> None:
    bandwidth = Bandwidth()
    assert bandwidth.bytes_per_s == 0
    bandwidth.add(25_600, 100 << 20, 100 * MS)
    for _ in range(10):
        bandwidth.add(2, 8 << 10, 2 * MS)  # the round trip, not the link
    assert bandwidth.for_bytes(4 << 20) == pytest.approx((100 << 20) / 0.1)


def test_bandwidth_before_any_large_round_is_low_never_invented() -> None:
    bandwidth = Bandwidth()
    bandwidth.add(16, 64 << 10, 2 * MS)
    assert bandwidth.for_bytes(1 << 30) == pytest.approx((64 << 10) / 0.002)


@given(st.lists(st.tuples(st.integers(1, 10**10), st.integers(0, 10**6)), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_dirty_curve_never_falls_and_begins_at_zero(points: list[tuple[int, int]]) -> None:
    curve = DirtyCurve()
    for ns, pages in points:
        curve.add(ns, pages)
    assert curve.pages_within(0) == 0
    samples = [curve.pages_within(t) for t in sorted(random.Random(1).sample(range(1, 2 * 10**10), 50))]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(samples))


def test_a_bounded_working_set_is_reachable_at_any_dirty_rate() -> None:
    """1,000 hot pages rewritten for ever at more than the link carries: within 100 ms only those 1,000 are dirty."""
    curve = DirtyCurve()
    for ns in (2000 * MS, 100 * MS, 50 * MS):
        curve.add(ns, 1000)
    link = 50e6  # bytes per second: 100 ms carry 5 MB, 1,000 pages are 4 MB
    assert curve.reachable(100 * MS, link, 4096, margin=1.0)
    assert not curve.reachable(30 * MS, link, 4096, margin=1.0)


def test_a_round_that_kept_the_guest_from_writing_does_not_make_it_look_idle() -> None:
    curve = DirtyCurve()
    curve.add(500 * MS, 2500)
    curve.add(20 * MS, 0, ahead=True)
    assert curve.pages_within(24 * MS) == pytest.approx(120)


def test_what_a_guest_was_kept_from_writing_travels_in_the_blackout() -> None:
    """A round of 20 ms found 1 page of the 100 that are written in that time; the stop comes 4 ms later."""
    curve = DirtyCurve()
    curve.add(500 * MS, 2500)
    curve.add(20 * MS, 1, ahead=True)
    assert curve.pages_meanwhile(20 * MS, 4 * MS, kept_to=1) == 119
    assert curve.pages_meanwhile(20 * MS, 4 * MS, kept_to=150) == 0


def test_a_guest_that_writes_less_than_it_did_owes_nothing() -> None:
    """It wrote 3,000 pages in a round, and 500 in the next; only what comes after that is added."""
    curve = DirtyCurve()
    curve.add(200 * MS, 3000)
    curve.add(100 * MS, 500)
    assert curve.pages_meanwhile(100 * MS, 4 * MS) == 100


def test_a_round_that_went_ahead_tells_what_is_written_at_least() -> None:
    """A hot set that is dirty again after 20 ms."""
    curve = DirtyCurve()
    curve.add(500 * MS, 1100)
    curve.add(20 * MS, 1000, ahead=True)
    assert curve.pages_within(20 * MS) == 1000
    assert curve.pages_within(10 * MS) == pytest.approx(500)


def link_rounds(sizes: list[int], setup_ns: int = 3 * MS, page_ns: int = 9_000, jitter: float = 0.05) -> Bandwidth:
    draw = random.Random(2)
    bandwidth = Bandwidth()
    for pages in sizes:
        bandwidth.add(pages, pages * 4096, int((setup_ns + pages * page_ns) * draw.uniform(1 - jitter, 1 + jitter)))
    return bandwidth


def test_a_small_round_costs_what_small_rounds_cost_and_not_its_bytes_over_the_bandwidth() -> None:
    bandwidth = link_rounds([65_536, 30_000, 120, 80, 100])
    expected = bandwidth.expect(60, 0)
    assert expected.ns == pytest.approx(3 * MS + 60 * 9_000, rel=0.15)
    assert expected.ns > 3 * 60 * 4096 * 1e9 / bandwidth.bytes_per_s
    assert expected.spread_ns < 0.25 * expected.ns


def test_what_small_rounds_cost_beside_their_pages_is_not_multiplied_for_a_large_one() -> None:
    expected = link_rounds([65_536, 3_000, 400, 350, 380]).expect(30_000, 0)
    assert expected.ns == pytest.approx(3 * MS + 30_000 * 9_000, rel=0.2)


def test_one_round_in_which_the_host_stood_still_does_not_bend_the_fit() -> None:
    bandwidth = link_rounds([65_536, 3_000, 400, 350, 380, 360])
    before = bandwidth.expect(300, 0).ns
    bandwidth.add(340, 340 * 4096, 8_000 * MS)
    bandwidth.add(330, 330 * 4096, 3 * MS + 330 * 9_000)
    assert bandwidth.expect(300, 0).ns < 2 * before


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(1, 4 << 30), st.integers(1, 10**11)), min_size=1, max_size=40
    ),
    st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_no_rounds_make_a_nonsense_of_the_next(rounds: list[tuple[int, int, int]], pages: int) -> None:
    bandwidth = Bandwidth()
    for one in rounds:
        bandwidth.add(*one)
    expected = bandwidth.expect(pages, 0)
    assert expected.ns >= 0
    assert expected.spread_ns >= 0
    fastest = max(size / ns for _, size, ns in rounds)
    assert expected.ns >= pages * 4096 / fastest / 1.2 - 1


def test_a_round_that_went_as_the_blackout_will_tells_more_of_it_than_those_that_waited_for_others() -> None:
    """On a busy host large rounds wait for processors; the blackout does not, nor do small rounds."""
    waited = Bandwidth()
    for _ in range(3):
        waited.add(5000, 5000 * 4096, 120 * MS)
    ahead = Bandwidth()
    for _ in range(3):
        ahead.add(5000, 5000 * 4096, 120 * MS)
    ahead.add(900, 900 * 4096, 6 * MS, as_the_blackout=True)
    assert waited.expect(800, 0).ns > 15 * MS
    assert ahead.expect(800, 0).ns == pytest.approx(5.5 * MS, rel=0.35)
