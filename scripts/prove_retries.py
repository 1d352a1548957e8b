"""Whether a retry after a fault fits as the first try would have.

    python -m scripts.prove_retries [--retries 100] [--seed 0]

An attempt meets a fault of the matrix (a process stopped or killed, the network cut or stalled) in its rounds or in its
blackout, and fails. What was stopped goes on, what was killed is started again, and the same migration is asked for
once more, with the limit as before: what the fault made of the host's predictions must not keep it from completing, nor
make it take more than three times an undisturbed attempt. Progress goes to stderr; the last line on stdout is one JSON
object: ``{"retries", "completed", "quick", "median_ratio", "most_ratio", "undisturbed_s", "violations"}``. Exit code 1
when fewer than 95 of 100 were both completed and quick.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import statistics
import sys
from dataclasses import dataclass
from typing import Any, Final

from scripts.basics import MIB, say
from scripts.rig.faults import AtFrame
from scripts.rig.faulty import FaultyPair
from scripts.rig.host import Host
from scripts.rig.matrix import BLACKOUT_S, RESTART_S, STEPS, action_of

GUEST: Final = "g1"
MEMORY_MIB: Final = 64
PARAMETERS: Final = {"downtime_limit": 300, "timeout_s": 30}
FAULTS: Final = (
    *("stop-source-vmm", "stop-destination-vmm", "stop-source-daemon", "stop-destination-daemon"),
    *("kill-destination-vmm", "kill-source-daemon", "kill-destination-daemon"),
    *("cut", "cut-to-destination", "cut-to-source", "reset", "stall"),
)
AT: Final = tuple(step for step in STEPS if step.phase in ("rounds", "stopped"))
SLOWEST: Final = 3.0
ENOUGH: Final = 0.95
_UNDISTURBED: Final = 3
_AGAIN: Final = 10
"""After so many faults it is looked again at how long an undisturbed attempt takes: the machine may have changed."""


@dataclass(frozen=True, slots=True)
class Retry:
    """One retry: what happened before, how it ended, and its time over that of an undisturbed attempt."""

    after: str
    outcome: str
    reason: str | None
    ratio: float

    @property
    def good(self) -> bool:
        """Whether it completed, and in time."""
        return self.outcome == "completed" and self.ratio <= SLOWEST


async def measure(retries: int, seed: int) -> tuple[list[Retry], float]:
    """Meet faults, and retry after each. Returns the retries, and what an undisturbed attempt took last (s)."""
    draw = random.Random(seed)
    kinds = list(itertools.product(FAULTS, AT))
    draw.shuffle(kinds)
    pair, found, usual_s = FaultyPair(), list[Retry](), 0.0
    try:
        await asyncio.to_thread(pair.start)
        await pair.a.create_guest(
            GUEST, MEMORY_MIB, profile="small", workload="hot-cold", dirty_rate_bytes_per_s=20 * MIB, seed=seed
        )
        for fault, step in itertools.cycle(kinds):
            if len(found) >= retries:
                return found, usual_s
            if len(found) % _AGAIN == 0:
                usual_s = statistics.median([await _undisturbed(pair) for _ in range(_UNDISTURBED)])
            source = await _where(pair)
            if await _meets(pair, source, fault, step.name):
                at = await _where(pair)
                record = await at.migrate(GUEST, pair.way_to(pair.other(at)).uri, **PARAMETERS)
                retry = Retry(f"{step.name}/{fault}", record["outcome"], record["reason"], _seconds(record) / usual_s)
                found.append(retry)
                say(
                    f"{len(found):4} after {retry.after:34} {retry.outcome}, {retry.ratio:.2f} times an undisturbed one"
                )
                await pair.settled(GUEST)
    finally:
        await asyncio.to_thread(pair.close)
    raise AssertionError("itertools.cycle does not end")


async def _undisturbed(pair: FaultyPair) -> float:
    """An attempt without a fault; returns how long it took (s)."""
    source = await _where(pair)
    record = await source.migrate(GUEST, pair.way_to(pair.other(source)).uri, **PARAMETERS)
    await pair.settled(GUEST)
    return _seconds(record)


async def _meets(pair: FaultyPair, source: Host, fault: str, step: str) -> bool:
    """Let an attempt meet a fault, and mend everything. Returns whether it failed for it."""
    destination = pair.other(source)
    proxy = pair.way_to(destination)
    (frame,) = (known.frame for known in AT if known.name == step)
    armed = proxy.arm(AtFrame(frame), action_of(fault, source, destination, GUEST))
    migration_id = await source.begin_migration(GUEST, proxy.uri, **PARAMETERS)
    fired = await pair.fired(armed, source, migration_id)
    await asyncio.sleep(RESTART_S if fault.startswith("kill-") else BLACKOUT_S)  # the fault's own length
    await pair.recover()
    at = await pair.settled(GUEST)
    return fired and at is source


async def _where(pair: FaultyPair) -> Host:
    """The host that has the guest."""
    at = await pair.settled(GUEST)
    if at is None:
        raise RuntimeError(
            "the guest is on neither host, though no fault here ends it: prove matrix shows which one did"
        )
    return at


def _seconds(record: dict[str, Any]) -> float:
    return float(record["total_ns"]) / 1e9


def judge(found: list[Retry], undisturbed_s: float) -> tuple[dict[str, float], bool]:
    """The figures of many retries, and whether enough of them completed in time."""
    for retry in found:
        if not retry.good:
            say(f"after {retry.after}: {retry.outcome} in {retry.ratio:.1f} times the usual: {retry.reason}")
    good, ratios = sum(retry.good for retry in found), [retry.ratio for retry in found]
    held = good >= ENOUGH * len(found)
    counts = {
        "retries": len(found),
        "completed": sum(retry.outcome == "completed" for retry in found),
        "quick": good,
        "median_ratio": round(statistics.median(ratios), 2) if ratios else 0.0,
        "most_ratio": round(max(ratios, default=0.0), 2),
        "undisturbed_s": round(undisturbed_s, 3),
        "violations": 0 if held else len(found) - good,
    }
    return counts, held


def prove_retries(options: argparse.Namespace) -> tuple[dict[str, float], bool]:
    """Make the retries. Returns the figures and whether enough were good."""
    # Daemons and guests must not outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return judge(*asyncio.run(measure(options.retries, options.seed)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``prove_retries``."""
    parser.add_argument("--retries", type=int, default=100, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults (default %(default)s)")
    parser.set_defaults(prove=prove_retries)


def main() -> int:
    """Make the retries and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    counts, held = prove_retries(options)
    print(json.dumps(counts))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
