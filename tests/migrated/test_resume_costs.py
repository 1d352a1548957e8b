"""What is kept back for a resume: the VMM's word where it tried, what this host has shown where it only guessed."""

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
    assert known.expected_ns("qemu", costs("guessed"), LIMIT_NS) == FLOOR_NS
    assert known.reserve_ns("qemu", costs("guessed"), LIMIT_NS) == FLOOR_NS
    known.add("qemu", 3 * MS, costs("guessed"))
    assert known.expected_ns("qemu", costs("guessed"), LIMIT_NS) == 3 * MS


def test_a_prior_above_the_floor_counts() -> None:
    assert ResumeCosts(FLOOR_NS).expected_ns("qemu", costs("guessed", 9 * MS), LIMIT_NS) == 9 * MS


def test_what_one_driver_showed_says_nothing_of_another() -> None:
    known = ResumeCosts(FLOOR_NS)
    known.add("qemu", 3 * MS, costs("guessed"))
    assert known.expected_ns("other", costs("guessed"), LIMIT_NS) == FLOOR_NS


def test_a_guess_is_counted_with_the_median_and_a_part_of_what_lies_above_it() -> None:
    known = ResumeCosts(FLOOR_NS)
    for took_ms in (4, 5, 6, 5, 400):  # one stall
        known.add("qemu", took_ms * MS, costs("guessed"))
    assert known.expected_ns("qemu", costs("guessed"), LIMIT_NS) == 5 * MS + LIMIT_NS // 10


def test_costs_that_were_tried_are_taken_as_they_are_and_only_the_reserve_learns() -> None:
    known = ResumeCosts(FLOOR_NS)
    tried = costs("tried", 2 * MS, call_ns=MS)
    assert known.reserve_ns("sim", tried, LIMIT_NS) == 3 * MS
    known.add("sim", 6 * MS, tried)
    assert known.expected_ns("sim", tried, LIMIT_NS) == 2 * MS
    assert known.reserve_ns("sim", tried, LIMIT_NS) == 6 * MS
    known.add("sim", 500 * MS, tried)
    assert known.reserve_ns("sim", tried, LIMIT_NS) == 2 * MS + LIMIT_NS // 10


def test_what_comes_after_a_commit_is_reserved_as_it_was_measured() -> None:
    known = ResumeCosts(FLOOR_NS)
    assert known.commit_reserve_ns(2 * MS, MS, LIMIT_NS) == 3 * MS  # the longest call stands in
    for took_ms in (*[3] * 10, 6):
        known.add_commit(took_ms * MS, 2 * MS)
    assert known.commit_reserve_ns(2 * MS, MS, LIMIT_NS) == 6 * MS
    known.add_commit(2000 * MS, 2 * MS)  # one stall
    assert known.commit_reserve_ns(2 * MS, MS, LIMIT_NS) == 2 * MS + LIMIT_NS // 10


def test_what_was_measured_outlives_the_daemon(tmp_path: Path) -> None:
    known = ResumeCosts(FLOOR_NS)
    known.add("qemu", 3 * MS, costs("guessed"))
    known.add("sim", 6 * MS, costs("tried", 2 * MS))
    known.add_commit(5 * MS, 2 * MS)
    keep_resume_costs(tmp_path, known.document())
    again = load_resume_costs(tmp_path, FLOOR_NS)
    assert again.expected_ns("qemu", costs("guessed"), LIMIT_NS) == 3 * MS
    assert again.reserve_ns("sim", costs("tried", 2 * MS), LIMIT_NS) == 6 * MS
    assert again.commit_reserve_ns(2 * MS, 0, LIMIT_NS) == 5 * MS


@pytest.mark.parametrize(
    "kept", ["", "[]", '{"version": 1}', '{"version": 1, "over": ["x"], "commit_over": [], "whole": {}}']
)
def test_a_file_that_cannot_be_read_costs_only_what_was_measured(tmp_path: Path, kept: str) -> None:
    (tmp_path / "resume-costs.json").write_text(kept)
    again = load_resume_costs(tmp_path, FLOOR_NS)
    assert again.expected_ns("qemu", costs("guessed"), LIMIT_NS) == FLOOR_NS


def test_a_file_cannot_reserve_more_than_a_stall_could() -> None:
    known = ResumeCosts(FLOOR_NS)
    known.read({"version": 1, "over": [10**18] * 64, "commit_over": [10**18] * 64, "whole": {}})
    assert known.commit_reserve_ns(2 * MS, 0, LIMIT_NS) == 2 * MS + LIMIT_NS // 10
