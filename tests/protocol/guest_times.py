"""Guest time for tests: the example that Propolis publishes, the ranges of its fields, and the adjustment in short."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from protocol.clock import NS_PER_SEC
from protocol.guest_time import (
    I64_MAX,
    I64_MIN,
    U64_MAX,
    TimeAdjustment,
    VmTimeData,
    adjust_time_data,
)

# A shared machine may stall in the middle of an example.
unhurried = settings(deadline=None)
DAY = 86_400 * NS_PER_SEC
SOURCE = VmTimeData(
    guest_freq=2649958945,
    guest_tsc=2330632597459,
    hrtime=18028032305249,
    hres_sec=1683850713,
    hres_ns=581965192,
    boot_hrtime=17148534696948,
)
DESTINATION = {"hrtime": 18018796793122, "hres_sec": 1683850713, "hres_ns": 582072774}
ELAPSED_NS = 107582
u64 = st.integers(0, U64_MAX) | st.sampled_from([0, 1, 1 << 63, U64_MAX])
i64 = st.integers(I64_MIN, I64_MAX) | st.sampled_from([I64_MIN, -1, 0, 1, I64_MAX])


def adjust(source: VmTimeData, hrtime: int, elapsed_ns: int, wall: tuple[int, int] = (0, 0)) -> TimeAdjustment:
    return adjust_time_data(source, destination_hrtime=hrtime, destination_wall=wall, elapsed_ns=elapsed_ns)
