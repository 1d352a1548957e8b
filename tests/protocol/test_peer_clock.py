"""The peer's clock: late answers count for nothing, impossible ones are named, and bounds hold for every clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.clock import ClockError, FalsifiedStampsError
from protocol.messages import ClockReply
from protocol.peer_clock import KEPT_EXCHANGES, PeerClock

MS = 1_000_000


def exchange(clock: PeerClock, nonce: int, now_ns: int, there_ns: int, back_ns: int, offset_ns: int) -> int:
    """One exchange with a peer whose clock is ``offset_ns`` ahead and that answers at once; when it was read."""
    clock.ask(nonce, now_ns)
    heard_ns = now_ns + there_ns + offset_ns
    read_ns = now_ns + there_ns + back_ns
    assert clock.hear(ClockReply(nonce=nonce, t2_ns=heard_ns, t3_ns=heard_ns), read_ns)
    return read_ns


def test_nothing_is_known_before_the_first_exchange() -> None:
    clock = PeerClock()
    assert clock.offset() is None
    assert (clock.round_trip_ns(), clock.typical_round_trip_ns(), clock.transit_upper_ns(5, 10)) == (0, 0, 0)


def test_reserves_use_the_longest_round_trip_and_predictions_the_median() -> None:
    clock = PeerClock()
    for number, back_ns in enumerate((1 * MS, 2 * MS, 9 * MS)):
        exchange(clock, number, number * 100 * MS, 1 * MS, back_ns, 0)
    assert (clock.round_trip_ns(), clock.typical_round_trip_ns()) == (10 * MS, 3 * MS)


def test_old_exchanges_are_forgotten() -> None:
    clock = PeerClock()
    exchange(clock, 0, 0, 50 * MS, 50 * MS, 0)
    for number in range(1, KEPT_EXCHANGES + 1):
        exchange(clock, number, number * 200 * MS, MS, MS, 0)
    assert clock.round_trip_ns() == 2 * MS


def test_exchanges_of_other_circumstances_can_be_forgotten() -> None:
    clock = PeerClock()
    exchange(clock, 0, 0, 400 * MS, 300 * MS, 0)
    for number in range(1, 4):
        exchange(clock, number, number * 1000 * MS, MS, number * MS, 0)
    clock.forget_but(3)
    assert (clock.round_trip_ns(), clock.typical_round_trip_ns()) == (4 * MS, 3 * MS)
    clock.forget_but(3)
    assert clock.round_trip_ns() == 4 * MS


def test_an_answer_to_a_forgotten_ask_counts_for_nothing() -> None:
    clock = PeerClock()
    for nonce in range(KEPT_EXCHANGES + 2):
        clock.ask(nonce, nonce)
    assert not clock.hear(ClockReply(nonce=0, t2_ns=5, t3_ns=5), 10)
    assert clock.offset() is None


def test_an_answer_that_was_made_outside_its_round_trip_is_named_and_not_kept() -> None:
    clock = PeerClock()
    clock.ask(1, 0)
    with pytest.raises(FalsifiedStampsError):
        clock.hear(ClockReply(nonce=1, t2_ns=0, t3_ns=10 * MS), 1 * MS)
    assert clock.round_trip_ns() == 0


def test_a_message_from_the_future_is_an_error() -> None:
    clock = PeerClock()
    read_ns = exchange(clock, 1, 0, MS, MS, 0)
    with pytest.raises(ClockError):
        clock.transit_upper_ns(read_ns + 50 * MS, read_ns + MS)


@given(
    offset_ns=st.integers(-(10**15), 10**15),
    legs=st.lists(st.tuples(st.integers(0, 50 * MS), st.integers(0, 50 * MS)), min_size=1, max_size=5),
    transit_ns=st.integers(0, 50 * MS),
)
def test_the_bound_of_a_transit_holds_whatever_the_offset_and_the_legs(
    offset_ns: int, legs: list[tuple[int, int]], transit_ns: int
) -> None:
    clock, now_ns = PeerClock(), 10**12
    for nonce, (there_ns, back_ns) in enumerate(legs):
        now_ns = exchange(clock, nonce, now_ns, there_ns, back_ns, offset_ns)
    assert clock.transit_upper_ns(now_ns + offset_ns, now_ns + transit_ns) >= transit_ns
