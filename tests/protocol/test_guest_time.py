"""Guest time: Propolis' published vector, the invariants over the whole integer ranges, and hostile time data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.clock import NS_PER_SEC
from protocol.guest_time import (
    I64_MAX,
    I64_MIN,
    U64_MAX,
    TimeAdjustError,
    TimeAdjustment,
    TimeStage,
    VmTimeData,
    adjust_time_document,
    parse_time_data,
    time_account,
)
from tests.protocol.guest_times import DAY, DESTINATION, ELAPSED_NS, SOURCE, adjust, i64, u64, unhurried

time_data = st.builds(VmTimeData, guest_freq=u64, guest_tsc=u64, hrtime=i64, hres_sec=u64, hres_ns=u64, boot_hrtime=i64)


def document(source: dict[str, Any] | None = None, destination: dict[str, Any] | None = None, **rest: Any) -> Any:
    """The published document with some values replaced."""
    return {
        "source": SOURCE.model_dump() | (source or {}),
        "destination": DESTINATION | (destination or {}),
        "elapsed_ns": ELAPSED_NS,
    } | rest


def test_the_published_propolis_vector() -> None:
    wall = (DESTINATION["hres_sec"], DESTINATION["hres_ns"])
    assert adjust(SOURCE, DESTINATION["hrtime"], ELAPSED_NS, wall) == TimeAdjustment(
        adjusted=VmTimeData(
            guest_freq=2649958945,
            guest_tsc=2330632882546,
            hrtime=18018796793122,
            hres_sec=1683850713,
            hres_ns=582072774,
            boot_hrtime=17139299077239,
        ),
        guest_uptime_ns=879497608301,
        tsc_delta=285087,
        boot_hrtime_delta=879497715883,
    )


def test_the_tsc_wraps() -> None:
    source = SOURCE.model_copy(update={"guest_freq": NS_PER_SEC, "guest_tsc": U64_MAX})
    assert adjust(source, 0, 3_000_000_003).adjusted.guest_tsc == 3_000_000_002


def test_a_guest_older_than_its_host_has_a_negative_boot_hrtime() -> None:
    source = SOURCE.model_copy(update={"hrtime": 10 * DAY, "boot_hrtime": 6 * DAY})
    moved = adjust(source, 3 * DAY + 300, 60 * NS_PER_SEC + 500).adjusted
    assert moved.boot_hrtime == -86_460_000_000_200
    # And such a guest moves on as any other.
    assert adjust(moved, 5, 7).adjusted.boot_hrtime == 5 - (4 * DAY + 60 * NS_PER_SEC + 507)


@st.composite
def representable_moves(draw: st.DrawFn) -> tuple[VmTimeData, int, int]:
    """Source time data, destination hrtime and elapsed time that nothing forbids, over their whole ranges."""
    uptime = draw(st.integers(0, I64_MAX))
    boot = draw(st.integers(I64_MIN, I64_MAX - uptime))
    freq = draw(st.integers(1, U64_MAX) | st.integers(1, 10 * NS_PER_SEC))
    longest = min(I64_MAX - uptime, ((U64_MAX + 1) * NS_PER_SEC - 1) // freq)
    elapsed_ns = draw(st.integers(0, longest) | st.just(longest))
    wall_ns = st.integers(0, NS_PER_SEC - 1)
    source = VmTimeData(
        guest_freq=freq,
        guest_tsc=draw(u64),
        hrtime=boot + uptime,
        hres_sec=draw(u64),
        hres_ns=draw(wall_ns),
        boot_hrtime=boot,
    )
    return source, draw(st.integers(0, I64_MAX)), elapsed_ns


@unhurried
@given(representable_moves(), u64, st.integers(0, NS_PER_SEC - 1), i64)
def test_the_invariants_hold_over_the_whole_ranges(
    move: tuple[VmTimeData, int, int], sec: int, ns: int, timer: int
) -> None:
    source, hrtime, elapsed_ns = move
    adjustment = adjust(source, hrtime, elapsed_ns, (sec, ns))
    after = adjustment.adjusted
    uptime = source.hrtime - source.boot_hrtime
    assert adjustment.guest_uptime_ns == uptime
    assert adjustment.boot_hrtime_delta == after.hrtime - after.boot_hrtime == uptime + elapsed_ns
    assert adjustment.tsc_delta == elapsed_ns * source.guest_freq // NS_PER_SEC
    assert (after.guest_tsc - source.guest_tsc - adjustment.tsc_delta) % (1 << 64) == 0
    assert (after.guest_freq, after.hrtime, after.hres_sec, after.hres_ns) == (source.guest_freq, hrtime, sec, ns)
    # A device timer travels relative to boot_hrtime: counted from now, it is due elapsed_ns sooner.
    due_in = (timer - source.boot_hrtime + after.boot_hrtime) - after.hrtime
    assert due_in == (timer - source.hrtime) - elapsed_ns


def expected_error(source: VmTimeData, hrtime: int, elapsed_ns: int, wall: tuple[int, int]) -> str | None:
    """The original's steps, written down as the arithmetic of its fixed-width types."""
    if hrtime < 0:
        return "Hrtime"
    if not 0 <= elapsed_ns <= I64_MAX:
        return "InvalidMigrateDelta"
    uptime = source.hrtime - source.boot_hrtime
    if not 0 <= uptime <= I64_MAX:
        return "GuestUptimeOverflow"
    if uptime + elapsed_ns > I64_MAX:
        return "TimeDeltaOverflow"
    if source.guest_freq == 0:
        return "InvalidFrequency"
    if elapsed_ns * source.guest_freq // NS_PER_SEC > U64_MAX:
        return "TscAdjustOverflow"
    if max(source.hres_ns, wall[1]) >= NS_PER_SEC:
        return "InvalidWallClock"
    return None


