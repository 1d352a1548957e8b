"""What migrations that leave one host at once may send: first rounds one after the other, all others their shares."""

from __future__ import annotations

import pytest

from migrated.fleet.mirror import Mirror
from migrated.fleet.model import HostSlots, Reservation
from migrated.fleet.shares import Promised, first_round_paces
from migrated.fleet.store import Entry
from migrated.source.first_round import FirstRoundPace
from tests.migrated.fleet.fleets import GIB, KEYS, MIB, MS, S, host, mirror_of

SHARE = 40 * MIB
B_SETS_UP, B_BEGINS, B_GOES_ON = (
    Promised("b", SHARE, "setting-up"),
    Promised("b", SHARE, "first-round"),
    Promised("b", SHARE, "later"),
)
C_BEGINS = Promised("c", SHARE, "first-round")


@pytest.fixture
def mirror() -> Mirror:
    return mirror_of([host(name, link_bytes_per_s=80 * MIB) for name in "abc"], [])


def paces(mirror: Mirror, *migrations: Promised) -> list[int]:
    return list(first_round_paces(mirror, "a", {f"m{number}": one for number, one in enumerate(migrations)}).values())


def test_a_first_round_has_what_others_do_not_use_yet(mirror: Mirror) -> None:
    assert paces(mirror, C_BEGINS) == [80 * MIB]
    assert paces(mirror, B_SETS_UP, C_BEGINS) == [80 * MIB]
    assert paces(mirror, B_GOES_ON, C_BEGINS) == [40 * MIB]
    assert paces(mirror, B_GOES_ON, B_SETS_UP) == []


def test_first_rounds_go_one_after_the_other_and_the_link_is_full(mirror: Mirror) -> None:
    assert paces(mirror, C_BEGINS, B_BEGINS) == [75 * MIB, 5 * MIB]
    assert paces(mirror, B_GOES_ON, C_BEGINS, B_BEGINS) == [35 * MIB, 5 * MIB]


def test_the_link_of_the_destination_is_minded_too(mirror: Mirror) -> None:
    mirror.put(Entry(KEYS.host("b"), host("b", link_bytes_per_s=30 * MIB).to_bytes(), 50))
    assert paces(mirror, B_BEGINS, C_BEGINS) == [30 * MIB, 50 * MIB]
    from_d = Reservation(guest="g", job="j", peer="d", memory_bytes=GIB, bytes_per_s=20 * MIB, attempt=1)
    mirror.put(Entry(KEYS.slots_of("b"), HostSlots(inbound=(from_d,)).to_bytes(), 51))
    assert paces(mirror, B_BEGINS) == [10 * MIB], "what was promised to a migration from elsewhere stays its own"


def test_a_first_round_tells_of_the_cap_and_not_of_its_own_pace() -> None:
    """The rounds after it keep to the cap, and what they will take is judged by it."""
    usual, fast, slow, held_up = FirstRoundPace(), FirstRoundPace(), FirstRoundPace(), FirstRoundPace()
    for pace, bytes_per_s in ((fast, 80 * MIB), (slow, 5 * MIB), (held_up, 80 * MIB)):
        pace.change(bytes_per_s, SHARE, 0)
    for pace in (usual, fast, slow, held_up):
        pace.begin(S)
    assert usual.ns_at_cap(SHARE, SHARE, 2 * S) == S
    assert fast.ns_at_cap(80 * MIB, SHARE, 2 * S) == 2 * S
    assert held_up.ns_at_cap(SHARE, SHARE, 2 * S) == 2 * S, "the link moved half of what it was given"
    slow.change(40 * MIB, SHARE, 2 * S)
    assert slow.ns_at_cap(45 * MIB, SHARE, 3 * S) == pytest.approx(S + S / 8, abs=MS)
