"""Runs of forced aborts that are added to a file are judged together."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.prove_aborts import Abort, judge, together

EARLY = Abort(over_ms=-3.0, pause_over_ms=1.0)
LATE = Abort(over_ms=25.0, pause_over_ms=26.0)


def test_runs_of_a_file_are_judged_together(tmp_path: Path) -> None:
    path = tmp_path / "aborts"
    assert together(([EARLY], []), path) == ([EARLY], [])
    both = together(([LATE], ["attempt 1 is completed"]), path)
    assert both == ([EARLY, LATE], ["attempt 1 is completed"])
    counts, held = judge(both)
    # One violation is told by the run, the other is that the guest was back too late.
    assert (counts["aborts"], counts["pauses_over"], counts["violations"], held) == (2, 2, 2, False)


def test_another_file_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "aborts"
    path.write_text('{"moves": []}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is no run of forced aborts"):
        together(([EARLY], []), path)
