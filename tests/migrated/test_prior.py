"""The prior table is made from records, and says what they say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from migrated.prediction.prior import Prior
from migrated.record.model import DowntimePart
from migrated.record.parts import Component, Part
from migrated.state.learned import load_prior
from scripts.prior import quiet_switchovers, table, text

MS = 1_000_000


def lines(record_of: Callable[..., Any], downtime_of: Callable[..., Any], regime: str, count: int) -> list[str]:
    """Records of resumes that took 3 ms beside what was tried, and of device loads that took half as long again."""
    draw = random.Random(4)
    found: list[str] = []
    for number in range(count):
        resume_ns = MS + 3 * MS + int(draw.gauss(0, 0.5) * MS)
        load_ns = int(40 * MS * 1.5 * draw.uniform(0.95, 1.05))
        parts = (DowntimePart.of(Part.DEVICE_LOADS, load_ns), DowntimePart.of(Part.RESUME, resume_ns))
        downtime = downtime_of(
            resume_ns + load_ns, parts=parts, predicted_regime=regime,
            predicted_bases_ns={Component.RESUME: MS, Component.DEVICE_LOADS: 40 * MS},
        )  # fmt: skip
        record = record_of(migration_id=str(number), downtime=downtime, devices=())
        found.append(json.dumps({"cell": "c", "first": True, "forced": False, "limit_ms": 300, **record.document()}))
    return found


def test_the_table_has_the_costs_and_spreads_of_the_records(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    records = quiet_switchovers(lines(record_of, downtime_of, "first/quiet-host", 60))
    before = load_prior()
    made = Prior.from_document(json.loads(text(table(records, before, {"made_by": "a test"}))))
    resume, loads = made.components[Component.RESUME], made.components[Component.DEVICE_LOADS]
    assert resume.overhead_ns == pytest.approx(3 * MS, rel=0.1)
    assert resume.spread_ns == pytest.approx(0.5 * MS, rel=0.5)
    assert loads.factor * 40 * MS + loads.overhead_ns == pytest.approx(60 * MS, rel=0.05)
    assert loads.spread < 0.06
    assert made.provenance == {"made_by": "a test"}
    assert list(made.scores) == sorted(made.scores)


def test_a_busy_host_teaches_the_table_nothing(record_of: Callable[..., Any], downtime_of: Callable[..., Any]) -> None:
    assert not quiet_switchovers(lines(record_of, downtime_of, "first/busy-host", 30))


def test_a_handful_of_records_is_no_table(record_of: Callable[..., Any], downtime_of: Callable[..., Any]) -> None:
    records = quiet_switchovers(lines(record_of, downtime_of, "first/quiet-host", 5))
    with pytest.raises(ValueError, match="too few"):
        table(records, load_prior(), {})


def test_the_table_that_ships_says_how_it_was_made() -> None:
    provenance = load_prior().provenance
    assert provenance["made_by"]
    assert provenance["settings"]
