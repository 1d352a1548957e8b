"""What it costs a guest to get another VMM on the same host, and whether an abort leaves its memory as it was.

    python -m scripts.prove_replace [--sizes 256MiB,8GiB] [--repeats 50] [--aborts 100]

For each size a simulated guest without device costs, which writes memory all the while, is replaced so many times. Then
a guest whose devices write memory when they are loaded has replacements that fail: its new VMM is killed, the daemon is
killed, the limit passes, an operator cancels, each at moments that walk through the whole of it. After every abort its
memory is compared with what it was, to the byte: every other guest stands still for that, the rest run and are checked
by what they must have written. Progress goes to stderr; the last line on stdout is one JSON object: ``{"sizes": {name:
{"p50_ms", "p99_ms", "max_ms"}}, "ratio", "aborts", "completed", "violations"}``. Exit code 1 when p50 is above 4 ms,
the sizes differ by more than 1.3, or anything was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from migrated.control.client import CommandError, DaemonUnreachableError
from protocol.units import parse_size
from scripts.basics import MIB, say
from scripts.rig.faulty import FaultyPair
from scripts.rig.waiting import RigError

ALLOWED_MS: Final = 4.0
ALLOWED_RATIO: Final = 1.3
LIMIT_MS: Final = 1000
WAYS: Final = ("new VMM killed", "daemon killed", "limit", "cancelled")


def quantile(sorted_values: Sequence[float], share: float) -> float:
    """The value below which this share of some values lies."""
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]


async def measure(pair: FaultyPair, size: str, repeats: int) -> dict[str, float]:
    """Replace the VMM of one guest again and again. Returns the figures of its downtimes (ms)."""
    host = pair.a
    await host.create_guest("g1", parse_size(size) // MIB, workload="hot-cold", options={"set": "touched=128MiB"})
    found: list[float] = []
    for number in range(repeats):
        record = await host.replace("g1")
        if record["outcome"] != "completed":
            raise RigError(f"replacement {number} of a guest of {size} is {record['outcome']}: {record['reason']}")
        found.append(record["downtime"]["measured_ns"] / 1e6)
    verdict = await host.verify()
    await pair.remove_guests()
    if not verdict["ok"]:
        raise RigError(f"a guest of {size} is damaged after {repeats} replacements: {verdict['message']}")
    found.sort()
    figures = {"p50_ms": statistics.median(found), "p99_ms": quantile(found, 0.99), "max_ms": found[-1]}
    say(f"{size:>8}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    return {name: round(value, 3) for name, value in figures.items()}


def memory_digest(pid: int) -> str:
    """The digest of a guest's memory, by the memfd in its process."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "guest-memory" in os.readlink(link):
            with link.open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()
    raise RigError(f"process {pid} has no guest memory")


async def fail_once(pair: FaultyPair, way: str, after_s: float, share: float) -> str:
    """Let one replacement fail in a way, so long after it began, or with so large a share of the limit that it needs.
    Returns how it ended."""
    host = pair.a
    limit_ms = max(1, int(share * 150)) if way == "limit" else LIMIT_MS
    begun = await host.begin_replacement("g1", downtime_limit=limit_ms, timeout_s=0.1, on_timeout="force")
    before = set(host.vmm_pids()) if way == "new VMM killed" else set()
    if way != "limit":
        await asyncio.sleep(after_s)
    if way == "new VMM killed":
        owner = (await host.guest())["pid"]
        for pid in (before | set(host.vmm_pids())) - {owner}:
            host.kill_process(pid)
    elif way == "daemon killed":
        host.kill()
        await asyncio.to_thread(host.restart)
    elif way == "cancelled":
        await asyncio.to_thread(host.cancel)
    try:
        record: dict[str, Any] | None = await host.wait(begun)
    except CommandError:
        record = await host.record(begun)  # a daemon that was killed before it journaled the attempt knows nothing
    await pair.settled("g1")
    return str(record["outcome"]) if record is not None else "no record"


async def abort(pair: FaultyPair, aborts: int, seed: int) -> tuple[int, int, list[str]]:
    """Let replacements fail. Returns how many aborted, how many completed all the same, and what was violated."""
    host, chance = pair.a, random.Random(seed)
    aborted = completed = 0
    violations: list[str] = []
    await host.create_guest("g1", 64, profile="load-writes")
    await host.verify()  # waits until it has booted
    whole_s = (await host.replace("g1"))["total_ns"] / 1e9
    for number, way in enumerate(itertools.cycle(WAYS)):
        if aborted >= aborts:
            break
        still = number // len(WAYS) % 2 == 0
        await host.command("x-migrated-guest-pause" if still else "x-migrated-guest-resume", {"guest": "g1"})
        owner = (await host.guest())["pid"]
        before = memory_digest(owner) if still else ""
        share = chance.random()
        after_s = share * whole_s
        outcome = await fail_once(pair, way, after_s, share)
        guest = await host.guest()
        if outcome == "completed":
            completed += 1
        else:
            aborted += 1
            if guest["pid"] != owner:
                violations.append(f"{number} ({way}): it is {outcome}, and another process has the guest")
            elif still and memory_digest(owner) != before:
                violations.append(f"{number} ({way} after {after_s:.3f} s): memory is not what it was")
        if guest["state"] != ("paused" if still else "running"):
            violations.append(f"{number} ({way}): the guest is {guest['state']}")
        verdict = await host.verify()
        violations += [] if verdict["ok"] else [f"{number} ({way}): {verdict['message']}"]
        violations += pair.double_runs()
        say(f"{number:4} {way:15} after {after_s * 1e3:4.0f} ms: {outcome}{' still' if still else ''}")
    await pair.remove_guests()
    violations += await pair.leftovers()
    return aborted, completed, violations


async def prove(sizes: Sequence[str], repeats: int, aborts: int, seed: int) -> dict[str, Any]:
    """Measure and abort. Returns the figures."""
    begin = time.monotonic()
    pair = FaultyPair()
    try:
        await asyncio.to_thread(pair.start)
        figures = {size: await measure(pair, size, repeats) for size in sizes}
        aborted, completed, violations = await abort(pair, aborts, seed)
    except (RigError, CommandError, DaemonUnreachableError) as error:
        say(pair.log_tail())
        raise SystemExit(f"VIOLATION: {error}") from error
    finally:
        await asyncio.to_thread(pair.close)
    for violation in violations:
        say(f"VIOLATION: {violation}")
    medians = [row["p50_ms"] for row in figures.values()]
    say(f"{aborted} aborts, {completed} completed, {len(violations)} violations, {time.monotonic() - begin:.0f} s")
    return {
        "sizes": figures,
        "ratio": round(max(medians) / min(medians), 3) if medians else None,
        "aborts": aborted,
        "completed": completed,
        "violations": len(violations),
    }


def main() -> int:
    """Measure, abort and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256MiB,8GiB", help="of the guests that are measured (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="replacements of each (default %(default)s)")
    parser.add_argument("--aborts", type=int, default=100, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the aborts")
    options = parser.parse_args()
    # Daemons and guests must not outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sizes = [size for size in options.sizes.split(",") if size]
    found = asyncio.run(prove(sizes, options.repeats, options.aborts, options.seed))
    print(json.dumps(found))
    slow = any(row["p50_ms"] > ALLOWED_MS for row in found["sizes"].values())
    return 1 if slow or (found["ratio"] or 0) > ALLOWED_RATIO or found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
