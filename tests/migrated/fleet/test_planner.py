"""Plans: what goes where, what goes alone, what cannot go and why, and how near a plan is to the best one."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from migrated.fleet.costs import move_cost
from migrated.fleet.mirror import Mirror, link_of
from migrated.fleet.model import (
    Cordon,
    Fence,
    Forecast,
    HostDocument,
    HostSlots,
    JobSpec,
    JobStep,
    Ownership,
    Reservation,
)
from migrated.fleet.placement import PossibleHosts
from migrated.fleet.planner import Plan, plan
from migrated.fleet.store import Entry
from migrated.fleet.worker import choose_host
from scripts.fleet.search import best_plan
from tests.migrated.fleet.fleets import GIB, KEYS, MIB, MS, S, guest, host, mirror_of, spec


def check(mirror: Mirror, wanted: JobSpec, made: Plan) -> None:
    """Whatever the plan, no moment of it has more on slots, links and memory than there is."""
    source = mirror.hosts[wanted.host]
    for moment in [move.begin_ns for move in made.moves]:
        running = [move for move in made.moves if move.begin_ns <= moment < move.end_ns]
        assert len(running) <= (wanted.max_parallel or source.max_outbound)
        assert sum(move.bytes_per_s for move in running) <= link_of(source)
        for name, count in Counter(move.destination for move in running).items():
            assert count <= mirror.hosts[name].max_inbound
            there = [move for move in running if move.destination == name]
            assert sum(move.bytes_per_s for move in there) <= link_of(mirror.hosts[name])
    for name in {move.destination for move in made.moves}:
        moved = sum(mirror.guests[move.guest].memory_bytes for move in made.moves if move.destination == name)
        assert moved <= mirror.free_bytes(mirror.hosts[name])


def test_all_guests_leave_and_spread_over_the_hosts() -> None:
    mirror = mirror_of([host("a"), host("b"), host("c")], [guest(f"g{number}") for number in range(8)])
    made = plan(mirror, spec())
    check(mirror, spec(), made)
    assert not made.refusals
    assert {move.guest for move in made.moves} == set(mirror.guests)
    assert Counter(move.destination for move in made.moves) == {"b": 4, "c": 4}
    assert all(move.cost.bound_ns < 300 * MS and not move.doubt for move in made.moves)


def test_what_would_not_converge_beside_others_goes_alone() -> None:
    """A guest whose working set needs the whole link for 200 ms gets it, and nothing runs beside it."""
    busy = guest("busy", dirty_bytes_per_s=900 * MIB, working_set_bytes=200 * MIB)
    assert move_cost(busy, 300 * MS, GIB).fits
    assert not move_cost(busy, 300 * MS, GIB // 2).fits
    mirror = mirror_of([host("a"), host("b")], [busy, *(guest(f"idle{number}") for number in range(4))])
    made = plan(mirror, spec())
    check(mirror, spec(), made)
    alone = next(move for move in made.moves if move.guest == "busy")
    assert alone.bytes_per_s == GIB
    assert not alone.doubt
    others = [move for move in made.moves if move is not alone]
    assert all(move.end_ns <= alone.begin_ns or move.begin_ns >= alone.end_ns for move in others)


def test_what_does_not_converge_even_alone_is_planned_with_a_doubt() -> None:
    wild = guest("wild", dirty_bytes_per_s=4 * GIB, working_set_bytes=2 * GIB)
    made = plan(mirror_of([host("a"), host("b")], [wild]), spec())
    assert made.moves[0].doubt.startswith("wild is not expected to converge even alone on the link: ")


def test_the_limit_of_a_job_counts_where_it_is_lower() -> None:
    one = guest("g", dirty_bytes_per_s=900 * MIB, working_set_bytes=100 * MIB)
    mirror = mirror_of([host("a"), host("b")], [one])
    assert not plan(mirror, spec()).moves[0].doubt
    assert plan(mirror, spec(downtime_limit_ns=60 * MS)).moves[0].doubt
    assert not plan(mirror, spec(downtime_limit_ns=60 * S)).moves[0].doubt


@pytest.mark.parametrize(
    ("there", "needs", "says"),
    [
        ({"memory_bytes": 2 * GIB}, {}, "1 with less than 4GiB free"),
        ({}, {"devices": ("gpu0",)}, "1 without gpu0"),
        ({"cpu_features": ("avx2",)}, {"cpu_features": ("avx2", "amx")}, "1 without the processor feature amx"),
        ({}, {"vmm": "qemu"}, "1 without the driver qemu"),
        ({"max_inbound": 0}, {}, "1 set to take none"),
    ],
)
def test_a_guest_that_no_host_can_take_is_refused_with_the_reason(
    there: dict[str, Any], needs: dict[str, Any], says: str
) -> None:
    mirror = mirror_of([host("a"), host("b", **there)], [guest("g", **needs), guest("other", memory_bytes=GIB)])
    assert plan(mirror, spec()).refusals["g"] == f"No other host can take g: {says}."


def test_cordoned_and_fenced_hosts_take_nothing() -> None:
    mirror = mirror_of([host(name) for name in "abcd"], [guest("g")])
    mirror.put(Entry(KEYS.cordon("b"), Cordon(by="me", since_utc_ns=0).to_bytes(), 100))
    mirror.put(Entry(KEYS.fence("c"), Fence(by="me", since_utc_ns=0).to_bytes(), 101))
    assert plan(mirror, spec()).moves[0].destination == "d"
    refused = plan(mirror, spec(to=("b", "c", "x"))).refusals["g"]
    assert refused == "No other host can take g: 1 cordoned; 1 fenced; x is not there."


def test_memory_that_is_promised_to_others_is_not_promised_again() -> None:
    mirror = mirror_of([host("a"), host("b", memory_bytes=8 * GIB)], [guest("g"), guest("h")])
    promised = Reservation(guest="x", job="other", peer="c", memory_bytes=4 * GIB, attempt=1)
    mirror.put(Entry(KEYS.slots_of("b"), HostSlots(inbound=(promised,)).to_bytes(), 100))
    made = plan(mirror, spec())
    assert len(made.moves) == 1
    assert list(made.refusals.values()) == [
        "The hosts that could take h have no memory left for it once the other guests are there."
    ]


def test_a_group_is_kept_apart_where_that_is_possible() -> None:
    pair = [guest(f"db{number}", group="db") for number in range(3)]
    mirror = mirror_of([host(name) for name in "abcd"], pair)
    assert len({move.destination for move in plan(mirror, spec()).moves}) == 3
    together = plan(mirror, spec(to=("b",)))
    assert {move.destination for move in together.moves} == {"b"}


def test_large_guests_find_room_before_small_ones_take_it() -> None:
    """8 + 4 + 4 GiB fill two hosts of 8 exactly: only one way of packing moves all of them."""
    hosts = [host("a"), *(host(name, memory_bytes=8 * GIB) for name in "bc")]
    guests = [guest("s1"), guest("s2"), guest("large", memory_bytes=8 * GIB)]
    made = plan(mirror_of(hosts, guests), spec())
    assert not made.refusals


def test_a_deadline_names_what_comes_too_late() -> None:
    mirror = mirror_of([host("a"), host("b")], [guest(f"g{number}") for number in range(6)])
    made = plan(mirror, spec())
    assert not made.late(0)
    assert not made.late(made.total_ns)
    assert made.late(made.total_ns // 2)


def test_a_host_without_a_lease_has_no_plan() -> None:
    made = plan(mirror_of([host("b")], [guest("g")]), spec())
    assert made.refusals == {"g": "The host a is not there: its daemon holds no lease."}


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_is_near_the_best_that_exists(seed: int) -> None:
    """Four guests, two destinations with unequal links, two lanes: at most 1.25 times what trying everything finds."""
    dice = random.Random(seed)
    hosts = [
        host("a", link_bytes_per_s=dice.choice((GIB, GIB // 2))),
        host("b", link_bytes_per_s=dice.choice((GIB, GIB // 2, GIB // 4)), max_inbound=dice.choice((1, 2))),
        host("c", link_bytes_per_s=dice.choice((GIB, GIB // 2, GIB // 4)), memory_bytes=dice.choice((16, 64)) * GIB),
    ]
    guests = [
        guest(
            f"g{number}",
            memory_bytes=dice.choice((1, 2, 4, 8)) * GIB,
            dirty_bytes_per_s=dice.choice((0, 50, 200)) * MIB,
            working_set_bytes=dice.choice((20, 100)) * MIB,
        )
        for number in range(4)
    ]
    mirror = mirror_of(hosts, guests)
    best = best_plan(mirror, spec(), [one.name for one in guests])
    made = plan(mirror, spec())
    check(mirror, spec(), made)
    if best.total_ns is None:
        assert made.refusals or any(move.doubt for move in made.moves)
    else:
        assert not made.refusals
        assert made.total_ns <= 1.25 * best.total_ns, f"{made.total_ns / best.total_ns:.2f} of the best"


def test_a_guest_that_no_share_helps_takes_no_more_than_its_lane() -> None:
    """Its devices alone are over the limit: a wider share would only hold up the others."""
    stuck = [guest(f"stuck{number}", forecast=Forecast(data_bytes=GIB, fixed_ns=400 * MS)) for number in range(4)]
    mirror = mirror_of([host("a"), host("b"), host("c")], stuck)
    made = plan(mirror, spec())
    assert all(move.doubt for move in made.moves)
    assert {move.bytes_per_s for move in made.moves} == {GIB // 2}


def test_the_part_of_a_mirror_that_another_process_gets_makes_the_same_plan() -> None:
    guests = [guest(f"g{number}", group="db" if number % 2 else None) for number in range(6)]
    mirror = mirror_of([host("a"), host("b", used_bytes=GIB), host("c")], guests)
    others = [guest("elsewhere"), guest("of-the-group", group="db")]
    for number, other in enumerate(others, 100):
        mirror.put(Entry(KEYS.guest(other.name), other.to_bytes(), number))
        mirror.put(Entry(KEYS.owner(other.name), Ownership(owner="c", epoch=1).to_bytes(), number))
    part = mirror.part("a")
    assert set(part.guests) == {"of-the-group", *(one.name for one in guests)}
    assert part.unchanged(KEYS.owner("g1")) == mirror.unchanged(KEYS.owner("g1"))
    assert plan(part, spec()) == plan(mirror, spec())


def test_a_share_is_settled_by_what_is_known_of_the_link_when_it_is_promised() -> None:
    """The link was measured anew since the plan: half of it is half of what it is now, and a little less of what is
    left will do."""
    mirror = mirror_of([host("a", link_bytes_per_s=100 * MIB), host("b"), host("c")], [guest("g0"), guest("g1")])
    step = JobStep(guest="g1", source="a", destination="b", memory_bytes=4 * GIB, lanes=2, bytes_per_s=GIB)

    def chosen() -> tuple[HostDocument, int] | str | None:
        return choose_host(mirror, spec(), step, PossibleHosts(mirror, "a"))

    assert chosen() == (mirror.hosts["b"], 50 * MIB)
    held = Reservation(guest="g0", job="j1", peer="c", memory_bytes=GIB, bytes_per_s=52 * MIB, attempt=1)
    mirror.put(Entry(KEYS.slots_of("a"), HostSlots(outbound=(held,)).to_bytes(), 100))
    assert chosen() == (mirror.hosts["b"], 48 * MIB)
    held = held.model_copy(update={"bytes_per_s": 90 * MIB})
    mirror.put(Entry(KEYS.slots_of("a"), HostSlots(outbound=(held,)).to_bytes(), 101))
    assert chosen() is None
    mirror.put(Entry(KEYS.slots_of("a"), HostSlots(inbound=(held,)).to_bytes(), 102))
    assert chosen() == (mirror.hosts["b"], 50 * MIB), "the other direction is free"


def test_hosts_of_a_large_fleet_that_are_emptied_at_once_do_not_all_choose_the_same_ones() -> None:
    mirror = mirror_of([host(f"h{number:03}") for number in range(640)], [])
    chosen = [
        {one.name for one in PossibleHosts(mirror, source).of(guest("g1"))[0][:32]} for source in ("h001", "h002")
    ]
    assert len(chosen[0] & chosen[1]) < 16
    few = mirror_of([host("c", used_bytes=GIB), host("b", used_bytes=2 * GIB)], [])
    assert [one.name for one in PossibleHosts(few, "a").of(guest("g1"))[0]] == ["c", "b"]
