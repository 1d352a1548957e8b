"""The guest's clock: scaling, export, and the import checks in the kernel's order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.guest_time import VmTimeData, adjust_time_data, read_later
from vmm_sim.clock import GuestClock, HostTsc, parse_time_data
from vmm_sim.errors import VmmError
from vmm_sim.heartbeat import Heartbeat
from vmm_sim.host_clock import HostClock
from vmm_sim.verify import find_clock_fault

GHZ = 1_000_000_000
U64 = 1 << 64


def time_data(**changes: int) -> VmTimeData:
    values = {
        "guest_freq": GHZ,
        "guest_tsc": 0,
        "hrtime": 1_000_000_000_000,
        "hres_sec": 1_683_850_713,
        "hres_ns": 0,
        "boot_hrtime": 0,
    }
    return VmTimeData(**{**values, **changes})


def test_tsc_and_uptime_start_at_boot_and_grow_together(still_clock: Any) -> None:
    host = still_clock(5 * GHZ)
    clock = GuestClock(host, HostTsc(GHZ), 2_649_958_945, boot_tsc=77)
    assert clock.read().guest_tsc == 77
    host.hrtime += 10 * GHZ
    reading = clock.read()
    assert reading.hrtime - reading.boot_hrtime == 10 * GHZ
    assert reading.guest_tsc - 77 == pytest.approx(26_499_589_450, abs=10)


@given(
    st.integers(500_000_000, 14 * GHZ),
    st.integers(-(1 << 62), 1 << 62),
    st.lists(st.integers(1, 1 << 40), min_size=1, max_size=20),
)
def test_scaled_tsc_never_runs_backwards_and_keeps_its_frequency(freq: int, start: int, strides: list[int]) -> None:
    host = HostClock()
    clock = GuestClock(host, HostTsc(GHZ), freq)
    now, last = start, clock.tsc_at(start)
    for stride in strides:
        now += stride
        ticks = (clock.tsc_at(now) - last) % U64
        last = (last + ticks) % U64
        wanted = stride * freq // GHZ
        # One tick of the host's TSC is up to 14 of the guest's; the multiplier has 32 fraction bits.
        assert abs(ticks - wanted) <= 16 + (wanted >> 31)


@given(st.integers(500_000_000, 14 * GHZ), st.integers(0, 1 << 45))
def test_an_earlier_reading_tells_the_time_as_the_clock_itself_would(freq: int, later_ns: int) -> None:
    host = HostClock()
    clock = GuestClock(host, HostTsc(GHZ), freq)
    earlier = clock.read()
    now, wall = earlier.hrtime + later_ns, (1_700_000_000, 5)
    later = read_later(earlier, now, wall)
    assert (later.boot_hrtime, later.hrtime, later.wall_ns) == (earlier.boot_hrtime, now, 1_700_000_000 * GHZ + 5)
    wrong = (later.guest_tsc - clock.tsc_at(now) + (U64 >> 1)) % U64 - (U64 >> 1)
    # As above: a tick of the host's TSC is up to 14 of the guest's, and the multiplier has 32 fraction bits.
    assert abs(wrong) <= 16 + (later_ns * freq // GHZ >> 31)


def test_published_values_are_imported_with_the_latency_added(still_clock: Any) -> None:
    """The published migration: what userspace adjusted is imported 18 us later."""
    source = time_data(
        guest_freq=2_649_958_945,
        guest_tsc=2_330_632_597_459,
        hrtime=18_028_032_305_249,
        hres_ns=581_965_192,
        boot_hrtime=17_148_534_696_948,
    )
    wall = (1_683_850_713, 582_072_774)
    adjusted = adjust_time_data(
        source, destination_hrtime=18_018_796_793_122, destination_wall=wall, elapsed_ns=107_582
    ).adjusted
    latency_ns = 31_850
    host = still_clock(adjusted.hrtime + latency_ns)
    clock = GuestClock(host, HostTsc(2_649_958_945), 2_649_958_945)
    result = clock.import_time(adjusted)
    assert (result.vmm_ns, result.vmm_ticks) == (latency_ns, 84_401)
    reading = clock.read()
    assert reading.guest_tsc == 2_330_632_882_546 + 84_401
    assert reading.boot_hrtime == 17_139_299_077_239
    assert clock.uptime_at(reading.hrtime) == 879_497_715_883 + latency_ns


@pytest.mark.parametrize("policy_elapsed", [0, 1, 3_000_000_003])
def test_tsc_wraps_on_import_and_the_guest_sees_it_move_forward(still_clock: Any, policy_elapsed: int) -> None:
    host = still_clock()
    clock = GuestClock(host, HostTsc(GHZ), GHZ)
    clock.import_time(time_data(guest_tsc=(U64 - 1 + policy_elapsed) % U64, hrtime=host.hrtime))
    assert clock.read().guest_tsc == (U64 - 1 + policy_elapsed) % U64
    host.hrtime += 5
    assert clock.read().guest_tsc == (U64 + 4 + policy_elapsed) % U64


@pytest.mark.parametrize(
    ("host_tsc", "changes", "error"),
    [
        # Frequency before scaling, scaling before range, range before times: each row also breaks all later rules.
        (HostTsc(GHZ, can_scale=False), {"guest_freq": 0, "hrtime": 1 << 62}, "TimeInvalidFrequency"),
        (HostTsc(GHZ, can_scale=False), {"guest_freq": 100, "hrtime": 1 << 62}, "TscScalingUnavailable"),
        (HostTsc(GHZ), {"guest_freq": 499_999_999, "hrtime": 1 << 62}, "TscRatioOutOfRange"),
        (HostTsc(GHZ), {"guest_freq": 15 * GHZ, "hrtime": 1 << 62}, "TscRatioOutOfRange"),
        (HostTsc(GHZ), {"hrtime": 1_000_000_000_001}, "TimeInFuture"),
        (HostTsc(GHZ), {"boot_hrtime": 1_000_000_000_001}, "TimeInFuture"),
    ],
)
def test_import_checks_come_in_the_kernels_order_and_change_nothing(
    still_clock: Any, host_tsc: HostTsc, changes: dict[str, int], error: str
) -> None:
    clock = GuestClock(still_clock(), host_tsc, host_tsc.freq)
    before = clock.read()
    with pytest.raises(VmmError) as raised:
        clock.import_time(time_data(**changes))
    assert raised.value.name == error
    assert clock.read() == before


@pytest.mark.parametrize(
    ("freq", "fits"), [(1_000_250_000, True), (1_000_250_001, False), (999_750_000, True), (999_749_999, False)]
)
def test_a_host_that_cannot_scale_takes_guests_within_250_ppm(still_clock: Any, freq: int, fits: bool) -> None:
    host_tsc = HostTsc(GHZ, can_scale=False)
    if not fits:
        with pytest.raises(VmmError, match="cannot scale"):
            GuestClock(still_clock(), host_tsc, freq)
        return
    host = still_clock()
    clock = GuestClock(host, host_tsc, freq)
    host.hrtime += GHZ
    assert clock.read().guest_tsc == GHZ
    assert not clock.scaled


def test_equal_frequencies_need_no_scaling_however_slow(still_clock: Any) -> None:
    assert GuestClock(still_clock(), HostTsc(1_000_000, can_scale=False), 1_000_000).scaled


def test_a_negative_boot_time_is_a_guest_older_than_its_host(still_clock: Any) -> None:
    host = still_clock(3 * 86_400 * GHZ)
    clock = GuestClock(host, HostTsc(GHZ), GHZ)
    clock.import_time(time_data(hrtime=host.hrtime, boot_hrtime=-86_460_000_000_200))
    assert clock.uptime_at(host.hrtime) == 3 * 86_400 * GHZ + 86_460_000_000_200


@pytest.mark.parametrize(
    "damage",
    [
        None,
        [],
        {},
        {"guest_freq": 1.5},
        {"guest_freq": float("nan")},
        {"guest_freq": True},
        {"guest_tsc": U64},
        {"guest_tsc": -1},
        {"hrtime": 1 << 63},
        {"boot_hrtime": -(1 << 63) - 1},
        {"hres_ns": GHZ},
        {"hres_sec": "1"},
        {"extra": 1},
    ],
)
def test_hostile_time_data_is_a_named_error(damage: object) -> None:
    value = {**time_data().model_dump(), **damage} if isinstance(damage, dict) and damage else damage
    with pytest.raises(VmmError) as raised:
        parse_time_data(value)
    assert raised.value.name == "InvalidTimeData"
    assert raised.value.message.endswith(".")


def test_a_virtual_host_is_shifted_and_drifts() -> None:
    plain, shifted = HostClock(), HostClock(offset_ns=-86_400 * GHZ, wall_offset_ns=3_600 * GHZ, drift_ppm=100)
    before = plain.hrtime_ns()
    hrtime, wall = shifted.hrtime_ns(), shifted.wall()
    after = plain.hrtime_ns()
    for raw, holds in ((before, hrtime.__ge__), (after, hrtime.__le__)):
        assert holds(raw + raw // 10_000 - 86_400 * GHZ)
    assert abs(wall[0] - plain.wall()[0] - 3_600) <= 1


def test_clock_fault_names_what_is_wrong(still_clock: Any) -> None:
    host = still_clock()
    clock, heartbeat = GuestClock(host, HostTsc(GHZ), 2 * GHZ), Heartbeat()
    host.hrtime += 100 * GHZ
    assert find_clock_fault(clock, heartbeat, 0, ran_unscaled=False) == ""
    clock.boot_hrtime -= 2_000
    assert "ticks off" in find_clock_fault(clock, heartbeat, 0, ran_unscaled=False)
    # An unscaled host may have been 250 ppm off.
    assert find_clock_fault(clock, heartbeat, 0, ran_unscaled=True) == ""
    heartbeat.backwards = 1
    assert "backwards" in find_clock_fault(clock, heartbeat, 0, ran_unscaled=True)