@unhurried
@given(time_data, i64, u64, u64, st.integers(-1, 1 << 65) | st.integers(0, 1 << 40))
def test_the_originals_error_wins(source: VmTimeData, hrtime: int, sec: int, ns: int, elapsed_ns: int) -> None:
    result = adjust_time_document(
        {
            "source": source.model_dump(),
            "destination": {"hrtime": hrtime, "hres_sec": sec, "hres_ns": ns},
            "elapsed_ns": elapsed_ns,
        }
    )
    assert result.get("error") == expected_error(source, hrtime, elapsed_ns, (sec, ns))
    assert result.get("message", ".").endswith(".")


@pytest.mark.parametrize(
    ("name", "source", "destination", "elapsed_ns"),
    [
        ("Hrtime", {}, {"hrtime": -1}, 0),
        ("Hrtime", {"guest_freq": 0, "hres_ns": U64_MAX}, {"hrtime": I64_MIN}, -1),
        ("InvalidMigrateDelta", {}, {}, -1),
        ("InvalidMigrateDelta", {}, {}, I64_MAX + 1),
        pytest.param("InvalidMigrateDelta", {}, {}, 10**5000, id="beyond the digits that Python prints"),
        ("GuestUptimeOverflow", {"hrtime": I64_MAX, "boot_hrtime": -1}, {}, 0),
        ("GuestUptimeOverflow", {"hrtime": I64_MAX, "boot_hrtime": I64_MIN}, {}, 0),
        ("GuestUptimeOverflow", {"hrtime": 5, "boot_hrtime": 6}, {}, 0),
        ("TimeDeltaOverflow", {"hrtime": I64_MAX, "boot_hrtime": 0}, {}, 1),
        ("TscAdjustOverflow", {"guest_freq": U64_MAX}, {}, NS_PER_SEC + 1),
        ("TscAdjustOverflow", {"guest_freq": U64_MAX, "hres_ns": NS_PER_SEC}, {}, NS_PER_SEC + 1),
        ("InvalidFrequency", {"guest_freq": 0}, {}, 0),
        ("InvalidFrequency", {"guest_freq": 0, "hres_ns": NS_PER_SEC}, {}, 0),
        ("InvalidWallClock", {"hres_ns": NS_PER_SEC}, {}, 0),
        ("InvalidWallClock", {"hres_ns": 1 << 32}, {}, 0),
        ("InvalidWallClock", {"hres_sec": U64_MAX, "hres_ns": U64_MAX}, {}, 0),
        ("InvalidWallClock", {}, {"hres_ns": NS_PER_SEC}, 0),
    ],
)
def test_each_error_has_its_name(
    name: str, source: dict[str, int], destination: dict[str, int], elapsed_ns: int
) -> None:
    result = adjust_time_document(document(source, destination, elapsed_ns=elapsed_ns))
    assert set(result) == {"error", "message"}
    assert result["error"] == name


@pytest.mark.parametrize(
    ("source", "destination", "elapsed_ns"),
    [
        ({"hrtime": I64_MAX, "boot_hrtime": 0}, {"hrtime": 0}, 0),
        ({"hrtime": -1, "boot_hrtime": I64_MIN}, {"hrtime": I64_MAX}, 0),
        ({"guest_freq": U64_MAX, "hrtime": 0, "boot_hrtime": 0}, {}, NS_PER_SEC),
        ({"guest_freq": 1, "hrtime": 0, "boot_hrtime": 0}, {"hrtime": 0}, I64_MAX),
        ({"hres_sec": U64_MAX, "hres_ns": NS_PER_SEC - 1}, {"hres_sec": U64_MAX}, 0),
    ],
)
def test_the_last_representable_values_pass(
    source: dict[str, int], destination: dict[str, int], elapsed_ns: int
) -> None:
    assert "adjusted" in adjust_time_document(document(source, destination, elapsed_ns=elapsed_ns))


