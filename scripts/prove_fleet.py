"""Hosts are emptied over shaped links with a real etcd of three members, in order and with what can go wrong.

    python -m scripts.prove_fleet [--guests 12] [--rate 400mbit] [--runs 100] [--seed 1] [--kept runs.jsonl] [--for 280]

First evacuations without faults. The same guests leave the same host by hand: one after the other, and as many at once
as its slots allow, each with the whole link for the taking. The shortest of these is the best order found by hand. Then
they leave by a job: no guest may be over its limit, each is verified, and the time is compared with the best one by
hand. Beside it stands what no order can beat: all that was sent at the rate of the link, and the time of each guest
with its rounds at that rate, as many at once as the slots allow.

Then runs with one random fault each: the daemon of the worker, of the source or of a destination, or etcd's leader is
killed, etcd is away, a host is cut off from etcd and its peers, or a second operator empties a host that guests are on
their way to. After each the job must have ended as asked, every guest must run on one host and never have run on two by
what it wrote itself, no slot and no memory may stay promised or ever have been promised twice.

Runs are kept in a file if one is named: later calls go on after its last run, and sum up all of them. Progress goes to
stderr; the last line on stdout is one JSON object: ``{"guests", "late", "total_s", "planned_s", "by_hand_s": {at once:
s}, "least_s", "ratio", "runs", "faults": {fault: runs}, "violations": [sentence]}``. Exit code 1 when the ratio is
above 1.25 or anything was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Final

from migrated.control.client import ControlClient
from scripts.basics import MIB, say
from scripts.fleet.etcd_cluster import why_no_etcd
from scripts.fleet.fault_runs import FAULTS, HOSTS, JOB_S, fault_run, make_guests, wrong
from scripts.fleet.network import Switch
from scripts.fleet.rig import Fleet
from scripts.rig.network import Network

ALLOWED_RATIO: Final = 1.25
SLOTS: Final = 2
"""Migrations that leave a host at once."""
MEMORY_BYTES: Final = 640 * MIB
"""Memory of a host for guests: those of a run fit on one host, and not many more."""
_TRIES: Final = 4
_BITS: Final = {"kbit": 1000, "mbit": 1_000_000, "gbit": 1_000_000_000}


async def by_hand(fleet: Fleet, names: list[str], at_once: int) -> float:
    """Send guests away with `migratectl migrate`, so many at once, to the other hosts in turn. One that does not move
    is tried again in the end. Returns the time (s)."""
    waiting, left, setups_s = list(enumerate(names)), _TRIES * len(names), list[float]()

    async def send() -> None:
        nonlocal left
        while waiting:
            number, name = waiting.pop(0)
            record = await fleet["a"].migrate(name, fleet["bc"[number % 2]])
            left -= 1
            setups_s.append(record["setup_ns"] / 1e9)
            if record["outcome"] != "completed" and left:
                say(f"{name} did not move by hand: {record['reason']}")
                waiting.append((number, name))

    begin = time.monotonic()
    await asyncio.gather(*(send() for _ in range(at_once)))
    took_s = time.monotonic() - begin
    say(f"by hand, {at_once} at once: {took_s:.1f} s, of it setting up {median(setups_s):.1f} s each")
    return took_s


async def measure(fleet: Fleet, count: int, rate: str) -> dict[str, Any]:
    """Empty host a by hand and by a job, without faults. Returns the figures."""
    hands = {}
    for at_once in range(1, SLOTS + 1):
        names = await make_guests(fleet, count)
        hands[str(at_once)] = round(await by_hand(fleet, names, at_once), 1)
        await fleet.remove_guests()
    names = await make_guests(fleet, count)
    begun = await fleet.evacuate("a", "c")
    async with asyncio.timeout(JOB_S), await ControlClient.connect(fleet["b"].socket) as client:
        # Asked once, as by hand: asking all the while, a hundred times a second, would take a processor away.
        job = await client.command("x-migrated-fleet-wait", {"job": begun})
    violations = await wrong(fleet, names, [job])
    digits = rate.rstrip("kmgbit")
    bytes_per_s = float(digits) * _BITS[rate.removeprefix(digits)] / 8
    link_s = alone_s = 0.0
    for guest in job["guests"]:
        record = await fleet["a"].record(guest["migration_id"] or "-")
        if record is None:
            raise RuntimeError(f"{guest['guest']} moved without a record")
        sending_s = record["ram"]["transferred_bytes"] / bytes_per_s
        link_s += sending_s
        alone_s += sending_s + (record["total_ns"] - sum(row["ns"] for row in record["rounds"])) / 1e9
        begin_s, end_s = ((guest[name] - job["created_utc_ns"]) / 1e9 for name in ("began_utc_ns", "ended_utc_ns"))
        setup_s = record["setup_ns"] / 1e9
        say(
            f"{guest['guest']:4} to {guest['destination']}: {begin_s:5.1f} to {end_s:5.1f} s, of it setting up "
            f"{setup_s:.1f} s; {guest['bytes_per_s'] / MIB:.1f} MiB/s"
        )
    await fleet.remove_guests()
    total_s = job["total_ns"] / 1e9
    return {
        "guests": len(names),
        "late": job["late"],
        "total_s": round(total_s, 1),
        "planned_s": round(job["expected_total_ns"] / 1e9, 1),
        "by_hand_s": hands,
        "least_s": round(max(link_s, alone_s / SLOTS), 1),
        "ratio": round(total_s / min(hands.values()), 2),
        "violations": violations,
    }


def kept_runs(path: Path | None) -> list[dict[str, Any]]:
    """The runs that earlier calls kept."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def prove(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns the document of the last line."""
    begin, runs, result, violations = time.monotonic(), kept_runs(options.kept), dict[str, Any](), list[str]()
    settings = {"lease_s": 4.0, "max_outbound": SLOTS, "memory_bytes": MEMORY_BYTES}
    with (
        Switch(HOSTS, options.rate) as switch,
        Fleet(HOSTS, members=3, switch=switch, fleet=settings, tls={"insecure": True}) as fleet,
    ):
        await fleet.joined()
        if options.guests:
            result = await measure(fleet, options.guests, options.rate)
            violations += result.pop("violations")
            say(f"{result}")
        while len(runs) < options.runs and time.monotonic() - begin < options.seconds:
            chance = random.Random(f"{options.seed}/{len(runs)}")
            fault, began = chance.choice(list(FAULTS)), time.monotonic()
            found = await fault_run(fleet, switch, fault, options.guests_per_run, chance, options.away)
            run = {"run": len(runs), "seed": options.seed, "fault": fault, "violations": found}
            runs.append(run)
            if options.kept is not None:
                with options.kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
            say(f"run {run['run']}, {fault}: {'; '.join(found) or 'all well'} ({time.monotonic() - began:.0f} s)")
            if found and not options.keep_going:
                say(fleet.log_tail(80))
                break
    violations += [f"run {run['run']}, {run['fault']}: {sentence}" for run in runs for sentence in run["violations"]]
    faults = Counter(run["fault"] for run in runs)
    return {**result, "runs": len(runs), "faults": dict(faults), "violations": violations}


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    """End as Ctrl-C does, which ends every process that was started."""
    raise KeyboardInterrupt


def main() -> int:
    """Run it, if this machine can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=12, help="guests of the measured evacuations, 0 for none")
    parser.add_argument("--guests-per-run", type=int, default=4, help="guests of a run with a fault")
    parser.add_argument("--rate", default="400mbit", help="of each host's link, as tc spells it")
    parser.add_argument("--runs", type=int, default=100, help="runs with a fault, those that were kept among them")
    parser.add_argument("--kept", type=Path, help="file of runs to go on after, and to add to")
    parser.add_argument("--for", dest="seconds", type=float, default=float("inf"), help="begin no run after (s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--away", type=float, default=20.0, help="how long etcd is away (s)")
    parser.add_argument("--keep-going", action="store_true", help="go on after a violation")
    options = parser.parse_args()
    if (reason := why_no_etcd() or Network.why_not()) is not None:
        print(f"This cannot be proved here: {reason}.", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, _interrupted)
    document = asyncio.run(prove(options))
    print(json.dumps(document))
    return 1 if document["violations"] or document.get("ratio", 0.0) > ALLOWED_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
