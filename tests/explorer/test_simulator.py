"""Whole endpoints under random faults: every seed keeps every rule, and broken tables do not get through."""

from __future__ import annotations

import sys

import pytest

from scripts.proof.mutants import LATE_MUTANTS, MUTANTS, Mutant
from scripts.proof.simulator import simulate

SEEDS = 250
MUTANT_SEEDS = 250
CAUGHT_BY_CHANCE = (
    "the source resumes when the last acknowledgement is lost",
    "COMMIT is journaled after it is sent",
    "the source's timer resumes after COMMIT",
    "a cancel is accepted after COMMIT",
    "a restarted destination runs what was READY",
    "the source retires its copy when it sends COMMIT",
    "a restarted source in doubt does not ask",
    "the source waits for ever for READY",
    "a running destination does not answer",
)
"""Mutants that random faults meet within a few hundred seeds; the explorer catches all of them."""


def test_every_seed_keeps_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [simulate(seed) for seed in range(SEEDS)]
    broken = [outcome for outcome in outcomes if outcome.broken]
    assert not broken, f"\n{broken[0]}\n(and {len(broken) - 1} more)"
    completed = sum(outcome.completed for outcome in outcomes)
    in_doubt = sum(outcome.in_doubt for outcome in outcomes)
    faults = sum(outcome.faults for outcome in outcomes)
    with capsys.disabled():
        sys.stdout.write(f"\n{SEEDS} seeds: {completed} completed, {in_doubt} in doubt on the way, {faults} faults\n")
    # The stories are worth something only if much goes wrong in them.
    assert completed > SEEDS * 0.8
    assert in_doubt > SEEDS * 0.05
    assert faults > SEEDS
    assert sum(outcome.attempts for outcome in outcomes) > 1.5 * SEEDS


@pytest.mark.parametrize("seed", [1523, 3426])
def test_a_fault_during_a_hold_ends_the_hold(seed: int) -> None:
    """An operator holds the switchover for longer than the limit when the attempt breaks: that time does not count."""
    outcome = simulate(seed)
    assert not outcome.broken, f"\n{outcome}"


def test_a_seed_is_one_story() -> None:
    assert simulate(7) == simulate(7)
    assert simulate(7).lines != simulate(8).lines


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.broken in CAUGHT_BY_CHANCE], ids=lambda mutant: mutant.broken
)
def test_a_mutant_is_caught(mutant: Mutant) -> None:
    stories = (simulate(seed, mutant.model) for seed in range(MUTANT_SEEDS))
    caught = next((story for story in stories if story.broken), None)
    assert caught is not None
    assert str(caught).startswith(f"seed {caught.seed}: {caught.broken}\n")


@pytest.mark.parametrize("mutant", LATE_MUTANTS, ids=lambda mutant: mutant.broken)
def test_a_budget_that_is_wrong_is_caught_by_its_rule(mutant: Mutant) -> None:
    caught = next((story for story in (simulate(s, mutant.model) for s in range(MUTANT_SEEDS)) if story.broken), None)
    assert caught is not None
    assert caught.broken.startswith(mutant.disaster)
