"""A fleet of real daemons on a real etcd: evacuations with what can go wrong in the middle, and who may take guests in.

a [g0 g1 ..] --job in etcd, any daemon carries it on--> b, c          each guest owned by one host at every instant
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrated.control.client import CommandError
from migrated.member.identity import boot_id
from migrated.member.leftovers import BOOT_ID
from scripts.fleet.etcd_cluster import why_no_etcd
from scripts.fleet.rig import Fleet
from scripts.rig.waiting import until
from vmm_sim.errors import VmmError

pytestmark = pytest.mark.skipif(why_no_etcd() is not None, reason=why_no_etcd() or "")

GUESTS = 3


@pytest.fixture(scope="module")
def locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guests' locks lie."""
    return tmp_path_factory.mktemp("locks")


@pytest.fixture(scope="module")
def shared(locks: Path) -> Iterator[Fleet]:
    """Three hosts that the tests of the module share; a test that kills a daemon starts it again. Their etcd asks for
    certificates and a user, and their guests' locks lie where all of them see them."""
    with Fleet("abc", secure=True, lock={"directory": str(locks)}) as fleet:
        yield fleet


@pytest.fixture
async def fleet(shared: Fleet) -> AsyncIterator[Fleet]:
    """The shared hosts, all in the fleet and without guests; an unexpected exception in a daemon fails the test."""
    await shared.joined()
    yield shared
    print(shared.log_tail())  # noqa: T201 - shown when the test failed
    await shared.remove_guests()
    assert shared.bugs() == []


async def make_guests(fleet: Fleet, host: str, count: int = GUESTS, **arguments: object) -> list[str]:
    names = [f"g{number}" for number in range(count)]
    given = {"workload": "hot-cold", "dirty_rate_bytes_per_s": 4 << 20, **arguments}
    for name in names:
        await fleet[host].create_guest(name, 32, **given)
    return names


async def assert_moved(fleet: Fleet, names: list[str], hosts: str) -> None:
    """Every guest runs on exactly one of the hosts, is intact, and never ran twice; its owner is the host it is on."""
    where = await fleet.where()
    assert sorted(where) == sorted(names)
    for name in names:
        (host,) = where[name]
        assert host in hosts
        assert (await fleet[host].verify(name))["ok"]
        assert fleet.double_runs(name) == []

    async def settled() -> bool:
        found = {one["name"]: one for one in await fleet["b"].command("x-migrated-fleet-hosts")}
        counts = {name: sum(host == name for (host,) in where.values()) for name in found}
        return all(one["owned_guests"] == counts[name] for name, one in found.items()) and all(
            one["reserved_inbound"] == one["reserved_outbound"] == one["reserved_bytes"] == 0 for one in found.values()
        )

    await until("owners and slots as the guests are", settled)


async def test_a_host_is_emptied_and_takes_nothing_in_until_it_is_uncordoned(fleet: Fleet) -> None:
    """Asked of another host than the one that is emptied; a dry run before it moves nothing."""
    names = await make_guests(fleet, "a")

    async def described() -> bool:
        plan = await fleet["b"].command("x-migrated-fleet-evacuate", {"host": "a", "dry-run": True})
        return {move["guest"] for move in plan["moves"]} == set(names)

    await until("all guests in the plan", described)
    job = await fleet.wait("c", await fleet.evacuate("a", "c"))
    assert job["phase"] == "done"
    assert all(guest["state"] == "done" and guest["downtime_ns"] is not None for guest in job["guests"])
    await assert_moved(fleet, names, "bc")
    hosts = {one["name"]: one for one in await fleet["b"].command("x-migrated-fleet-hosts")}
    assert hosts["a"]["cordoned"]
    plan = await fleet["c"].command("x-migrated-fleet-evacuate", {"host": "b", "to": ["a"], "dry-run": True})
    assert plan["refusals"]
    assert all("cordoned" in why for why in plan["refusals"].values())
    assert (await fleet["c"].command("x-migrated-fleet-uncordon", {"host": "a"}))["cordoned"] is False


async def test_two_operators_at_once_keep_slots_and_memory(fleet: Fleet) -> None:
    """Hosts a and b are emptied at the same time: all goes to c, one after the other where slots demand it."""
    on_a = await make_guests(fleet, "a", 2)
    await fleet["b"].create_guest("h0", 32)
    await fleet["b"].create_guest("h1", 32)
    jobs = await asyncio.gather(fleet.evacuate("a", "a"), fleet.evacuate("b", "b"))
    most = 0
    while None in [(await fleet.job("c", job))["ended_utc_ns"] for job in jobs]:
        host = next(one for one in await fleet["c"].command("x-migrated-fleet-hosts") if one["name"] == "c")
        most = max(most, host["reserved_inbound"])
        assert host["reserved_inbound"] <= host["max_inbound"]
        assert host["reserved_bytes"] + host["used_bytes"] <= host["memory_bytes"]
    assert most > 0
    assert [(await fleet.job("c", job))["phase"] for job in jobs] == ["done", "done"]
    await assert_moved(fleet, [*on_a, "h0", "h1"], "c")


