"""How precisely an abort gives the guest back.

    python -m scripts.prove_aborts [--aborts 100] [--busy] [--records FILE]

Half of the aborts are the destination's, in the middle of a load that is too long for the limit; half are the source's
own, with the network cut at the stop. Each must let the guest run again within the limit plus its own resume.
Progress goes to stderr; the last line on stdout is one JSON object: ``{"aborts", "median_over_ms", "p99_over_ms",
"max_over_ms", "pauses_over", "max_pause_over_ms", "violations"}``: milliseconds beyond limit and resume, pauses beyond
the limit alone, and by how much the longest. With --records the run is added to a file, and all runs of the file are
judged together: so a hundred aborts need not be one run. Exit code 1 when p99 is beyond 10 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import signal
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from protocol.messages import FrameType
from scripts.basics import say
from scripts.rig.faults import Action, AtFrame, Cut, Point
from scripts.rig.faulty import FaultyPair

LIMIT_MS: Final = 150
ALLOWED_MS: Final = 10.0
FORCED: Final = {"downtime_limit": LIMIT_MS, "timeout_s": 0.1, "on_timeout": "force"}


class Abort(NamedTuple):
    """How long after the limit the guest began to resume, and until it ran (ms); negative when it was early."""

    over_ms: float
    pause_over_ms: float


Measured: TypeAlias = tuple[list[Abort], list[str]]
"""How far each abort was beyond the limit, and what went wrong."""


def abort_of(record: dict[str, Any]) -> Abort:
    """The figures of one attempt that was aborted."""
    downtime = record["downtime"]
    resume_ns = next(part["ns"] for part in downtime["parts"] if part["name"] == "resume")
    pause_over_ms = (downtime["measured_ns"] - downtime["limit_ns"]) / 1e6
    return Abort(pause_over_ms - resume_ns / 1e6, pause_over_ms)


async def force(pair: FaultyPair, name: str, aborts: int, ways: Mapping[str, tuple[Point, Action] | None]) -> Measured:
    """Force aborts of a guest on the first host.

    Args:
        ways: what to do to each migration, by turns, by what it is called; None where its load is too long by itself.

    Returns:
        How far each was beyond the limit, and what went wrong.
    """
    found: list[Abort] = []
    violations: list[str] = []
    proxy = pair.way_to(pair.b)
    for number, (kind, fault) in enumerate(itertools.islice(itertools.cycle(ways.items()), aborts)):
        armed = proxy.arm(*fault) if fault is not None else None
        record = await pair.a.migrate(name, proxy.uri, **FORCED)
        proxy.heal()
        pair.let_go_on()
        await pair.settled(name)
        if record["outcome"] != "aborted":
            violations.append(f"attempt {number} ({kind}) is {record['outcome']}: {record['reason']}")
            continue
        if armed is not None and not armed.fired_at_ns:
            violations.append(f"attempt {number} ({kind}) ended before that: {record['reason']}")
            continue
        abort = abort_of(record)
        found.append(abort)
        say(f"{number:4} {kind}: {abort.over_ms:+.2f} ms, running at {abort.pause_over_ms:+.2f} ms")
    verdict = await pair.a.verify(name)
    violations += pair.double_runs(name) + ([] if verdict["ok"] else [str(verdict["message"])])
    return found, violations


async def measure(aborts: int, busy: bool) -> Measured:
    """Force aborts of a simulated guest."""
    pair = FaultyPair()
    try:
        await asyncio.to_thread(pair.start)
        await pair.a.create_guest("g1", 32, profile="slow-load")
        if busy:
            await pair.b.create_guest("busy", 256, profile="busy")
        return await force(
            pair, "g1", aborts, {"load too long": None, "network cut": (AtFrame(FrameType.DOWNTIME), Cut())}
        )
    finally:
        await asyncio.to_thread(pair.close)


def prove_aborts(options: argparse.Namespace) -> tuple[dict[str, float], bool]:
    """Force the aborts. Returns the figures and whether all held."""
    # Daemons and guests must not outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return judge(together(asyncio.run(measure(options.aborts, options.busy)), options.records))


def together(measured: Measured, records: Path | None) -> Measured:
    """Add a run to a file of runs. Returns all that are in the file now; the run alone without a file.

    Raises:
        ValueError: the file holds something else.
    """
    if records is None:
        return measured
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps(measured) + "\n")
    aborts: list[Abort] = []
    violations: list[str] = []
    for number, line in enumerate(records.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found, wrong = json.loads(line)
            aborts += [Abort(float(over_ms), float(pause_over_ms)) for over_ms, pause_over_ms in found]
            violations += map(str, wrong)
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of {records} is no run of forced aborts ({error})") from error
    return aborts, violations


def judge(measured: Measured) -> tuple[dict[str, float], bool]:
    """The figures of many aborts, and whether all held."""
    found, violations = measured
    for violation in violations:
        say(f"VIOLATION: {violation}")
    if not found:
        return {"aborts": 0, "violations": max(1, len(violations))}, False
    ranked = sorted(abort.over_ms for abort in found)
    pauses = [abort.pause_over_ms for abort in found]
    median_ms, p99_ms = statistics.median(ranked), ranked[math.ceil(0.99 * len(ranked)) - 1]
    say(f"aborts: {len(found)}, median {median_ms:+.2f} ms, p99 {p99_ms:+.2f} ms, max {ranked[-1]:+.2f} ms")
    late = sum(pause > 0 for pause in pauses)
    say(f"pauses beyond the limit: {late}, median {statistics.median(pauses):+.2f} ms, max {max(pauses):+.2f} ms")
    counts = {
        "aborts": len(found),
        "median_over_ms": round(median_ms, 3),
        "p99_over_ms": round(p99_ms, 3),
        "max_over_ms": round(ranked[-1], 3),
        "pauses_over": late,
        "max_pause_over_ms": round(max(pauses), 3),
        "violations": len(violations) + (p99_ms > ALLOWED_MS),
    }
    return counts, not counts["violations"]


def add_records_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the option that ``together`` takes."""
    parser.add_argument("--records", type=Path, metavar="FILE", help="add the run to this file, and judge all of it")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``prove_aborts``."""
    parser.add_argument("--aborts", type=int, default=100, help="how many (default %(default)s)")
    add_records_argument(parser)
    parser.add_argument("--busy", action="store_true", help="a busy guest runs on the destination meanwhile")
    parser.set_defaults(prove=prove_aborts)


def main() -> int:
    """Force the aborts and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    counts, held = prove_aborts(options)
    print(json.dumps(counts))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
