"""Evacuations over a real etcd with one fault in the middle, and what must be true after each.

make guests -> empty host a -> the fault -> the job ends -> wrong()
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any, Final

from migrated.control.client import CommandError, DaemonUnreachableError
from scripts.basics import MIB
from scripts.fleet.network import Switch
from scripts.fleet.rig import Fleet
from scripts.rig.host import Host
from scripts.rig.waiting import RigError, until

HOSTS: Final = "abc"
MEMORY_MIB: Final = 64
JOB_S: Final = 240.0
CUT_OFF_S: Final = 10.0

Fault = Callable[["Run"], Awaitable[None]]
_NOT_NOW: Final = (CommandError, DaemonUnreachableError)


class Run:
    """One evacuation with a fault.

    Attributes:
        fleet, switch: where it happens.
        job: the evacuation of host a.
        others: jobs that were begun beside it.
        found: what was seen to be wrong meanwhile, sentences.
        away_s: how long etcd is away.
    """

    def __init__(self, fleet: Fleet, switch: Switch, job: str, chance: random.Random, away_s: float) -> None:
        self.fleet = fleet
        self.switch = switch
        self.job = job
        self.others: list[str] = []
        self.found: set[str] = set()
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

    async def source(self) -> None:
        """The daemon of the host that is emptied is killed."""
        await self._restart(self.fleet["a"])

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

    async def overlap(self) -> None:
        """Another operator empties host b, which the guests of a are on their way to: all end on c."""
        self.others.append(await self.fleet.evacuate("b", self._chance.choice(HOSTS)))

    async def watch_promises(self) -> None:
        """Look, until cancelled, whether any host was promised more slots or memory than it has."""
        while True:
            for host in await self._hosts():
                name = host["name"]
                if not host["lease"]:
                    continue
                if host["reserved_inbound"] > host["max_inbound"] or host["reserved_outbound"] > host["max_outbound"]:
                    self.found.add(f"{name} was promised more migrations than it has slots")
                if host["reserved_bytes"] + host["used_bytes"] > host["memory_bytes"]:
                    self.found.add(f"{name} was promised more memory than it gives")
            await asyncio.sleep(0.2)  # it looks for as long as the run lasts

    async def _hosts(self) -> list[dict[str, Any]]:
        for name in HOSTS:
            try:
                return list(await self.fleet[name].command("x-migrated-fleet-hosts"))
            except _NOT_NOW:
                continue
        return []


FAULTS: Final[dict[str, Fault]] = {
    "worker": Run.worker,
    "source": Run.source,
    "destination": Run.destination,
    "leader": Run.leader,
    "away": Run.away,
    "cut-off": Run.cut_off,
    "overlap": Run.overlap,
}


async def make_guests(fleet: Fleet, count: int) -> list[str]:
    """Guests on host a that write all the while; returns their names once the fleet knows what they need."""
    names = [f"g{number}" for number in range(count)]
    for number, name in enumerate(names):
        workload = "hot-cold" if number % 2 else "random"
        await fleet["a"].create_guest(name, MEMORY_MIB, workload=workload, dirty_rate_bytes_per_s=MIB << (number % 3))

    async def described() -> bool:
        plan = await fleet["a"].command("x-migrated-fleet-evacuate", {"host": "a", "dry-run": True})
        return len(plan["moves"]) == count

    await until("all guests described", described)
    return names


async def wrong(fleet: Fleet, names: Collection[str], jobs: Collection[dict[str, Any]]) -> list[str]:
    """A sentence for everything that is not as it must be after jobs that emptied hosts."""
    found = [f"the job of {job['host']} is {job['phase']}: {job['reason']}" for job in jobs if job["phase"] != "done"]
    emptied = {job["host"] for job in jobs}
    where = await fleet.where()
    for name in names:
        hosts = where.get(name, [])
        if len(hosts) != 1 or hosts[0] in emptied:
            found.append(f"{name} is on {hosts or 'no host'}")
        else:
            verdict = await fleet[hosts[0]].verify(name)
            found += [] if verdict["ok"] else [f"{name} is damaged: {verdict['message']}"]
        found += fleet.double_runs(name)

    async def at_rest() -> bool:
        try:
            hosts = await fleet["b"].command("x-migrated-fleet-hosts")
        except _NOT_NOW:
            return False  # a member of etcd that was cut off comes back with an election
        return all(
            one["lease"]
            and not (one["reserved_bytes"] or one["reserved_inbound"] or one["reserved_outbound"])
            and one["owned_guests"] == sum(hosts == [one["name"]] for hosts in where.values())
            for one in hosts
        )

    try:
        await until("owners and slots as the guests are", at_rest, 30.0)
    except RigError as error:
        found.append(str(error))
    return found + fleet.bugs()


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
    run = Run(fleet, switch, job, chance, away_s)
    watching = asyncio.create_task(run.watch_promises())
    try:
        await FAULTS[fault](run)
        ended = [await fleet.wait("b", one, JOB_S) for one in (job, *run.others)]
        found = await wrong(fleet, names, ended)
    except (RigError, *_NOT_NOW) as error:
        found = [str(error)]
    finally:
        watching.cancel()
    try:
        await until("everything of the run removed", partial(_removed, fleet), JOB_S)
    except (RigError, *_NOT_NOW) as error:
        found.append(str(error))
    return [*found, *sorted(run.found)]


async def _removed(fleet: Fleet) -> bool:
    """Remove what a run left; False where the store, which was harmed a moment ago, did not answer meanwhile."""
    try:
        await fleet.remove_guests()
    except _NOT_NOW:
        return False
    return True
