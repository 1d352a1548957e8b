"""Runs of a campaign come back from their file as they were, and are summed up by the kind of guest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.qemu_rig.campaign_figures import MoveFigures, RunFigures, read_runs, spread, summaries, summary

MOVE = MoveFigures(
    downtime_ms=10.0,
    bound_ms=20.0,
    late=False,
    stood_ms=9.0,
    beyond_ms=-2.0,
    gap_ms=30.0,
    total_ms=1000.0,
    ram_mib_per_s=900.0,
    parts_ms={"stop": 1.0, "resume": 2.0},
    predicted_parts_ms={"stop": 1.5, "resume": 2.5},
    scale_ms=3.0,
)
RUN = RunFigures("idle", 100.0, load=0.5, attempts=2, moves=[MOVE], violations=["move 1: it is aborted"], finished=True)


def test_runs_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "records"
    runs = [RUN, replace(RUN, guest="heavy", finished=False)]
    for run in runs:
        run.append_to(path)
    assert read_runs(path) == runs


def test_another_file_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "records"
    RUN.append_to(path)
    with path.open("a") as file:
        file.write('{"moves": [{"downtime_ms": 1}]}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is no run of a campaign"):
        read_runs(path)


def test_runs_of_one_kind_of_guest_are_summed_up_together() -> None:
    late = replace(MOVE, downtime_ms=30.0, late=True, parts_ms={"stop": 3.0})
    unpromised = replace(MOVE, bound_ms=None, downtime_ms=20.0)
    second = replace(RUN, attempts=2, moves=[late, unpromised], violations=[], finished=False)
    found = summaries([RUN, replace(RUN, guest="heavy"), second])
    assert list(found) == ["idle", "heavy"]
    idle = found["idle"]
    assert (idle["moves"], idle["completed"], idle["late"], idle["cut_short"], idle["violations"]) == (4, 3, 1, 1, 1)
    assert idle["downtime_ms"] == {"p50": 20.0, "p99": 30.0, "max": 30.0}
    # One of the two bounds held: 20 ms promised, and 10 and 30 ms taken.
    assert (idle["bounds_held"], idle["bound_over_truth"]) == (1, round((2.0 + 20 / 30) / 2, 3))
    assert idle["parts_ms"] == {"stop": 1.0, "resume": 2.0}


def test_nothing_can_be_summed_up() -> None:
    found = summary([])
    assert (found["completed"], found["bound_over_truth"], found["parts_ms"]) == (0, None, {})
    assert spread([]) == {}
