"""How fast the workload writes."""

from __future__ import annotations

from vmm_sim.content import PAGE_SIZE
from vmm_sim.vcpu import Pace

MS = 1_000_000
RATE = 100 << 20


def test_a_rate_is_kept_whatever_the_ticks() -> None:
    pace, now, made = Pace(0), 0, 0
    for late_us in (0, 10, 400, 950) * 250:
        now += MS + 1000 * late_us
        writes = pace.due(now, RATE)
        pace.made(writes)
        made += writes
    assert abs(made * PAGE_SIZE - RATE * now / 1e9) < 2 * PAGE_SIZE


def test_time_without_a_processor_is_not_made_up_for() -> None:
    pace = Pace(0)
    assert pace.due(40 * MS, RATE) <= 2 * RATE // 1000 // PAGE_SIZE + 1
    pace.made(pace.due(40 * MS, RATE))
    assert pace.due(41 * MS, RATE) <= RATE // 1000 // PAGE_SIZE + 1


def test_a_write_that_takes_longer_than_a_tick_is_earned_over_many() -> None:
    pace, writes = Pace(0), 0
    for tick in range(1, 2001):
        due = pace.due(tick * MS, PAGE_SIZE * 10)
        pace.made(due)
        writes += due
    assert writes in (19, 20)
