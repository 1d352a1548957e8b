"""The campaign's attempts are kept as they are made, and its figures say what they say."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from scripts.calibration import cell_names
from scripts.calibration_cells import CELLS, CHECKS
from scripts.calibration_figures import figures
from scripts.calibration_records import Outcome, RecordsFile, read_outcomes

MS = 1_000_000


def outcome(
    actual_ms: float = 40, *, upper_ms: float = 50, goal: str = "least", outcome: str = "completed", **changes: Any
) -> Outcome:
    """An attempt that was predicted to stop its guest for 40 ms."""
    downtime = {
        "measured_ns": int(actual_ms * MS), "predicted_ns": 40 * MS, "predicted_upper_ns": int(upper_ms * MS),
        "predicted_regime": "first/quiet-host", "limit_violated": False, "predicted_parts_ns": {},
        "parts": [{"name": "stop", "ns": int(actual_ms * MS)}],
    }  # fmt: skip
    record = {
        "outcome": outcome, "downtime": downtime, "rounds": [], "total_ns": 100 * int(actual_ms * MS),
        "parameters": {"downtime_goal": goal},
    }  # fmt: skip
    made = Outcome("cell", "c", 1, "g", False, False, False, 300.0, 1.0, record)
    return dataclasses.replace(made, **changes)


def test_attempts_are_kept_as_they_are_made_and_count_when_the_campaign_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "records"
    file = RecordsFile(path)
    for seed, cell in ((1, "c"), (1, "c"), (1, "d"), (2, "c")):
        file.add(outcome(seed=seed, cell=cell))
    again = RecordsFile(path)
    assert again.outcomes == file.outcomes
    assert again.done(1) == {"c": 2, "d": 1}


def test_a_line_that_was_cut_off_is_left_out_and_the_file_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "records"
    RecordsFile(path).add(outcome())
    with path.open("a", encoding="utf-8") as file:
        file.write('{"part": "ce')
    RecordsFile(path).add(outcome(actual_ms=41))
    assert [one.actual_ns for one in read_outcomes([path])] == [40 * MS, 41 * MS]


def test_another_file_is_told_from_one_of_attempts(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text('{"migration_id": "m"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of .* is no attempt of a campaign"):
        read_outcomes([path])


def test_coverage_error_and_sharpness_of_every_cell() -> None:
    attempts = [outcome(), outcome(actual_ms=80), outcome(cell="d", actual_ms=20, first_ever=True)]
    found = figures([*attempts, outcome(part="training", actual_ms=1000), outcome(outcome="aborted")])
    assert (found["migrations"], found["stops"], found["switchovers"], found["held"]) == (4, 4, 3, 2)
    assert found["median_error_pct"] == 50.0
    assert found["abort_pct"] == 25.0
    assert {name: (row["switchovers"], row["held"]) for name, row in found["cells"].items()} == {
        "c": (2, 1),
        "d": (1, 1),
    }
    assert found["cells"]["d"]["bound_over_truth"] == 2.5
    assert found["first_ever"]["held"] == 1
    assert found["thin_cells"] == ["c", "d"]


def test_a_forced_attempt_that_fitted_although_its_bound_did_not_is_a_wrong_refusal() -> None:
    found = figures([
        outcome(forced=True, upper_ms=310),
        outcome(forced=True, upper_ms=310, actual_ms=305),
        outcome(forced=True), outcome(upper_ms=310),
    ])  # fmt: skip
    assert (found["forced"], found["would_refuse"]) == (3, 2)
    assert found["wrong_refusal_pct"] == pytest.approx(33.33)


def test_goals_are_compared_in_the_cells_that_have_both() -> None:
    found = figures([
        *(outcome(actual_ms=ms) for ms in (10, 20, 30)),
        *(outcome(actual_ms=ms, goal="first-fit") for ms in (40, 50, 60)),
        outcome(cell="d"),
    ])["goals"]  # fmt: skip
    assert list(found) == ["c"]
    assert found["c"]["downtime_ratio"] == found["c"]["total_ratio"] == 0.4


def test_a_campaign_of_nothing_has_figures_too() -> None:
    found = figures([])
    assert found["migrations"] == 0
    assert found["median_error_pct"] is None


def test_cells_are_named_as_they_are() -> None:
    names = [cell.name for cell in CELLS + CHECKS]
    assert len(set(names)) == len(names)
    assert cell_names(f"{names[0]},{names[-1]}") == {names[0], names[-1]}
    with pytest.raises(argparse.ArgumentTypeError, match="no cell moon"):
        cell_names("moon")
