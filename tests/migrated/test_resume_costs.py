"""What a resume is expected to take and what is kept back for it: the VMM's word where it tried, and where it only
guessed, what this host has shown."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from migrated.state.learned import keep_resume_costs, load_resume_costs
from migrated.vmm.resume_costs import ResumeCosts
from migrated.vmm.seam import ExpectedCosts

MS = 1_000_000
LIMIT_NS = 100 * MS
FLOOR_NS = 7 * MS


def costs(basis: Literal["tried", "guessed"], resume_ns: int = 0, call_ns: int = 0) -> ExpectedCosts:
    return ExpectedCosts((), 0, resume_ns, call_ns, basis)


def test_a_guess_of_nothing_is_counted_with_the_floor_until_a_resume_was_seen() -> None:
    known = ResumeCosts(FLOOR_NS)
    assert known.expected_ns("qemu", costs("guessed")) == FLOOR_NS
    assert known.reserve_ns("qemu", costs("guessed"), LIMIT_NS) == FLOOR_NS
    known.add("qemu", 3 * MS, costs("guessed"))
    assert known.expected_ns("qemu", costs("guessed")) == 3 * MS


@pytest.mark.parametrize(("guess_ms", "reserve_ms"), [(2, 7), (9, 9)])
def test_a_guess_is_expected_as_it_is_and_the_reserve_has_a_floor(guess_ms: int, reserve_ms: int) -> None:
    known, guessed = ResumeCosts(FLOOR_NS), costs("guessed", guess_ms * MS)
    assert known.expected_ns("qemu", guessed) == guess_ms * MS
    assert known.reserve_ns("qemu", guessed, LIMIT_NS) == reserve_ms * MS
    # What follows a COMMIT is resumed elsewhere, by a VMM of which as little is known.
    assert known.commit_reserve_ns("qemu", guessed, 3 * MS, LIMIT_NS) == (3 + reserve_ms - guess_ms) * MS


def test_what_one_driver_showed_says_nothing_of_another() -> None:
    known = ResumeCosts(FLOOR_NS)
    known.add("qemu", 3 * MS, costs("guessed"))
    assert known.expected_ns("other", costs("guessed")) == FLOOR_NS


def test_the_median_of_resumes_is_expected_and_a_part_of_what_lies_above_it_kept_back() -> None:
    known = ResumeCosts(FLOOR_NS)
    for took_ms in (4, 5, 6, 5, 400):  # one stall
        known.add("qemu", took_ms * MS, costs("guessed"))
    assert known.expected_ns("qemu", costs("guessed")) == 5 * MS
    assert known.reserve_ns("qemu", costs("guessed"), LIMIT_NS) == 5 * MS + LIMIT_NS // 10


def test_costs_that_were_tried_are_taken_as_they_are_and_only_the_reserve_learns() -> None:
    known = ResumeCosts(FLOOR_NS)
    tried = costs("tried", 2 * MS, call_ns=MS)
    assert known.reserve_ns("sim", tried, LIMIT_NS) == 3 * MS
    known.add("sim", 6 * MS, tried)
    assert known.expected_ns("sim", tried) == 2 * MS
    assert known.reserve_ns("sim", tried, LIMIT_NS) == 6 * MS
    known.add("sim", 500 * MS, tried)
    assert known.reserve_ns("sim", tried, LIMIT_NS) == 2 * MS + LIMIT_NS // 10


def test_what_comes_after_a_commit_is_reserved_as_it_was_measured() -> None:
    known = ResumeCosts(FLOOR_NS)
    tried = costs("tried", 4 * MS, call_ns=MS)
    assert known.commit_reserve_ns("sim", tried, 2 * MS, LIMIT_NS) == 3 * MS  # the longest call stands in
    for took_ms in (*[3] * 10, 6):
        known.add_commit(took_ms * MS, 2 * MS)
    assert known.commit_reserve_ns("sim", tried, 2 * MS, LIMIT_NS) == 6 * MS
    known.add_commit(2000 * MS, 2 * MS)  # one stall
    assert known.commit_reserve_ns("sim", tried, 2 * MS, LIMIT_NS) == 2 * MS + LIMIT_NS // 10


def test_what_was_measured_outlives_the_daemon(tmp_path: Path) -> None:
    known = ResumeCosts(FLOOR_NS)
    known.add("qemu", 3 * MS, costs("guessed"))
    known.add("sim", 6 * MS, costs("tried", 2 * MS))
    known.add_commit(5 * MS, 2 * MS)
    keep_resume_costs(tmp_path, known.document())
    again = load_resume_costs(tmp_path, FLOOR_NS)
    assert again.expected_ns("qemu", costs("guessed")) == 3 * MS
    assert again.reserve_ns("sim", costs("tried", 2 * MS), LIMIT_NS) == 6 * MS
    assert again.commit_reserve_ns("sim", costs("tried"), 2 * MS, LIMIT_NS) == 5 * MS


@pytest.mark.parametrize(
    "kept", ["", "[]", '{"version": 1}', '{"version": 1, "over": ["x"], "commit_over": [], "whole": {}}']
)
def test_a_file_that_cannot_be_read_costs_only_what_was_measured(tmp_path: Path, kept: str) -> None:
    (tmp_path / "resume-costs.json").write_text(kept)
    again = load_resume_costs(tmp_path, FLOOR_NS)
    assert again.expected_ns("qemu", costs("guessed")) == FLOOR_NS


def test_a_file_cannot_reserve_more_than_a_stall_could() -> None:
    known = ResumeCosts(FLOOR_NS)
    known.read({"version": 1, "over": [10**18] * 64, "commit_over": [10**18] * 64, "whole": {}})
    assert known.commit_reserve_ns("sim", costs("tried"), 2 * MS, LIMIT_NS) == 2 * MS + LIMIT_NS // 10
