"""The hand-over in a fleet: a store that is silent, late or refuses, fences, a third host; every mutant is caught."""

from __future__ import annotations

import pytest

from protocol.handover import FLEET_ROWS, SourceState
from scripts.proof.explorer import Explorer, explore
from scripts.proof.fleet_mutants import CALM, FLEET_MUTANTS
from scripts.proof.model import Guest
from scripts.proof.mutants import Mutant

ONLY_WHEN_SOMETHING_FAILS = {"fault", "cancel", "journal-failed"}
"""Events that a calm model leaves out; `python -m scripts.prove explorer` has them."""


def test_no_interleaving_of_a_fleet_breaks_a_rule() -> None:
    explorer = Explorer(CALM)
    found = explorer.run()
    assert found.violation is None, f"\n{found.violation}"
    unused = set(FLEET_ROWS) - found.source_rows
    assert {event for _, event in unused} <= ONLY_WHEN_SOMETHING_FAILS, "a row can never be used"
    assert found.states > 100_000
    assert found.liveness_states > 1_000
    ends = {(source.state, source.guest, destination.guest) for source, destination in explorer.pairs()}
    assert (SourceState.RETIRED, Guest.NONE, Guest.RUNS) in ends, "completed"
    assert (SourceState.ABORTED, Guest.RUNS, Guest.NONE) in ends, "aborted"
    assert (SourceState.HELD, Guest.HALTED, Guest.NONE) in ends, "held"


@pytest.mark.parametrize("mutant", FLEET_MUTANTS, ids=lambda mutant: mutant.broken)
def test_a_mutant_of_a_fleet_is_caught(mutant: Mutant) -> None:
    disaster = explore(mutant.model, only=frozenset({mutant.disaster}))
    assert disaster.violation is not None
    assert disaster.violation.rule == mutant.disaster
