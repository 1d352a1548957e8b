"""Hosts are emptied over shaped links with a real etcd of three members, in order and with what can go wrong.

    python -m scripts.prove_fleet [--guests 12] [--rate 400mbit] [--runs 100] [--seed 1]

First one evacuation of so many guests without faults: none may be over its limit, each is verified, and the time is
compared with what no order of them can beat: the migrations as long as they took, as many at once as the host's slots
allow, and all that was sent at the rate of the link. Then runs with one random fault each: the worker's daemon, etcd's
leader or a destination's daemon is killed, etcd is away, or a host is cut off from etcd and its peers. After each the
job must have ended as asked, every guest must run on one host and never have run on two by what it wrote itself, and no
slot and no memory may stay promised. Progress goes to stderr; the last line on stdout is one JSON object: ``{"guests",
"late", "total_s", "planned_s", "least_s", "ratio", "runs", "faults": {fault: runs}, "violations": [sentence]}``. Exit
code 1 when the ratio is above 1.25 or anything was violated.
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
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, Final

from migrated.control.client import CommandError, DaemonUnreachableError
from scripts.basics import MIB, say
from scripts.fleet.etcd_cluster import why_no_etcd
from scripts.fleet.network import Switch
from scripts.fleet.rig import Fleet
from scripts.rig.host import Host
from scripts.rig.network import Network
from scripts.rig.waiting import RigError, until

HOSTS: Final = "abc"
ALLOWED_RATIO: Final = 1.25
MEMORY_MIB: Final = 64
SLOTS: Final = 2
"""Migrations that leave a host at once."""
JOB_S: Final = 240.0
CUT_OFF_S: Final = 10.0
_BITS: Final = {"kbit": 1000, "mbit": 1_000_000, "gbit": 1_000_000_000}

Fault = Callable[["Run"], Awaitable[None]]


class Run:
    """One evacuation with a fault.

    Attributes:
        fleet, switch: where it happens.
        job: the evacuation of host a.
        away_s: how long etcd is away.
    """

    def __init__(self, fleet: Fleet, switch: Switch, job: str, chance: random.Random, away_s: float) -> None:
        self.fleet = fleet
        self.switch = switch
        self.job = job
        self.away_s = away_s
        self._chance = chance

    async def _restart(self, host: Host) -> None:
        host.kill()
        await asyncio.sleep(self._chance.uniform(0, 3))
        self.fleet.start_host(host)

    async def worker(self) -> None:
        """The daemon that carries the job on is killed."""
        worker = (await self.fleet.job("a", self.job))["worker"]
        if worker is not None:
            await self._restart(self.fleet[worker])

    async def destination(self) -> None:
        """The daemon of a host that guests go to is killed."""
        await self._restart(self.fleet[self._chance.choice("bc")])

    async def leader(self) -> None:
        """The member of etcd that leads is killed."""
        leader = await asyncio.to_thread(self.fleet.etcd.leader)
        if leader is not None:
            leader.kill()
            await asyncio.sleep(self._chance.uniform(1, 5))
            self.fleet.etcd.start_member(leader)

    async def away(self) -> None:
        """All of etcd stands still."""
        self.fleet.etcd.pause()
        try:
            await asyncio.sleep(self.away_s)
        finally:
            self.fleet.etcd.resume()

    async def cut_off(self) -> None:
        """One host reaches neither etcd nor its peers."""
        name = self._chance.choice(HOSTS)
        self.switch.pull(name)
        try:
            await asyncio.sleep(CUT_OFF_S)
        finally:
            self.switch.plug(name)


FAULTS: Final[dict[str, Fault]] = {
    "worker": Run.worker,
    "destination": Run.destination,
    "leader": Run.leader,
    "away": Run.away,
    "cut-off": Run.cut_off,
}


async def make_guests(fleet: Fleet, count: int) -> list[str]:
    """Guests on host a that write all the while."""
    names = [f"g{number}" for number in range(count)]
    for number, name in enumerate(names):
        workload = "hot-cold" if number % 2 else "random"
        await fleet["a"].create_guest(name, MEMORY_MIB, workload=workload, dirty_rate_bytes_per_s=MIB << (number % 3))

    async def described() -> bool:
        plan = await fleet["a"].command("x-migrated-fleet-evacuate", {"host": "a", "dry-run": True})
        return len(plan["moves"]) == count

    await until("all guests described", described)
    return names


async def wrong(fleet: Fleet, names: list[str], job: dict[str, Any]) -> list[str]:
    """A sentence for everything that is not as it must be after a job."""
    found = [] if job["phase"] == "done" else [f"the job is {job['phase']}: {job['reason']}"]
    where = await fleet.where()
    for name in names:
        hosts = where.get(name, [])
        if len(hosts) != 1 or "a" in hosts:
            found.append(f"{name} is on {hosts or 'no host'}")
        else:
            verdict = await fleet[hosts[0]].verify(name)
            found += [] if verdict["ok"] else [f"{name} is damaged: {verdict['message']}"]
        found += fleet.double_runs(name)

    async def at_rest() -> bool:
        hosts = await fleet["b"].command("x-migrated-fleet-hosts")
        return all(
            one["lease"]
            and not (one["reserved_bytes"] or one["reserved_inbound"] or one["reserved_outbound"])
            and one["owned_guests"] == sum(hosts == [one["name"]] for hosts in where.values())
            for one in hosts
        )

    try:
        await until("owners and slots as the guests are", at_rest, 30.0)
    except (RigError, CommandError, DaemonUnreachableError) as error:
        found.append(str(error))
    return found + fleet.bugs()


async def measure(fleet: Fleet, count: int, rate: str) -> dict[str, Any]:
    """Empty host a without faults. Returns the figures."""
    names = await make_guests(fleet, count)
    job = await fleet.wait("b", await fleet.evacuate("a", "c"), JOB_S)
    violations = await wrong(fleet, names, job)
    sent = took_ns = 0
    for guest in job["guests"]:
        record = await fleet["a"].record(guest["migration_id"] or "-")
        sent += record["ram"]["transferred_bytes"] if record is not None else 0
        took_ns += (guest["ended_utc_ns"] or 0) - (guest["began_utc_ns"] or 0)
    digits = rate.rstrip("kmgbit")
    link_s = sent * 8 / (float(digits) * _BITS[rate.removeprefix(digits)])
    least_s = max(link_s, took_ns / 1e9 / SLOTS)
    await fleet.remove_guests()
    total_s = job["total_ns"] / 1e9
    return {
        "guests": len(names),
        "late": job["late"],
        "total_s": round(total_s, 1),
        "planned_s": round(job["expected_total_ns"] / 1e9, 1),
        "least_s": round(least_s, 1),
        "ratio": round(total_s / least_s, 2) if least_s else 0.0,
        "violations": violations,
    }


async def fault_run(
    fleet: Fleet, switch: Switch, fault: str, count: int, chance: random.Random, away_s: float
) -> list[str]:
    """Empty host a with one fault in the middle. Returns what was violated."""
    await fleet.joined()
    names = await make_guests(fleet, count)
    job = await fleet.evacuate("a", chance.choice(HOSTS))

    async def under_way() -> bool:
        found = await fleet.job("b", job)
        return found["ended_utc_ns"] is not None or any(one["state"] == "migrating" for one in found["guests"])

    await until("the job under way", under_way)
    await asyncio.sleep(chance.uniform(0, 2))
    await FAULTS[fault](Run(fleet, switch, job, chance, away_s))
    try:
        ended = await fleet.wait("b", job, JOB_S)
        found = await wrong(fleet, names, ended)
    except (RigError, CommandError, DaemonUnreachableError) as error:
        found = [str(error)]
    await fleet.remove_guests()
    return found


async def prove(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns the document of the last line."""
    chance, done, violations = random.Random(options.seed), Counter[str](), list[str]()
    result: dict[str, Any] = {}
    settings = {"lease_s": 4.0, "max_outbound": SLOTS}
    with (
        Switch(HOSTS, options.rate) as switch,
        Fleet(HOSTS, members=3, switch=switch, fleet=settings, tls={"insecure": True}) as fleet,
    ):
        await fleet.joined()
        if options.guests:
            result = await measure(fleet, options.guests, options.rate)
            violations += result.pop("violations")
            say(f"{result}")
        for number in range(options.runs):
            fault = list(FAULTS)[number % len(FAULTS)]
            begin = time.monotonic()
            found = await fault_run(fleet, switch, fault, options.guests_per_run, chance, options.away)
            violations += [f"run {number}, {fault}: {sentence}" for sentence in found]
            done[fault] += 1
            say(f"run {number}, {fault}: {'; '.join(found) or 'all well'} ({time.monotonic() - begin:.0f} s)")
            if found and options.keep_going is False:
                say(fleet.log_tail(80))
                break
    return {**result, "runs": done.total(), "faults": dict(done), "violations": violations}


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    """End as Ctrl-C does, which ends every process that was started."""
    raise KeyboardInterrupt


def main() -> int:
    """Run it, if this machine can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=int, default=12, help="guests of the measured evacuation, 0 for none")
    parser.add_argument("--guests-per-run", type=int, default=4, help="guests of a run with a fault")
    parser.add_argument("--rate", default="400mbit", help="of each host's link, as tc spells it")
    parser.add_argument("--runs", type=int, default=100, help="runs with a fault")
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
