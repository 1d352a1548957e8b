"""Platform timers: rebased on the new boot time, so that what is due in a second stays due in a second."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from protocol.guest_time import adjust_time_data
from vmm_sim.clock import GuestClock, HostTsc
from vmm_sim.errors import VmmError
from vmm_sim.platform import HPET_PERIOD_NS, PM_TIMER_HZ, PM_TIMER_MASK, Platform

GHZ = 1_000_000_000
DAY_NS = 86_400 * GHZ
MS = 1_000_000


class Host:
    """One host with one guest on it."""

    def __init__(self, still_clock: Any, hrtime: int) -> None:
        self.clock = still_clock(hrtime)
        self.guest = GuestClock(self.clock, HostTsc(2 * GHZ), GHZ)
        self.platform = Platform(self.guest, vcpus=2, tsc_skew=1000)
        self.platform.tsc.arm_first(self.guest.read().guest_tsc)

    def pass_time(self, ns: int) -> None:
        """Let the vCPU tick every millisecond."""
        for _ in range(ns // MS):
            self.clock.hrtime += MS
            reading = self.guest.read()
            self.platform.fire(reading.hrtime, reading.guest_tsc)


def move(source: Host, destination: Host, elapsed_ns: int) -> None:
    """Carry the guest over; the destination imports ``elapsed_ns`` after the export."""
    exported = source.guest.read()
    adjusted = adjust_time_data(
        exported,
        destination_hrtime=destination.clock.hrtime,
        destination_wall=destination.clock.wall(),
        elapsed_ns=elapsed_ns,
    ).adjusted
    destination.guest.import_time(adjusted)
    destination.platform.vmclock.imported_error_ns = 40_000
    for old, new in zip(source.platform.devices(), destination.platform.devices(), strict=True):
        new.load(old.save())
    destination.platform.tsc.load(source.platform.tsc.save())


@pytest.fixture
def hosts(still_clock: Any) -> list[Host]:
    """Four hosts whose clocks are days apart, one of them younger than the guest."""
    return [Host(still_clock, hrtime) for hrtime in (10 * DAY_NS, 3 * DAY_NS, 200 * MS, 77 * DAY_NS)]


def test_a_timer_keeps_its_distance_over_three_moves(hosts: list[Host]) -> None:
    """arm(5 s) | 1 s | move 100 ms | 1 s | move 7 ms | 1 s | move 0 | fires 1.893 s later, at uptime 5 s."""
    hosts[0].pass_time(250 * MS)
    due = hosts[0].platform.hpet.arm(5 * GHZ)
    assert due == 250 * MS + 5 * GHZ
    for old, new, elapsed in zip(hosts, hosts[1:], (100 * MS, 7 * MS, 0), strict=False):
        old.pass_time(GHZ)
        move(old, new, elapsed)
        assert new.platform.hpet.pending_uptimes() == [{"armed_at_uptime_ns": 250 * MS, "due_uptime_ns": due}]
    hosts[3].pass_time(1_892 * MS)
    assert hosts[3].platform.hpet.fired == []
    hosts[3].pass_time(1 * MS)
    fired = {"armed_at_uptime_ns": 250 * MS, "due_uptime_ns": due, "fired_uptime_ns": due}
    assert hosts[3].platform.hpet.fired == [fired]
    assert hosts[3].platform.hpet.pending == []


def test_an_overdue_timer_fires_at_the_first_beat_after_the_move(hosts: list[Host]) -> None:
    due = hosts[0].platform.hpet.arm(10 * MS)
    move(hosts[0], hosts[1], 400 * MS)
    hosts[1].pass_time(MS)
    assert hosts[1].platform.hpet.fired[0]["fired_uptime_ns"] == 401 * MS
    assert hosts[1].platform.hpet.fired[0]["due_uptime_ns"] == due


def test_periodic_ticks_keep_their_phase_and_count_what_they_missed(hosts: list[Host]) -> None:
    hosts[0].pass_time(95 * MS)
    assert hosts[0].platform.hpet.ticks == 9
    move(hosts[0], hosts[1], 107 * MS)
    hosts[1].pass_time(MS)
    hpet = hosts[1].platform.hpet
    assert (hpet.ticks, hpet.missed) == (10, 10)
    assert (hpet.deadline - hosts[1].guest.boot_hrtime) % HPET_PERIOD_NS == 0


def test_counters_and_clocks_go_on_as_if_nothing_had_happened(hosts: list[Host]) -> None:
    hosts[0].pass_time(2 * GHZ)
    move(hosts[0], hosts[1], 3 * GHZ)
    uptime_ns = 5 * GHZ
    report = hosts[1].platform.report()
    assert report["hyperv_reference"] == uptime_ns // 100
    assert report["pm_timer"] == (uptime_ns * PM_TIMER_HZ // GHZ) & PM_TIMER_MASK
    assert report["rtc_seconds"] == hosts[0].clock.wall()[0] + 5
    assert report["tsc_offsets"] == [0, 1000]


def test_the_tsc_deadline_is_in_guest_ticks(hosts: list[Host]) -> None:
    hosts[0].pass_time(42 * MS)
    assert hosts[0].platform.tsc.ticks == 10
    move(hosts[0], hosts[1], 1 * MS)
    hosts[1].pass_time(MS)
    assert hosts[1].platform.tsc.ticks == 11


def test_a_tsc_deadline_before_its_tsc_is_refused(hosts: list[Host]) -> None:
    tsc, deadline, ticks = hosts[0].platform.tsc.save()
    with pytest.raises(VmmError) as raised:
        hosts[1].platform.tsc.load([deadline, tsc, ticks])
    assert raised.value.name == "TscDeadlineBeforeTsc"


def test_the_vmclock_page_tells_of_the_disruption_and_the_error(hosts: list[Host]) -> None:
    before = hosts[0].platform.vmclock.page()
    move(hosts[0], hosts[1], GHZ)
    move(hosts[1], hosts[2], GHZ)
    page = hosts[2].platform.vmclock.page()
    assert len(page) == 112
    magic, size, version, counter = struct.unpack_from("<4sIHB", page)
    assert (magic, size, version, counter) == (b"VCLK", 112, 1, 1)
    (sequence,) = struct.unpack_from("<I", page, 12)
    assert sequence % 2 == 0
    assert sequence > struct.unpack_from("<I", before, 12)[0]
    marker, flags = struct.unpack_from("<QQ", page, 16)
    assert marker == struct.unpack_from("<Q", before, 16)[0] + 2
    assert flags & (1 << 6)
    counter_value, period = struct.unpack_from("<QQ", page, 40)
    assert counter_value == hosts[2].guest.read().guest_tsc
    assert period == (1 << 64) // GHZ
    (max_error,) = struct.unpack_from("<Q", page, 96)
    assert max_error == 80_000


@pytest.mark.parametrize("device", range(6))
@pytest.mark.parametrize("value", [1.5, True, "1", None, 1 << 64, -(1 << 64), []])
def test_hostile_device_state_is_a_named_error(hosts: list[Host], device: int, value: object) -> None:
    good = hosts[0].platform.devices()[device].save()
    for key in good:
        with pytest.raises(VmmError) as raised:
            # An empty list is a fair list of timers.
            hosts[1].platform.devices()[device].load({**good, key: value if value != [] else [[]]})
        assert raised.value.name == "DeviceStateInvalid"
    with pytest.raises(VmmError):
        hosts[1].platform.devices()[device].load({**good, "more": 1})


def test_too_many_timers_are_refused(hosts: list[Host]) -> None:
    for _ in range(64):
        hosts[0].platform.hpet.arm(GHZ)
    with pytest.raises(VmmError, match="64 timers"):
        hosts[0].platform.hpet.arm(GHZ)
