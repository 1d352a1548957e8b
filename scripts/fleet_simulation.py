"""How a large fleet empties its hosts: 1,000 hosts and 20,000 guests in virtual time, over the code that ships.

python -m scripts.fleet_simulation [--hosts 1000] [--guests 20000] [--emptied 1,10,100]

A table on stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict

from scripts.basics import say
from scripts.fleet.simulation import Fleet, Outcome, Size


def figures(outcome: Outcome, hosts: int) -> dict[str, object]:
    """Return the outcome of a fleet of so many hosts, with what follows from it."""
    calls = sum(outcome.calls.values())
    return {
        **asdict(outcome),
        "calls": dict(outcome.calls),
        "calls_per_s": round((calls + outcome.renewals) / max(1e-9, outcome.total_s), 1),
        "calls_per_move": round(calls / max(1, outcome.moved), 1),
        "told_per_s": round(outcome.events * hosts / max(1e-9, outcome.total_s)),
    }


def main() -> int:
    """Simulate each number of emptied hosts. Returns 1 when a host was promised more than it has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--guests", type=int, default=20000)
    parser.add_argument("--emptied", default="1,10,100", help="numbers of hosts to empty at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found, sound = {}, True
    for emptied in map(int, options.emptied.split(",")):
        begin = time.monotonic()
        outcome = Fleet(Size(options.hosts, options.guests, emptied, seed=options.seed)).run()
        told = figures(outcome, options.hosts)
        found[str(emptied)] = told
        sound &= not outcome.overcommitted
        say(
            f"{emptied} of {options.hosts} hosts: {outcome.moved} guests in {outcome.total_s:.0f} s (planned "
            f"{outcome.planned_s:.0f} s), {outcome.attempts} attempts, {outcome.left} left; {told['calls_per_s']} "
            f"calls/s ({told['calls_per_move']} for each guest, {outcome.refused} on old news, at most "
            f"{outcome.peak_per_s} in a second), {told['told_per_s']} news/s to watchers; largest key "
            f"{outcome.largest[0]} bytes; slowest plan {outcome.slowest_decision_s:.2f} s of real time, on "
            f"{outcome.question_bytes >> 10} KiB; "
            f"{time.monotonic() - begin:.1f} s of real time"
        )
    print(json.dumps({"hosts": options.hosts, "guests": options.guests, "emptied": found}))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