async def test_another_daemon_carries_on_when_the_worker_is_killed(fleet: Fleet) -> None:
    """The worker is not a host that guests move from or to, so that only the job can suffer."""
    names = await make_guests(fleet, "a", 4)
    job = await fleet.evacuate("a", "c", to=["b"])

    async def under_way() -> bool:
        found = await fleet.job("a", job)
        return found["worker"] == "c" and any(guest["state"] == "migrating" for guest in found["guests"])

    await until("the job under way", under_way)
    fleet["c"].kill()
    done = await fleet.wait("a", job)
    assert done["phase"] == "done"
    fleet.start_host(fleet["c"])
    await fleet.joined()
    await assert_moved(fleet, names, "b")


async def test_etcd_may_be_away_while_guests_move(fleet: Fleet) -> None:
    """Longer than a lease: the job goes on where it stood, and no guest notices more than an aborted attempt."""
    names = await make_guests(fleet, "a")
    job = await fleet.evacuate("a", "b")

    async def under_way() -> bool:
        return any(guest["state"] == "migrating" for guest in (await fleet.job("a", job))["guests"])

    await until("the job under way", under_way)
    fleet.etcd.pause()
    try:
        await until("the outage is noticed", lambda: _says_away(fleet), 20)
        assert {guest["state"] for guest in (await fleet["a"].guests()).values()} <= {"running"}
    finally:
        fleet.etcd.resume()
    done = await fleet.wait("b", job)
    assert done["phase"] == "done"
    await assert_moved(fleet, names, "bc")


async def test_the_lock_of_a_guest_carries_the_revision_of_its_owner(fleet: Fleet, locks: Path) -> None:
    """Wherever the guest goes; a host that comes with an older one, as one that was cut off would, does not get it."""
    (name,) = await make_guests(fleet, "a", 1)
    path = locks / f"{(await fleet['a'].guest(name))['uuid']}.lock"

    async def carried(host: str) -> int:
        async def same() -> int | None:
            token = int(path.read_bytes() or b"0")
            return token if await fleet.owner(name) == (host, token) else None

        return await until(f"the token of {host} in the lock", same)

    before = await carried("a")
    assert (await fleet["a"].migrate(name, fleet["b"]))["outcome"] == "completed"
    assert await carried("b") > before
    vmm = await fleet["b"].vmm(name)
    await vmm.call("pause")
    await vmm.call("unlock")
    with pytest.raises(VmmError, match="given to another host since"):
        await vmm.call("lock", token=before)
    await vmm.call("lock")
    await vmm.call("resume")
    await vmm.close()


async def test_guests_of_a_host_that_was_booted_anew_start_elsewhere(fleet: Fleet) -> None:
    """Their processes ended with the host: nobody has to fence it."""
    await make_guests(fleet, "c", 1)
    boot = fleet["c"].directory / "state" / BOOT_ID
    assert boot.read_text(encoding="ascii").strip() == boot_id()
    fleet["c"].kill()
    fleet["c"].kill_vmm("g0")
    boot.write_text("another boot\n", encoding="ascii")
    fleet.start_host(fleet["c"])

    async def free() -> bool:
        return await fleet.owner("g0") is None

    async def noted() -> bool:
        return boot.read_text(encoding="ascii").strip() == boot_id()

    await until("the guest without an owner", free)
    await fleet["a"].create_guest("g0", 32)
    await until("the boot noted", noted)


async def _says_away(fleet: Fleet) -> bool:
    try:
        await fleet["a"].command("x-migrated-fleet-hosts")
    except CommandError as error:
        return "cannot be reached" in str(error)
    return False


async def test_a_guest_of_a_lost_host_starts_elsewhere_once_it_is_fenced(fleet: Fleet) -> None:
    """A lease that ended gives nothing away; somebody's word does. The host that comes back may not have the guest."""
    await fleet["c"].create_guest("g0", 32)
    fleet["c"].kill()

    async def gone() -> bool:
        found = {one["name"]: one for one in await fleet["a"].command("x-migrated-fleet-hosts")}
        return not found["c"]["lease"] and found["c"]["owned_guests"] == 1

    await until("the lease of c has ended", gone)
    with pytest.raises(CommandError, match="is not fenced"):
        await fleet["a"].create_guest("g0", 32)
    fleet["c"].kill_vmm("g0")
    fenced = await fleet["a"].command("x-migrated-fleet-fence", {"host": "c", "reason": "it was switched off"})
    assert fenced["fenced"]
    await fleet["a"].create_guest("g0", 32)
    fleet.start_host(fleet["c"])
    with pytest.raises(CommandError, match="fenced"):
        await fleet["c"].create_guest("g1", 32)
    await fleet["a"].command("x-migrated-fleet-unfence", {"host": "c"})
    with pytest.raises(CommandError, match="a may have it"):
        await fleet["c"].create_guest("g0", 32)


async def test_a_job_is_cancelled_and_resumed(fleet: Fleet) -> None:
    names = await make_guests(fleet, "a", 4)
    # Not through the rig, which waits until all hosts have seen the job: it may be over by then.
    job = (await fleet["a"].command("x-migrated-fleet-evacuate", {"host": "a", "max-parallel": 1}))["job"]
    await fleet["a"].command("x-migrated-fleet-cancel", {"job": job})
    cancelled = await fleet.wait("b", job)
    assert cancelled["phase"] == "cancelled"
    assert any(guest["state"] == "cancelled" for guest in cancelled["guests"]) or not cancelled["guests"]
    await fleet["c"].command("x-migrated-fleet-resume", {"job": job})
    done = await fleet.wait("b", job)
    assert done["phase"] == "done", [(guest["guest"], guest["state"], guest["reason"]) for guest in done["guests"]]
    await assert_moved(fleet, names, "bc")
