"""The daemon's marks survive it, are bounded, and a torn one is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrated.state.run_marks import KEPT_MARKS, RunMarkError, RunMarks
from scripts.rig.disk import full


def test_a_mark_survives_the_daemon_and_can_be_withdrawn(tmp_path: Path) -> None:
    marks = RunMarks(tmp_path)
    marks.write("g1", 3)
    marks.write("g1", 4)
    marks.withdraw("g1", 4)
    marks.close()
    again = RunMarks(tmp_path)
    assert again.ran("g1", 3)
    assert not again.ran("g1", 4)
    assert not again.ran("g2", 3)
    again.close()


def test_the_same_mark_is_written_once(tmp_path: Path) -> None:
    marks = RunMarks(tmp_path)
    for _ in range(3):
        marks.write("g1", 1)
    marks.close()
    assert len((tmp_path / "run-marks").read_bytes().splitlines()) == 1


def test_a_torn_line_is_no_mark(tmp_path: Path) -> None:
    marks = RunMarks(tmp_path)
    marks.write("g1", 1)
    marks.write("g1", 2)
    marks.close()
    path = tmp_path / "run-marks"
    path.write_bytes(path.read_bytes()[:-5])
    again = RunMarks(tmp_path)
    assert again.ran("g1", 1)
    assert not again.ran("g1", 2)
    again.close()


def test_a_mark_that_follows_a_torn_line_is_whole(tmp_path: Path) -> None:
    (tmp_path / "run-marks").write_bytes(b'{"guest":"g1","epoch":1,"ran":true}\n{"guest":"g1","ep')
    marks = RunMarks(tmp_path)
    marks.write("g1", 2)
    marks.withdraw("g1", 1)
    marks.close()
    again = RunMarks(tmp_path)
    assert again.ran("g1", 2)
    assert not again.ran("g1", 1)
    again.close()


def test_marks_of_a_directory_that_is_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunMarkError, match="cannot be opened: No such file or directory"):
        RunMarks(tmp_path / "nowhere")


def test_the_oldest_marks_go(tmp_path: Path) -> None:
    marks = RunMarks(tmp_path)
    for epoch in range(KEPT_MARKS + 10):
        marks.write("g1", epoch)
    marks.close()
    again = RunMarks(tmp_path)
    assert not again.ran("g1", 9)
    assert again.ran("g1", 10)
    assert len((tmp_path / "run-marks").read_bytes().splitlines()) == KEPT_MARKS
    again.close()


def test_a_mark_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    marks = RunMarks(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, marks._fd)
    os.close(full)
    with pytest.raises(RunMarkError, match="cannot be written"):
        marks.write("g1", 1)
    assert not marks.ran("g1", 1)
    marks.close()


def test_a_file_that_has_grown_is_put_in_order_while_the_daemon_runs(tmp_path: Path) -> None:
    marks = RunMarks(tmp_path)
    for epoch in range(5 * KEPT_MARKS + 1):
        marks.write("g1", epoch)
    marks.tidy()
    assert len((tmp_path / "run-marks").read_bytes().splitlines()) == KEPT_MARKS
    marks.write("g2", 1)
    marks.tidy()
    marks.close()
    again = RunMarks(tmp_path)
    assert again.ran("g2", 1)
    assert again.ran("g1", 5 * KEPT_MARKS)
    again.close()


def test_marks_of_an_attempt_that_began_are_written_on_a_disk_that_is_full_meanwhile(small_disk: Path) -> None:
    marks = RunMarks(small_disk)
    marks.make_room()
    with full(small_disk):
        for epoch in range(50):
            marks.write("g1", epoch)
            marks.withdraw("g1", epoch)
        with pytest.raises(RunMarkError, match="no room for another attempt: No space left on device"):
            marks.make_room()
    marks.make_room()
    marks.close()
