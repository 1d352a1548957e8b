"""What is made of an interval of elapsed time: policies, limits, the provable skew of wall clocks, hops of a guest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.clock import NS_PER_SEC, ElapsedInterval, ExportExchange
from protocol.guest_time import (
    I64_MAX,
    U64_MAX,
    Policy,
    TimeAdjustError,
    TimeErrorName,
    VmTimeData,
    check_limits,
    choose_elapsed,
    provable_skew,
    tsc_ticks,
    wall_clock_skew,
)
from tests.protocol.guest_times import DESTINATION, SOURCE, adjust, unhurried


@pytest.mark.parametrize(
    ("policy", "expected"), [("midpoint", 85_000), ("never-ahead", 30_000), ("never-behind", 140_000), ("freeze", 0)]
)
def test_policies_on_the_published_interval(policy: Policy, expected: int) -> None:
    assert choose_elapsed(ElapsedInterval(30_000, 140_000), policy) == expected


@unhurried
@given(st.integers(0, I64_MAX), st.integers(0, 1 << 40), st.data())
def test_policies_keep_their_word(lower: int, width: int, data: st.DataObject) -> None:
    interval = ElapsedInterval(lower, lower + width)
    truth = data.draw(st.integers(interval.lower_ns, interval.upper_ns))
    used = {policy: choose_elapsed(interval, policy) for policy in get_args(Policy)}
    assert set(used) == {"midpoint", "never-ahead", "never-behind", "freeze"}
    assert min(used.values()) >= 0  # guest time runs backwards under no policy
    assert used["never-ahead"] <= truth <= used["never-behind"]
    assert abs(used["midpoint"] - truth) <= (width + 1) // 2
    for elapsed in used.values():
        assert abs(elapsed - truth) <= interval.error_ns(elapsed)
    assert used["freeze"] == 0


def test_limits_refuse_one_nanosecond_too_much() -> None:
    interval = ElapsedInterval(30_000, 140_000)
    check_limits(interval)
    check_limits(interval, max_time_jump_ns=140_000, max_time_error_ns=110_000)
    for limits, name in (
        ({"max_time_jump_ns": 139_999}, "TimeJumpTooLarge"),
        ({"max_time_error_ns": 109_999}, "TimeErrorTooLarge"),
    ):
        with pytest.raises(TimeAdjustError) as refused:
            check_limits(interval, **limits)
        assert refused.value.name == name


def test_wall_clocks_an_hour_apart_are_provably_skewed() -> None:
    destination = SOURCE.model_copy(update={"hres_sec": SOURCE.hres_sec + 3600})
    skew = wall_clock_skew(SOURCE, destination, ElapsedInterval(30_000, 140_000))
    assert skew == (3600 * NS_PER_SEC - 140_000, 3600 * NS_PER_SEC - 30_000)
    assert provable_skew(skew) == 3600 * NS_PER_SEC - 140_000
    back = wall_clock_skew(destination, SOURCE, ElapsedInterval(30_000, 140_000))
    assert provable_skew(back) == -3600 * NS_PER_SEC - 30_000


def test_wall_clocks_within_the_interval_prove_nothing() -> None:
    destination = VmTimeData(**(SOURCE.model_dump() | DESTINATION))
    assert wall_clock_skew(SOURCE, destination, ElapsedInterval(100_000, 110_000)) == (-2418, 7582)
    assert provable_skew((-2418, 7582)) == 0
    assert provable_skew((0, 5)) == provable_skew((-5, 0)) == 0


@unhurried
@given(st.integers(0, 1 << 62), st.integers(0, 1 << 62), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_the_provable_skew_never_exceeds_the_true_skew(source_wall: int, skew: int, elapsed: int, slack: int) -> None:
    def at(wall: int) -> VmTimeData:
        return SOURCE.model_copy(update={"hres_sec": wall // NS_PER_SEC, "hres_ns": wall % NS_PER_SEC})

    interval = ElapsedInterval(max(0, elapsed - slack), elapsed + slack)
    proven = provable_skew(wall_clock_skew(at(source_wall), at(source_wall + elapsed + skew), interval))
    assert max(0, skew - slack) <= proven <= skew


hops = st.tuples(
    st.integers(0, 1 << 62),  # the next host's clock at the import
    st.integers(0, 60 * NS_PER_SEC),  # time the guest then runs there
    st.integers(0, NS_PER_SEC),  # ask
    st.integers(0, NS_PER_SEC),  # pause
    st.integers(0, NS_PER_SEC),  # reply
)


@unhurried
@given(st.lists(hops, min_size=2, max_size=8), st.sampled_from(get_args(Policy)))
def test_out_and_back_the_guest_is_within_the_sum_of_the_stated_errors(
    moves: list[tuple[int, int, int, int, int]], policy: Policy
) -> None:
    guest = SOURCE.model_copy(update={"hrtime": 1 << 61, "boot_hrtime": 0})
    true_ns = guest.hrtime - guest.boot_hrtime
    first_tsc, lost_ticks_at_most, stated_ns, used_ns = guest.guest_tsc, 0, 0, 0
    for hrtime, runs_ns, ask_ns, pause_ns, reply_ns in moves:
        exchange = ExportExchange(
            t1=hrtime - reply_ns - pause_ns - ask_ns,
            t2=guest.hrtime - pause_ns,
            exported_at=guest.hrtime,
            t3=guest.hrtime,
            t4=hrtime,
            imported_at=hrtime,
        )
        interval = exchange.elapsed()
        elapsed = choose_elapsed(interval, policy)
        moved = adjust(guest, hrtime, elapsed).adjusted
        true_ns += reply_ns + runs_ns
        used_ns += elapsed + runs_ns
        stated_ns += interval.error_ns(elapsed)
        lost_ticks_at_most += 2
        guest = moved.model_copy(
            update={
                "hrtime": moved.hrtime + runs_ns,
                "guest_tsc": (moved.guest_tsc + tsc_ticks(runs_ns, moved.guest_freq)) & U64_MAX,
            }
        )
    error_ns = (guest.hrtime - guest.boot_hrtime) - true_ns
    assert abs(error_ns) <= stated_ns
    if policy in ("never-ahead", "freeze"):
        assert error_ns <= 0
    if policy == "never-behind":
        assert error_ns >= 0
    ticks = (guest.guest_tsc - first_tsc) % (1 << 64)
    exact = tsc_ticks(used_ns, guest.guest_freq)
    assert exact - lost_ticks_at_most <= ticks <= exact


def test_the_worked_example_of_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "guest-time.md").read_text(encoding="utf-8")
    section = text.split("## Worked example\n")[1].split("\n## ")[0]
    said = {
        name: int(value.replace(",", "")) for name, value in re.findall(r"^\| (.+?) \| (-?[\d,]+) \|", section, re.M)
    }

    exchange = ExportExchange(said["T1"], said["T2"], said["S"], said["T3"], said["T4"], said["D"])
    interval = exchange.elapsed()
    elapsed = choose_elapsed(interval, "midpoint")
    source_sec, source_ns = divmod(said["source wall"], NS_PER_SEC)
    source = VmTimeData(
        guest_freq=said["guest_freq"],
        guest_tsc=said["guest_tsc"],
        hrtime=said["S"],
        hres_sec=source_sec,
        hres_ns=source_ns,
        boot_hrtime=said["boot_hrtime"],
    )
    adjustment = adjust(source, said["D"], elapsed, divmod(said["destination wall"], NS_PER_SEC))
    skew = wall_clock_skew(source, adjustment.adjusted, interval)
    error_ns = interval.error_ns(elapsed)
    computed = {
        "round trip": exchange.delta_ns,
        "lower": interval.lower_ns,
        "upper": interval.upper_ns,
        "Δ": elapsed,
        "stated error": error_ns,
        "guest uptime": adjustment.guest_uptime_ns,
        "uptime at import": adjustment.boot_hrtime_delta,
        "boot_hrtime'": adjustment.adjusted.boot_hrtime,
        "tsc ticks": adjustment.tsc_delta,
        "guest_tsc'": adjustment.adjusted.guest_tsc,
        "stated error in ticks": -(-error_ns * said["guest_freq"] // NS_PER_SEC) + 1,
        "wall skew, lower": skew[0],
        "wall skew, upper": skew[1],
    }
    inputs = ["guest_freq", "guest_tsc", "boot_hrtime", "source wall", "T1", "T2", "S", "T3", "T4", "D"]
    assert said == {name: said[name] for name in (*inputs, "destination wall")} | computed


def test_the_document_names_every_error_and_policy() -> None:
    text = (Path(__file__).parents[2] / "docs" / "guest-time.md").read_text(encoding="utf-8")
    missing = [name for name in (*get_args(TimeErrorName), *get_args(Policy)) if f"`{name}`" not in text]
    assert not missing
