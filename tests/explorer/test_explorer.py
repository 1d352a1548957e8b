"""The hand-over holds under every interleaving, and every mutant of it is caught."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from protocol.handover import DESTINATION, SOURCE
from scripts.proof.explorer import Explorer, explore
from scripts.proof.model import Guest, Marks, Model
from scripts.proof.mutants import MUTANTS, SHARED, Mutant


@pytest.mark.parametrize("marks", [Marks.VMM, Marks.DAEMON])
def test_no_interleaving_breaks_a_rule_and_every_row_is_used(marks: Marks, capsys: pytest.CaptureFixture[str]) -> None:
    found = explore(Model(marks=marks))
    with capsys.disabled():
        sys.stdout.write(f"\n{found.states:,} states, {found.transitions:,} transitions, {found.seconds:.1f} s\n")
    assert found.violation is None, f"\n{found.violation}"
    assert found.source_rows == set(SOURCE), "a row can never be used, or the model is too narrow"
    assert found.destination_rows == set(DESTINATION), "a row can never be used, or the model is too narrow"
    assert found.states > 286_935, "fewer than when the explorer had a dispatch of its own"
    assert found.liveness_states > 1_000


@pytest.mark.parametrize("marks", [Marks.VMM, Marks.DAEMON])
def test_no_interleaving_breaks_a_rule_where_memory_is_handed_over(marks: Marks) -> None:
    explorer = Explorer(replace(SHARED, marks=marks))
    found = explorer.run()
    assert found.violation is None, f"\n{found.violation}"
    changed = {
        (source.state.value, destination.state.value, destination.guest)
        for source, destination in explorer.pairs()
        if destination.changed and not source.memory.steps and not destination.memory.steps
    }
    assert ("retired", "running", Guest.RUNS) in changed, "completed"
    assert ("committed", "running", Guest.DEAD) in changed, "its VMM died with its copies in the memory"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.broken)
def test_a_mutant_is_caught(mutant: Mutant) -> None:
    disaster = explore(mutant.model, only=frozenset({mutant.disaster}))
    assert disaster.violation is not None
    assert disaster.violation.rule == mutant.disaster


def test_a_trace_is_one_readable_line_for_each_step() -> None:
    violation = explore(MUTANTS[1].model, only=frozenset({MUTANTS[1].disaster})).violation
    assert violation is not None
    head, *lines = str(violation).splitlines()
    assert head == MUTANTS[1].disaster
    assert len(lines) == len(violation.trace)
    assert " ".join(lines[0].split()) == (
        "1 source begins attempt 1 | source running, guest runs | destination discarded, guest none"
    )
    assert "guest runs" in lines[-1].split("|")[1]
    assert "guest runs" in lines[-1].split("|")[2]


def test_the_explorer_reaches_the_ends_that_matter() -> None:
    """A model in which nothing can happen would break no rule either."""
    explorer = Explorer(Model())
    explorer.run()
    ends = {
        (source.attempt, source.state.value, source.guest, destination.state.value, destination.guest)
        for source, destination in explorer.pairs()
        if not source.memory.steps and not destination.memory.steps
    }
    for attempt in (1, 2):
        assert (attempt, "retired", Guest.NONE, "running", Guest.RUNS) in ends, "completed"
        assert (attempt, "aborted", Guest.RUNS, "discarded", Guest.NONE) in ends, "aborted"
        assert (attempt, "committed", Guest.HALTED, "running", Guest.RUNS) in ends, "in doubt, runs there"
        assert (attempt, "committed", Guest.HALTED, "discarded", Guest.NONE) in ends, "in doubt, discarded there"
        assert (attempt, "committed", Guest.DEAD, "running", Guest.RUNS) in ends, "the source's VMM died after COMMIT"
