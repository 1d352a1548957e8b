"""Migrations back and forth between two hosts with random faults from a seed.

    python -m scripts.soak --migrations 200 --seed 1

After every migration: the guest is whole on exactly one host, no two copies ever ran, nothing is left behind, and
whatever was killed or cut works again. What happened goes to stderr; the last line on stdout is one JSON object:
``{"migrations", "faults", "violations"}``. Exit code 1 on any violation; the seed repeats the choice of faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from migrated.control.client import CommandError, DaemonUnreachableError
from scripts.basics import say
from scripts.rig.faults import AtFrame, AtTime, Cut, Point, Reset, Stall
from scripts.rig.faulty import FaultyPair
from scripts.rig.matrix import ALL_CELLS, BLACKOUT_S, PARAMETERS, RESTART_S, Cell, action_of
from scripts.rig.waiting import RigError

FAULTY_SHARE: Final = 0.6
"""How many of the migrations meet a fault; the others must complete."""
TIMED_SHARE: Final = 0.2
"""How many of the faults come at a random time instead of at a frame."""
LONGEST_S: Final = 0.6
LOG_LINES: Final = 16
GUEST: Final = "g1"
CALM: Final = {"downtime_limit": 20_000, "timeout_s": 0.1, "on_timeout": "force"}


@dataclass(slots=True)
class Soak:
    """Counts of migrations, faults and violations so far."""

    migrations: int = 0
    faults: int = 0
    violations: list[str] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    def document(self) -> dict[str, int]:
        """The counts."""
        return {"migrations": self.migrations, "faults": self.faults, "violations": len(self.violations)}


async def one_migration(pair: FaultyPair, chance: random.Random, soak: Soak, cells: Sequence[Cell]) -> str:
    """One migration, with or without a fault. Returns what happened, as a line; violations go to ``soak``."""
    source = await pair.settled(GUEST)
    if source is None:
        source = chance.choice(pair.hosts)
        pair.forget_runs()
        await pair.new_guest(source, GUEST, chance.randrange(1 << 32))
    destination = pair.other(source)
    proxy = pair.way_to(destination)
    # Every choice is made before anything can go otherwise, so that a seed means the same faults every time.
    faulty, timed, seconds = chance.random() < FAULTY_SHARE, chance.random() < TIMED_SHARE, chance.uniform(0, LONGEST_S)
    cell, blunt = chance.choice(cells), chance.choice((Cut(), Reset(), Stall(BLACKOUT_S)))
    point: Point = AtTime(seconds) if timed else AtFrame(cell.step.frame)
    action = blunt if timed else action_of(cell.fault, source, destination, GUEST)
    fault = proxy.arm(point, action) if faulty else None
    migration_id = await source.begin_migration(GUEST, proxy.uri, **(PARAMETERS if faulty else CALM))
    fired = fault is not None and await pair.fired(fault, source, migration_id)
    if fired:
        soak.faults += 1
        await asyncio.sleep(RESTART_S if not timed and cell.fault.startswith("kill-") else BLACKOUT_S)
    await pair.recover()
    at = await pair.settled(GUEST)
    record = await source.record(migration_id)
    soak.migrations += 1
    outcome = "no record" if record is None else str(record["outcome"])
    soak.outcomes[outcome] = soak.outcomes.get(outcome, 0) + 1
    found = pair.double_runs(GUEST)
    if at is not None:
        verdict = await at.verify(GUEST)
        if not verdict["ok"]:
            found.append(str(verdict["message"]))
        if fired and not timed:
            allowed = cell.places()
            if ("source" if at is source else "destination") not in allowed:
                found.append(f"after {cell} the guest is on host {at.name}, which came from {source.name}")
    elif not (fired and not timed and "nowhere" in cell.places()):
        found.append("the guest is on no host")
    if not faulty and outcome != "completed":
        found.append(f"a migration without a fault is {outcome}: {record and record['reason']}")
    found += await pair.leftovers()
    what = (f"{type(action).__name__.lower()} after {seconds:.2f} s" if timed else str(cell)) if fired else "-"
    place = at.name if at is not None else "none"
    line = f"{soak.migrations:5} {source.name}->{destination.name} {what:40} {outcome:10} on {place}"
    if found:
        soak.violations += found
        line += "".join(f"\n    VIOLATION: {one}" for one in found) + f"\n{pair.log_tail(LOG_LINES)}"
        await pair.start_over()
    return line


async def run(migrations: int, seed: int, pair: FaultyPair, cells: Sequence[Cell] = ALL_CELLS) -> Soak:
    """Run the soak on a pair of hosts, which is started and closed here, with faults out of ``cells``."""
    soak, chance = Soak(), random.Random(seed)
    try:
        await asyncio.to_thread(pair.start)
        for _ in range(migrations):
            try:
                async with asyncio.timeout(120):
                    say(await one_migration(pair, chance, soak, cells))
            except (RigError, CommandError, DaemonUnreachableError, TimeoutError) as error:
                soak.violations.append(str(error) or "a migration took more than 120 s")
                say(f"    VIOLATION: {soak.violations[-1]}\n{pair.log_tail(LOG_LINES)}")
                await pair.start_over()
    finally:
        await asyncio.to_thread(pair.close)
    return soak


def prove_soak(options: argparse.Namespace) -> tuple[dict[str, int], bool]:
    """Run the soak. Returns the counts and whether all held."""
    # Daemons and guests must not outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    begin = time.monotonic()
    soak = asyncio.run(run(options.migrations, options.seed, FaultyPair()))
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(soak.outcomes.items()))
    say(f"seed {options.seed}: {outcomes or 'nothing'}; {time.monotonic() - begin:.0f} s")
    return soak.document(), not soak.violations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``prove_soak``."""
    parser.add_argument("--migrations", type=int, default=200, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides the faults (default %(default)s)")
    parser.set_defaults(prove=prove_soak)


def main() -> int:
    """Run the soak and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    counts, held = prove_soak(options)
    print(json.dumps(counts))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
