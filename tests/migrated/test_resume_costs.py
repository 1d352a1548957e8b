"""What is kept back for a resume: the VMM's word where it tried, what this host has shown where it only guessed."""

from __future__ import annotations

from typing import Literal

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
