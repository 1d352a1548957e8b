"""Two copies of a guest that ran at once are found, and steps that were lost."""

from __future__ import annotations

from typing import Any

from scripts.rig.runs import check_runs


def run(pid: int, *events: tuple[str, int, int]) -> list[dict[str, Any]]:
    """Entries of a run log: (event, time, step)."""
    return [{"pid": pid, "event": event, "monotonic_ns": at, "step": step, "epoch": 1} for event, at, step in events]


def test_one_guest_that_moves_is_fine() -> None:
    logs = {
        "a": run(1, ("run", 0, 0), ("stop", 10, 100), ("exit", 12, 100)),
        "b": run(2, ("run", 11, 100), ("stop", 20, 150), ("run", 21, 150), ("stop", 30, 170)),
    }
    assert check_runs(logs, {}) == []


def test_two_copies_at_once_are_found() -> None:
    logs = {"a": run(1, ("run", 0, 0), ("stop", 10, 100)), "b": run(2, ("run", 9, 100), ("stop", 20, 150))}
    (found,) = check_runs(logs, {})
    assert "two copies ran at once" in found


def test_a_copy_that_never_stopped_is_found() -> None:
    logs = {"a": run(1, ("run", 0, 0)), "b": run(2, ("run", 50, 100))}
    (found,) = check_runs(logs, {})
    assert "two copies ran at once" in found


def test_a_killed_copy_ran_until_it_was_gone() -> None:
    logs = {"a": run(1, ("run", 0, 0)), "b": run(2, ("run", 50, 100))}
    assert check_runs(logs, {1: 40}) == []
    assert len(check_runs(logs, {1: 60})) == 1


def test_steps_that_are_lost_or_executed_twice_are_found() -> None:
    for resumed_at in (90, 110):
        logs = {"a": run(1, ("run", 0, 0), ("stop", 10, 100)), "b": run(2, ("run", 11, resumed_at))}
        (found,) = check_runs(logs, {})
        assert "lost or repeated" in found


def test_a_long_run_hides_no_later_one() -> None:
    """The second run ends before the third begins, but the first spans both."""
    logs = {
        "a": run(1, ("run", 0, 0), ("stop", 100, 50)),
        "b": run(2, ("run", 10, 0), ("stop", 20, 5), ("run", 30, 5), ("stop", 40, 7)),
    }
    assert len([found for found in check_runs(logs, {}) if "two copies" in found]) == 2
