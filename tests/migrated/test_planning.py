"""The process that plans: it answers, and runs nothing but the daemon's own modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.member.planning import PlanningError, elsewhere


async def test_nothing_that_lies_in_the_working_directory_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is started by hand stands in a directory that others may write to."""
    (tmp_path / "pickle.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    assert await elsewhere(max, 1, 2) == 2
    assert not (tmp_path / "ran").exists()


async def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(PlanningError, match="ended with status 1"):
        await elsewhere(int, "no number")
