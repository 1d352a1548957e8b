"""Guest time over real migrations, on two hosts whose clocks have nothing in common.

Both daemons run on one machine, so there is one true clock: CLOCK_MONOTONIC_RAW. Each host's hrtime is that clock
shifted and drifting as configured, which makes the true time between an export and its import known to the nanosecond.

    true raw clock   ---- export ------------------ import ----
    host a's hrtime       before.hrtime
    host b's hrtime                                 after.hrtime
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from fractions import Fraction
from typing import Any

import pytest

from migrated.base.clock import HostClock
from scripts.rig.faults import Delay, Way
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.proxy import Proxy

DAY_NS = 86_400 * 10**9
HOUR_NS = 3_600 * 10**9
PPM = Fraction(1, 10**6)
RHO = 100 * PPM
EXPORT_NS = 20 * 10**6
"""More than asking the VMM for its time takes on a busy machine."""
ON_ITS_WAY_NS = 100 * 10**6
"""How much longer time data take to one host in a test: more than a busy machine makes of anything else."""


def hosts(clock_a: dict[str, int], clock_b: dict[str, int], **sections: dict[str, Any]) -> Pair:
    """Two hosts with these clocks; ``sections`` are more of the second's configuration."""
    pair = Pair()
    pair.a.configure(clock=clock_a)
    pair.b.configure(clock=clock_b, **sections)
    return pair


@pytest.fixture(scope="module")
def hosts_apart() -> Iterator[Pair]:
    with hosts({}, {"hrtime_offset_ns": DAY_NS, "wall_offset_ns": -HOUR_NS}) as pair:
        yield pair


@pytest.fixture(scope="module")
def drifting_hosts() -> Iterator[Pair]:
    with hosts({"drift_ppm": 100}, {"drift_ppm": -100, "hrtime_offset_ns": DAY_NS}) as pair:
        yield pair


@contextlib.asynccontextmanager
async def with_guest(pair: Pair) -> AsyncIterator[Pair]:
    """An idle guest on the first host; nothing of it is left afterwards."""
    await pair.a.create_guest("g1", 16, workload="idle")
    yield pair
    await pair.remove_guests()
    assert await pair.leftovers() == []


@pytest.fixture
async def apart(hosts_apart: Pair) -> AsyncIterator[Pair]:
    """Hosts whose clocks are a day and an hour apart, with a guest on the first."""
    async with with_guest(hosts_apart) as pair:
        yield pair


@pytest.fixture
async def drifting(drifting_hosts: Pair) -> AsyncIterator[Pair]:
    """Hosts whose clocks drift apart, with a guest on the first: moves there and back meet both directions."""
    async with with_guest(drifting_hosts) as pair:
        yield pair


def clock_of(host: Host) -> dict[str, int]:
    return dict(host._sections["clock"])


def true_ns(host: Host, hrtime_ns: int) -> Fraction:
    """When the true clock showed what the host's clock calls ``hrtime_ns``."""
    clock = clock_of(host)
    return (hrtime_ns - clock.get("hrtime_offset_ns", 0)) / (1 + clock.get("drift_ppm", 0) * PPM)


def true_elapsed(source: Host, destination: Host, record: dict[str, Any]) -> Fraction:
    before, after = record["time"]["before"], record["time"]["after"]
    return true_ns(destination, after["hrtime"]) - true_ns(source, before["hrtime"])


async def there_and_back(pair: Pair, count: int, **parameters: Any) -> list[tuple[Host, Host, dict[str, Any]]]:
    moves = []
    source = pair.a
    for _ in range(count):
        destination = pair.other(source)
        record = await source.migrate("g1", destination, **parameters)
        assert record["outcome"] == "completed", record["reason"]
        moves.append((source, destination, record))
        source = destination
    return moves


async def uptime(host: Host) -> tuple[int, int, int]:
    """The guest's uptime, and the true clock right before and right after it was read."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    guest = await host.guest("g1")
    return int(guest["guest_uptime_ns"]), before, time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


async def grown_against_truth(pair: Pair, start: tuple[int, int, int], at: Host) -> tuple[int, int]:
    """Bounds of how far the guest's uptime grew beyond true time since ``start``."""
    now, before, after = await uptime(at)
    grown = now - start[0]
    return grown - (after - start[1]), grown - (before - start[2])


