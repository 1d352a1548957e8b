"""The prior table is made from records, and says what they say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrated.prediction.prior import Prior
from migrated.record.model import DowntimePart
from migrated.record.parts import Component, Part
from migrated.state.learned import load_prior
from scripts.calibration_records import Outcome
from scripts.calibration_records import Part as Purpose
from scripts.prior import left_out, switchovers, table, text, write

MS = 1_000_000


def outcomes(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any], count: int, part: Purpose = "cell",
    load: float = 1.0,
) -> list[Outcome]:  # fmt: skip
    """Attempts whose resumes took 3 ms for a load of 1 beside what was tried, and device loads half as long again."""
    draw = random.Random(4)
    found: list[Outcome] = []
    for number in range(count):
        resume_ns = MS + int(load * (3 * MS + draw.gauss(0, 0.5) * MS))
        load_ns = int(40 * MS * 1.5 * draw.uniform(0.95, 1.05))
        parts = (DowntimePart.of(Part.DEVICE_LOADS, load_ns), DowntimePart.of(Part.RESUME, resume_ns))
        downtime = downtime_of(
            resume_ns + load_ns, parts=parts, predicted_load=load,
            predicted_bases_ns={Component.RESUME: MS, Component.DEVICE_LOADS: 40 * MS},
        )  # fmt: skip
        record = record_of(migration_id=str(number), downtime=downtime, devices=())
        cell = f"c{number % 2}"
        found.append(Outcome(part, cell, 1, record.guest, True, True, False, 300.0, load, record.document()))
    return found


@pytest.mark.parametrize("load", [1.0, 3.0])
def test_the_table_has_the_costs_of_the_records_for_a_load_of_one_and_the_spread_of_each_load(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any], load: float
) -> None:
    seen = switchovers(outcomes(record_of, downtime_of, 60, load=load))
    made = Prior.from_document(json.loads(text(table(seen, load_prior(), {"made_by": "a test"}))))
    resume, loads = made.components[Component.RESUME], made.components[Component.DEVICE_LOADS]
    assert resume.overhead_ns == pytest.approx(3 * MS, rel=0.1)
    assert resume.beside_spread_ns(load) == pytest.approx(load * 0.5 * MS, rel=0.5)
    other = load_prior().components[Component.RESUME]
    if load == 1.0:
        assert resume.waiting_spread_ns == other.waiting_spread_ns
    else:  # nothing was seen of a calm host
        assert resume.spread_ns == other.spread_ns
    if load == 1.0:  # what was tried on a busy host contains the waiting there, and says nothing of a factor
        assert loads.expected_ns(40 * MS, 0, 0, load) == pytest.approx(60 * MS, rel=0.05)
        assert loads.spread < 0.06
    assert made.provenance == {"made_by": "a test"}
    assert list(made.scores) == sorted(made.scores)


def test_checks_teach_the_table_nothing(record_of: Callable[..., Any], downtime_of: Callable[..., Any]) -> None:
    assert not switchovers(outcomes(record_of, downtime_of, 30, part="check"))


def test_a_handful_of_records_is_no_table(record_of: Callable[..., Any], downtime_of: Callable[..., Any]) -> None:
    seen = switchovers(outcomes(record_of, downtime_of, 5))
    with pytest.raises(ValueError, match="too few"):
        table(seen, load_prior(), {})


def test_a_cell_is_judged_by_a_table_that_was_made_without_it(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    lines = list(left_out(switchovers(outcomes(record_of, downtime_of, 60)), load_prior()))
    assert [line.split(":")[0] for line in lines] == ["c0", "c1"]
    assert all(" of 30 held, bound over truth 1." in line for line in lines)


def test_a_table_replaces_the_file_that_it_was_made_with(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "prior.json"
    path.write_text(text(load_prior()), encoding="utf-8")
    before = Prior.from_document(json.loads(path.read_bytes()))
    write(table(switchovers(outcomes(record_of, downtime_of, 60)), before, {"made_by": "a test"}), path)
    assert json.loads(path.read_bytes())["provenance"] == {"made_by": "a test"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_that_ships_says_how_it_was_made() -> None:
    provenance = load_prior().provenance
    assert provenance["made_by"]
    assert provenance["settings"]
