"""The safety argument, runnable part by part.

    python -m scripts.prove explorer | simulator | matrix | soak | aborts | retries | all

Progress goes to stderr; the last line on stdout is one JSON object with the part's counts. Exit code 1 when anything
was violated or a mutant got away.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scripts import prove_aborts, prove_matrix, prove_retries, soak
from scripts.basics import say
from scripts.proof.explorer import explore
from scripts.proof.fleet_mutants import FLEET, FLEET_MUTANTS, SHARED_LOCK
from scripts.proof.model import Marks, Model
from scripts.proof.mutants import MUTANTS, SHARED
from scripts.proof.simulator import simulate


def prove_explorer(options: argparse.Namespace) -> tuple[dict[str, int], bool]:
    """Explore the real tables over ``--epochs`` epochs, then every mutant. Returns the counts and whether all held."""
    found = explore(Model(epochs=tuple(range(1, options.epochs + 1))))
    say(f"explorer: {found.states:,} states, {found.transitions:,} transitions, {found.seconds:.1f} s")
    by_daemon = explore(Model(marks=Marks.DAEMON))
    say(f"explorer: {by_daemon.states:,} states with the daemon's own marks, two epochs, {by_daemon.seconds:.1f} s")
    in_fleet = explore(replace(FLEET, epochs=(1,)))
    say(f"explorer: {in_fleet.states:,} states in a fleet, one epoch, {in_fleet.seconds:.1f} s")
    by_lock = explore(SHARED_LOCK)
    say(f"explorer: {by_lock.states:,} states in a fleet with a shared lock and untrue fences, {by_lock.seconds:.1f} s")
    handed_over = explore(SHARED)
    say(f"explorer: {handed_over.states:,} states where memory is handed over, one epoch, {handed_over.seconds:.1f} s")
    explored = (found, by_daemon, in_fleet, by_lock, handed_over)
    for violation in (each.violation for each in explored):
        if violation is not None:
            say(str(violation))
    caught = 0
    mutants = (*MUTANTS, *FLEET_MUTANTS)
    for mutant in mutants:
        disaster = explore(mutant.model, only=frozenset({mutant.disaster}))
        caught += disaster.violation is not None
        steps = f"{len(disaster.violation.trace)} steps" if disaster.violation is not None else "NOT CAUGHT"
        say(f"mutant: {mutant.broken}: {steps} ({mutant.disaster})")
        if options.traces:
            say(f"{disaster.violation}\n")
    violations = sum(each.violation is not None for each in explored)
    states = found.states + in_fleet.states + by_lock.states + handed_over.states
    counts = {"states": states, "violations": violations, "mutants": len(mutants), "mutants_caught": caught}
    return counts, not violations and caught == len(mutants)


def prove_simulator(options: argparse.Namespace) -> tuple[dict[str, int], bool]:
    """Play ``--seeds`` seeds from ``--seed`` on. Returns the counts and whether every rule held in all."""
    begin, completed, in_doubt, broken = time.monotonic(), 0, 0, 0
    for seed in range(options.seed, options.seed + options.seeds):
        outcome = simulate(seed)
        completed += outcome.completed
        in_doubt += outcome.in_doubt
        broken += bool(outcome.broken)
        if outcome.broken or options.stories:
            say(f"{outcome}\n")
    seconds = time.monotonic() - begin
    say(f"simulator: {options.seeds} seeds, {completed} completed, {in_doubt} in doubt on the way, {seconds:.1f} s")
    return {"seeds": options.seeds, "violations": broken}, not broken


def prove_all(parser: argparse.ArgumentParser) -> tuple[dict[str, Any], bool]:
    """Every part, the long ones last. Returns their counts by name and whether all held."""
    sizes = {
        "simulator": ["--seeds", os.environ.get("PROVE_SEEDS", "5000")],
        "soak": ["--migrations", os.environ.get("PROVE_SOAK", "200")],
    }
    counts: dict[str, Any] = {}
    all_held = True
    for part in ("explorer", "simulator", "aborts", "soak", "matrix"):
        say(f"-- {part}")
        options = parser.parse_args([part, *sizes.get(part, [])])
        counts[part], held = options.prove(options)
        all_held &= held
    return counts, all_held


def main() -> int:
    """Run one part, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(required=True)
    explorer = parts.add_parser("explorer", help="all interleavings of the hand-over, and its mutants")
    explorer.add_argument("--epochs", type=int, default=3, choices=(1, 2, 3))
    explorer.add_argument("--traces", action="store_true", help="show each mutant's shortest way to harm")
    explorer.set_defaults(prove=prove_explorer)
    simulator = parts.add_parser("simulator", help="whole endpoints in virtual time under random faults")
    simulator.add_argument("--seeds", type=int, default=5000, help="how many seeds (default %(default)s)")
    simulator.add_argument("--seed", type=int, default=0, help="the first of them (default %(default)s)")
    simulator.add_argument(
        "--stories", action="store_true", help="tell what happened in every seed, not only in bad ones"
    )
    simulator.set_defaults(prove=prove_simulator)
    prove_matrix.add_arguments(parts.add_parser("matrix", help="every step x every fault over real daemons and guests"))
    soak.add_arguments(parts.add_parser("soak", help="migrations back and forth with random faults"))
    prove_aborts.add_arguments(parts.add_parser("aborts", help="how precisely an abort gives the guest back"))
    prove_retries.add_arguments(parts.add_parser("retries", help="whether a retry after a fault fits as the first try"))
    everything = parts.add_parser("all", help="all of it; PROVE_SEEDS and PROVE_SOAK in the environment set the sizes")
    everything.set_defaults(prove=lambda _options: prove_all(parser))
    options = parser.parse_args()
    prove: Callable[[argparse.Namespace], tuple[dict[str, int], bool]] = options.prove
    counts, held = prove(options)
    print(json.dumps(counts))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
