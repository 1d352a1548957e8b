"""What it costs a guest to get another VMM on the same host, and whether an abort leaves its memory as it was.

    python -m scripts.prove_replace [--sizes 256MiB,8GiB] [--repeats 50] [--aborts 100]

For each size a simulated guest without device costs, which writes memory all the while, is replaced so many times. Then
a guest whose devices write memory when they are loaded has replacements that fail: its new VMM is killed, the daemon is
killed, the limit passes, an operator cancels, each at random moments of each step: while it is prepared, and in the
blackout while devices are saved, while they are loaded, and between READY and the end. After every abort the guest's
memory is compared with what it was, to the byte: every other guest stands still for that, the rest run and are checked
by what they must have written. Progress goes to stderr; the last line on stdout is one JSON object: ``{"sizes": {name:
{"p50_ms", "p99_ms", "max_ms"}}, "ratio", "aborts": {step: number}, "completed", "violations"}``. Exit code 1 when p50
is above 4 ms, the sizes differ by more than 1.3, or anything was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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

from migrated.control.client import CommandError, ControlClient, DaemonUnreachableError
from protocol.units import parse_size
from scripts.basics import MIB, say
from scripts.rig.faulty import FaultyPair
from scripts.rig.host import Host
from scripts.rig.waiting import RigError, until

ALLOWED_MS: Final = 4.0
ALLOWED_RATIO: Final = 1.3
LIMIT_MS: Final = 1000
WAYS: Final = ("new VMM killed", "daemon killed", "limit", "cancelled")
STEPS: Final = ("prepare", "save", "load", "decide")
REHEARSALS: Final = 3
STOP_S: Final = 20.0
"""How long a guest may take to be stopped."""
LOOK_S: Final = 0.0005
"""Time between two looks at the daemon's log."""


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


def timeline(records: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Begin and end of each step of a replacement that nothing disturbs (s): of ``prepare`` since the command, of the
    others since the stop.

    Args:
        records: of some that completed. The quickest counts: on a busy moment a step only ends later.
    """

    def passed(name: str) -> float:
        return min(float(p["ns"]) for record in records for p in record["checkpoints"] if p["name"] == name) / 1e9

    saved_s, loaded_s = passed("src-non-iterable-saved"), passed("dst-precopy-loadvm-completed")
    return {
        "prepare": (0.0, min(float(record["setup_ns"]) for record in records) / 1e9),
        "save": (0.0, saved_s),
        "load": (saved_s, loaded_s),
        "decide": (loaded_s, passed("src-downtime-end")),
    }


def possible(way: str, step: str, *, still: bool) -> bool:
    """Whether a replacement can fail so. The limit counts from the stop on, of a guest that runs. A VMM that is killed
    when it may run already is no abort: that is a crash of the guest."""
    return not (step == "prepare" or still) if way == "limit" else (way, step) != ("new VMM killed", "decide")


async def about_to_stop(host: Host, mark: int) -> None:
    """Wait until the daemon logs the decision to stop the guest, which comes right before the stop."""
    deadline = time.monotonic() + STOP_S
    while not any(entry["event"] == "round" for entry in host.log(mark)):
        if time.monotonic() > deadline:
            raise RigError("the guest was not stopped")
        await asyncio.sleep(LOOK_S)


async def fail_once(pair: FaultyPair, way: str, step: str, after_s: float) -> str:
    """Let one replacement fail in a way, so long after it began, or after the stop for a step of the blackout. Returns
    how it ended."""
    host = pair.a
    limit_ms = max(1.0, after_s * 1e3) if way == "limit" else LIMIT_MS
    before = set(host.vmm_pids())
    mark = host.log_path.stat().st_size

    async def new_vmms() -> set[int]:
        return set(host.vmm_pids()) - before

    async with await ControlClient.connect(host.socket) as client:
        begun = await host.begin_replacement("g1", downtime_limit=limit_ms, timeout_s=0.1, on_timeout="force")
        if way != "limit" and step != "prepare":
            new = await until("the new VMM", new_vmms)
            await about_to_stop(host, mark)
            await asyncio.sleep(after_s)
        elif way != "limit":
            await asyncio.sleep(after_s)
            new = await new_vmms()
        if way == "new VMM killed" and (await host.guest())["pid"] not in new:
            for pid in new:
                host.kill_process(pid)
        elif way == "daemon killed":
            host.kill()
            await asyncio.to_thread(host.restart)
        elif way == "cancelled":
            with contextlib.suppress(CommandError):  # it is over already
                await client.command("migrate_cancel", {"guest": "g1"})
    try:
        record: dict[str, Any] | None = await host.wait(begun)
    except CommandError:
        record = await host.record(begun)  # a daemon that was killed before it journaled the attempt knows nothing
    await pair.settled("g1")
    return str(record["outcome"]) if record is not None else "no record"


async def abort(pair: FaultyPair, aborts: int, seed: int) -> tuple[dict[str, int], int, list[str]]:
    """Let replacements fail. Returns how many aborted in each step, how many completed all the same, and what was
    violated."""
    host, chance = pair.a, random.Random(seed)
    aborted = dict.fromkeys(STEPS, 0)
    completed = 0
    violations: list[str] = []
    await host.create_guest("g1", 64, profile="load-writes")
    await host.verify()  # waits until it has booted
    steps = timeline([await host.replace("g1") for _ in range(REHEARSALS)])
    for number, (way, step, still) in enumerate(itertools.cycle(itertools.product(WAYS, STEPS, (True, False)))):
        if sum(aborted.values()) >= aborts:
            break
        if not possible(way, step, still=still):
            continue
        await host.command("x-migrated-guest-pause" if still else "x-migrated-guest-resume", {"guest": "g1"})
        owner = (await host.guest())["pid"]
        before = memory_digest(owner) if still else ""
        after_s = chance.uniform(*steps[step])
        outcome = await fail_once(pair, way, step, after_s)
        guest = await host.guest()
        what = f"{number} ({way} {after_s * 1e3:.1f} ms into {'it' if step == 'prepare' else 'the blackout'})"
        if outcome == "completed":
            completed += 1
        else:
            aborted[step] += 1
            if guest["pid"] != owner:
                violations.append(f"{what}: it is {outcome}, and another process has the guest")
            elif still and memory_digest(owner) != before:
                violations.append(f"{what}: memory is not what it was")
        if guest["state"] != ("paused" if still else "running"):
            violations.append(f"{what}: the guest is {guest['state']}")
        verdict = await host.verify()
        violations += [] if verdict["ok"] else [f"{what}: {verdict['message']}"]
        violations += pair.double_runs()
        say(f"{step:8} {what}: {outcome}{', still' if still else ''}")
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
    say(f"aborts: {aborted}; {completed} completed, {len(violations)} violations, {time.monotonic() - begin:.0f} s")
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
