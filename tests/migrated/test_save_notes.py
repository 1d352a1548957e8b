"""Notes of saves that are not over: what a restarted daemon knows of them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from migrated.state.save_notes import SaveNote, SaveNotes


def test_a_note_that_the_disk_takes_half_of_is_not_written(tmp_path: Path) -> None:
    """The save must not begin: a restarted daemon would not know that its guest stands still."""
    note = SaveNote("ab", "g1", "/d/.part", "/d/g1", ends_guest=True, was_running=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            SaveNotes(tmp_path).write(note)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_notes_survive_the_daemon_and_a_torn_one_is_none(tmp_path: Path) -> None:
    note = SaveNote("ab", "g1", "/d/.part", "/d/g1", ends_guest=True, was_running=True)
    SaveNotes(tmp_path).write(note)
    (tmp_path / "saves" / "torn.json").write_text('{"save_id": "c')
    notes = SaveNotes(tmp_path)
    assert notes.read() == [note]
    notes.remove("ab")
    notes.remove("ab")
    assert notes.read() == []
    assert list((tmp_path / "saves").iterdir()) == []