def test_clocks_of_the_destination_that_do_not_fit_are_refused() -> None:
    for hrtime, wall, name in (
        (I64_MAX + 1, (0, 0), "Hrtime"),
        (0, (-1, 0), "InvalidWallClock"),
        (0, (U64_MAX + 1, 0), "InvalidWallClock"),
        (0, (0, -1), "InvalidWallClock"),
    ):
        with pytest.raises(TimeAdjustError) as refused:
            adjust(SOURCE, hrtime, 0, wall)
        assert refused.value.name == name


@pytest.mark.parametrize("field", list(VmTimeData.model_fields))
@pytest.mark.parametrize(
    "value",
    [1.0, float("nan"), float("inf"), True, None, "1", b"1", [], {}, [1], U64_MAX + 1, I64_MIN - 1, 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_hostile_field_values_are_a_named_error(field: str, value: object) -> None:
    result = adjust_time_document(document({field: value}))
    assert result["error"] == "InvalidTimeData"
    assert f"source.{field}" in result["message"]
    with pytest.raises(TimeAdjustError) as refused:
        parse_time_data(SOURCE.model_dump() | {field: value})
    assert refused.value.name == "InvalidTimeData"


def test_signs_belong_to_the_fields() -> None:
    for field in ("guest_freq", "guest_tsc", "hres_sec", "hres_ns"):
        assert adjust_time_document(document({field: -1}))["error"] == "InvalidTimeData"
    for field in ("hrtime", "boot_hrtime"):
        assert adjust_time_document(document({field: 1 << 63}))["error"] == "InvalidTimeData"


@pytest.mark.parametrize(
    "hostile",
    [
        None,
        7,
        "time",
        [],
        {},
        {1: 2},
        {"\ud800": 1},
        document(extra=1),
        document(source={"extra": 1}),
        document(source={"\udfff": 1}),
        document(destination={"x\n" * 10_000: 1}),
        document(elapsed_ns=1.5),
        document(elapsed_ns="1"),
        document(elapsed_ns=False),
        document(source=None) | {"source": None},
        document() | {"source": {key: value for key, value in SOURCE.model_dump().items() if key != "guest_tsc"}},
        {key: value for key, value in document().items() if key != "destination"},
    ],
)
def test_hostile_documents_are_a_named_error(hostile: object) -> None:
    result = adjust_time_document(hostile)
    assert result["error"] == "InvalidTimeData"
    assert len(result["message"]) < 300
    assert result["message"].isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@unhurried
@given(st.dictionaries(st.sampled_from(["source", "destination", "elapsed_ns"]), json_values) | json_values)
def test_no_document_raises(value: object) -> None:
    assert adjust_time_document(value)["error"] == "InvalidTimeData"


def test_the_result_of_adjust_time_is_the_published_json() -> None:
    assert json.loads(json.dumps(adjust_time_document(json.loads(json.dumps(document()))))) == {
        "adjusted": {
            "guest_freq": 2649958945,
            "guest_tsc": 2330632882546,
            "hrtime": 18018796793122,
            "hres_sec": 1683850713,
            "hres_ns": 582072774,
            "boot_hrtime": 17139299077239,
        },
        "guest_uptime_ns": 879497608301,
        "tsc_delta": 285087,
        "boot_hrtime_delta": 879497715883,
    }


def test_the_account_adds_up_stage_by_stage() -> None:
    wall = (DESTINATION["hres_sec"], DESTINATION["hres_ns"])
    adjustment = adjust(SOURCE, DESTINATION["hrtime"], ELAPSED_NS, wall)
    stages = time_account(SOURCE, adjustment, elapsed_ns=ELAPSED_NS, daemon_ns=22_000, vmm_ns=31_850, vmm_ticks=84_400)
    assert stages == (
        TimeStage(name="migration", ns=107_582, tsc_delta=285_087, boot_hrtime_delta=-9_235_619_709),
        TimeStage(name="daemon", ns=22_000, tsc_delta=0, boot_hrtime_delta=0),
        TimeStage(name="vmm", ns=9_850, tsc_delta=84_400, boot_hrtime_delta=0),
    )
    assert SOURCE.guest_tsc + sum(stage.tsc_delta for stage in stages) == 2_330_632_966_946
    assert SOURCE.boot_hrtime + sum(stage.boot_hrtime_delta for stage in stages) == adjustment.adjusted.boot_hrtime


def test_the_account_of_the_most_distant_boot_times_wraps_to_64_bits() -> None:
    source = SOURCE.model_copy(update={"hrtime": I64_MIN, "boot_hrtime": I64_MIN})
    adjustment = adjust(source, I64_MAX, 0)
    migration, daemon, vmm = time_account(source, adjustment, elapsed_ns=0, daemon_ns=9, vmm_ns=5, vmm_ticks=0)
    assert migration.boot_hrtime_delta == -1
    assert (source.boot_hrtime + migration.boot_hrtime_delta) % (1 << 64) == adjustment.adjusted.boot_hrtime
    # The VMM saw less time than the daemon says it took: the account never covers more than really passed.
    assert (daemon.ns, vmm.ns) == (5, 0)
