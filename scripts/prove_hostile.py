"""Every hostile case against two real daemons with TLS, beside well-behaved migrations on the same daemons.

    python -m scripts.prove_hostile [strangers sources destinations crowds faults] [--only 'certificate|downtime']

For each case: whether it held, the longest downtime beside it and its limit, how late the daemons answered (p99), and
their memory by that of an undisturbed run. What happened goes to stderr; the last line on stdout is one JSON object:
``{"cases", "violations", "worst_lag_p99_ms", "worst_memory_ratio", "worst_downtime_ms", "limit_ms"}``. Exit code 1
when a case did not hold, a migration beside it did not complete within its limit, a daemon answered later than 50 ms
(p99), or took more than 1.3 times the memory (twice with eight migrations at once, which have the buffers of eight).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

from scripts.basics import MIB, say
from scripts.hostile import crowds, destinations, faults, sources, strangers
from scripts.hostile.beside import Found, create_honest, migrate_honest, run_case, undisturbed
from scripts.hostile.ground import LIMIT_MS, MOST_MEMORY, Case, prepared

MOST_LAG_MS: Final = 50.0
GROUPS: Final = {
    "strangers": strangers.CASES,
    "sources": sources.CASES,
    "destinations": destinations.CASES,
    "crowds": crowds.CASES,
    "faults": faults.CASES,
}
_WARM_UP: Final = 30
_UNDISTURBED: Final = 12


def judged(found: Found, quiet: Found, most_memory: float = MOST_MEMORY) -> list[str]:
    """Everything that did not hold in a case, the bounds of lag and memory among it."""
    wrong = list(found.wrong)
    if found.lag_p99_ms > MOST_LAG_MS:
        wrong.append(f"a daemon answered after {found.lag_p99_ms:.0f} ms (p99)")
    if (ratio := found.memory_ratio(quiet)) > most_memory:
        wrong.append(f"a daemon took {ratio:.2f} times the memory of an undisturbed run")
    return wrong


def show(found: Found, quiet: Found, most_memory: float = MOST_MEMORY) -> list[str]:
    """Tell a person of a case. Returns what did not hold."""
    wrong = judged(found, quiet, most_memory)
    longest = f"{max(found.downtimes_ms):5.0f}" if found.downtimes_ms else "    -"
    wake = max((watched.wake_p99_ms for watched in found.watched.values()), default=0.0)
    say(
        f"{'FAIL' if wrong else 'ok  '} {found.name:40} {len(found.downtimes_ms):3} moved, {longest} of {LIMIT_MS} ms; "
        f"lag p99 {found.lag_p99_ms:5.1f} ms (bare wake {wake:4.1f}); memory x{found.memory_ratio(quiet):.2f}; "
        f"{found.seconds:.0f} s"
    )
    for sentence in wrong:
        say(f"     {sentence}")
    return wrong


async def prove(cases: Sequence[Case]) -> tuple[dict[str, Any], bool]:
    """Run cases one after the other on one pair of hosts. Returns the figures and whether all held."""
    shown: list[Found] = []
    violations = 0
    async with prepared(disks=any(case in faults.CASES for case in cases)) as ground:
        await create_honest(ground)
        for _ in range(_WARM_UP):
            await migrate_honest(ground)
        quiet = await undisturbed(ground, _UNDISTURBED)
        sizes = ", ".join(f"{name} {watched.peak_bytes / MIB:.1f} MiB" for name, watched in quiet.watched.items())
        say(f"undisturbed: {sizes}")
        show(quiet, quiet)
        for case in cases:
            found = await run_case(ground, case, watch=True)
            violations += bool(show(found, quiet, case.most_memory))
            shown.append(found)
        show(await undisturbed(ground, _UNDISTURBED), quiet)
    figures = {
        "cases": len(shown),
        "violations": violations,
        "worst_lag_p99_ms": round(max(found.lag_p99_ms for found in shown), 1),
        "worst_memory_ratio": round(max(found.memory_ratio(quiet) for found in shown), 2),
        "worst_downtime_ms": round(max((ms for found in shown for ms in found.downtimes_ms), default=0.0), 1),
        "limit_ms": LIMIT_MS,
    }
    return figures, not violations


def main() -> int:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all of them by default")
    parser.add_argument("--only", default="", help="a regular expression that the names of cases have")
    parser.add_argument("--list", action="store_true", help="name the cases")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"there is no group {', '.join(sorted(unknown))}")
    groups = options.groups or GROUPS
    cases = [case for group in groups for case in GROUPS[group] if re.search(options.only, case.name)]
    if options.list:
        say("\n".join(case.name for case in cases))
        return 0
    if not cases:
        parser.error("no case has such a name")
    if os.geteuid() and any(case in faults.CASES for case in cases):
        say("faults are left out: only root can make a disk that is full")
        cases = [case for case in cases if case not in faults.CASES]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # daemons and guests must not outlive a run that is ended
    figures, held = asyncio.run(prove(cases))
    print(json.dumps(figures))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