async def test_twenty_migrations_between_hosts_a_day_and_an_hour_apart(apart: Pair, record_property: Any) -> None:
    start = await uptime(apart.a)
    moves = await there_and_back(apart, 20)
    allowed = 0
    for source, destination, record in moves:
        told = record["time"]
        truth = true_elapsed(source, destination, record)
        assert told["elapsed_lower_ns"] <= truth <= told["elapsed_upper_ns"]
        width = told["elapsed_upper_ns"] - told["elapsed_lower_ns"]
        # The drift bound counts from the ask, which came before the export: allow for what the export took.
        drift = RHO * (truth + told["round_trip_ns"] + EXPORT_NS)
        assert abs(told["elapsed_ns"] - truth) <= Fraction(told["round_trip_ns"], 2) + drift + 4
        assert width <= told["round_trip_ns"] + 2 * drift + 8
        allowed += width
        ticks = told["elapsed_ns"] * told["before"]["guest_freq"] // 10**9
        assert told["tsc_delta"] == ticks
    lower, upper = await grown_against_truth(apart, start, apart.a)
    record_property("cumulative_error_ns", (lower + upper) // 2)
    record_property("cumulative_error_allowed_ns", allowed)
    assert lower <= allowed
    assert upper >= -allowed
    skews = [record["time"]["wall_clock_skew_ns"] for _, _, record in moves]
    assert all(abs(abs(low) - HOUR_NS) < 10**9 for low, _ in skews)
    assert (await apart.a.verify("g1"))["clock_ok"]


async def test_clocks_that_drift_stay_inside_the_interval(drifting: Pair) -> None:
    for source, destination, record in await there_and_back(drifting, 6):
        told = record["time"]
        truth = true_elapsed(source, destination, record)
        assert told["elapsed_lower_ns"] <= truth <= told["elapsed_upper_ns"]


@pytest.mark.parametrize("policy", ["midpoint", "never-ahead", "never-behind"])
async def test_each_policy_keeps_its_promise(apart: Pair, policy: str) -> None:
    start = await uptime(apart.a)
    moves = await there_and_back(apart, 4, time_policy=policy)
    at = moves[-1][1]
    lower, upper = await grown_against_truth(apart, start, at)
    widths = sum(r["time"]["elapsed_upper_ns"] - r["time"]["elapsed_lower_ns"] for _, _, r in moves)
    if policy == "never-ahead":
        assert lower <= 0
        assert upper >= -widths
    elif policy == "never-behind":
        assert upper >= 0
        assert lower <= widths
    else:
        assert lower <= widths
        assert upper >= -widths
    assert (await at.guest("g1"))["heartbeat"]["backwards"] == 0


async def test_frozen_time_stands_still_while_the_guest_is_on_its_way(apart: Pair) -> None:
    start = await uptime(apart.a)
    with Proxy("127.0.0.1", apart.b.port) as proxy:
        proxy.now(Delay(ON_ITS_WAY_NS / 1e9, Way.TO_DESTINATION))
        record = await apart.a.migrate("g1", proxy.uri, time_policy="freeze", downtime_limit=5000)
    assert record["outcome"] == "completed", record["reason"]
    lower, upper = await grown_against_truth(apart, start, apart.b)
    assert lower <= -record["time"]["elapsed_lower_ns"]
    # Reading the uptime twice takes a while too, which a busy machine may make long.
    assert upper <= -ON_ITS_WAY_NS // 2
    assert (await apart.b.guest("g1"))["heartbeat"]["backwards"] == 0


async def test_a_timer_fires_at_five_seconds_through_three_migrations(apart: Pair) -> None:
    vmm = await apart.a.vmm("g1")
    await vmm.call("timer-arm", in_ns=5 * 10**9)
    await vmm.close()
    start = await uptime(apart.a)
    moves = await there_and_back(apart, 3)
    for _ in range(400):
        timers = (await apart.b.guest("g1"))["timers"]
        if timers["fired"]:
            break
        await asyncio.sleep(0.025)  # until the guest's own timer fires
    (fired,) = timers["fired"]
    assert fired["due_uptime_ns"] - fired["armed_at_uptime_ns"] == 5 * 10**9
    late = fired["fired_uptime_ns"] - fired["due_uptime_ns"]
    widths = sum(r["time"]["elapsed_upper_ns"] - r["time"]["elapsed_lower_ns"] for _, _, r in moves)
    lower, upper = await grown_against_truth(apart, start, apart.b)
    assert lower <= widths
    assert upper >= -widths
    assert 0 <= late < 500 * 10**6  # how late a busy machine may notice; never early


async def test_limits_on_the_jump_and_on_the_error_abort_before_the_hand_over(apart: Pair) -> None:
    for parameter in ("max_time_jump", "max_time_error"):
        record = await apart.a.migrate("g1", apart.b, **{f"{parameter}": 0.000001})
        assert record["outcome"] == "aborted"
        assert parameter.replace("_", "-") in record["reason"]
        assert (await apart.a.guest("g1"))["state"] == "running"
    assert (await apart.a.verify("g1"))["ok"]
    assert (await apart.a.migrate("g1", apart.b))["outcome"] == "completed"


async def test_a_host_that_cannot_scale_refuses_before_the_stop() -> None:
    command = ["vmm-sim", "--host-cannot-scale-tsc", "--host-freq", "3000000000"]
    with hosts({}, {}, vmm={"command": command}) as pair:
        await pair.a.create_guest("g1", 16, workload="idle")
        record = await pair.a.migrate("g1", pair.b)
        assert record["outcome"] == "refused"
        assert "scal" in record["reason"]
        assert record["downtime"] is None
        assert (await pair.a.guest("g1"))["state"] == "running"


def test_the_host_clock_of_the_daemon_is_what_this_file_inverts() -> None:
    clock = HostClock(hrtime_offset_ns=DAY_NS, drift_ppm=100)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    told = clock.hrtime_ns()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    assert before - 1 <= Fraction(told - DAY_NS) / (1 + 100 * PPM) <= after + 1


@pytest.mark.parametrize("slow_way", [Way.TO_DESTINATION, Way.TO_SOURCE])
async def test_ten_milliseconds_one_way_and_none_back_stay_inside_the_interval(drifting: Pair, slow_way: Way) -> None:
    """The midpoint is off by half the asymmetry, as it must be; the interval still holds the truth."""
    for _ in range(3):
        with Proxy("127.0.0.1", drifting.b.port) as proxy:
            proxy.now(Delay(0.010, slow_way))
            record = await drifting.a.migrate("g1", proxy.uri, downtime_limit=2000)
        assert record["outcome"] == "completed", record["reason"]
        told = record["time"]
        truth = true_elapsed(drifting.a, drifting.b, record)
        assert told["elapsed_lower_ns"] <= truth <= told["elapsed_upper_ns"]
        assert told["elapsed_upper_ns"] - told["elapsed_lower_ns"] >= 9 * 10**6  # what the link does not tell
        back = await drifting.b.migrate("g1", drifting.a)
        assert back["outcome"] == "completed", back["reason"]
