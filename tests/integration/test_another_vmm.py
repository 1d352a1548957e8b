"""A VMM that gives little, between real daemons: no facet, one block of state, private memory of its process.

create on a -> migrate to b -> verify -> and back; then what such a guest cannot have, each with its sentence
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from migrated.control.client import CommandError
from migrated.kernel import userfault
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

TINY = {"drivers": ["tests.tiny_vmm.driver:TinyDriver"], "driver": "tiny"}
ROOMY = {"downtime_limit": 20_000}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Pair]:
    try:
        uffd = userfault.open_userfaultfd()
        userfault.enable_write_tracking(uffd)
    except OSError as error:
        pytest.skip(f"this kernel has no asynchronous write protection, or we may not use it: {error}")
    with Pair(vmm=TINY) as pair:
        yield pair


@pytest.fixture
async def tiny(hosts: Pair) -> AsyncIterator[Pair]:
    """Two hosts with the driver of the tiny VMM, without guests."""
    yield hosts
    print(hosts.log_tail())  # noqa: T201 - shown when the test failed
    for host in (hosts.a, hosts.b):
        for name in await host.guests():
            await host.command("x-migrated-guest-destroy", {"guest": name})


async def steps(host: Host, at_least: int) -> int:
    """Steps that the guest has done, once there are so many."""

    async def reached() -> int | None:
        done = int((await host.guest())["steps"])
        return done if done >= at_least else None

    return await until(f"{at_least} steps of the guest on host {host.name}", reached)


async def assert_whole(host: Host) -> None:
    verified = await host.verify()
    assert verified["ok"], verified


async def test_there_and_back(tiny: Pair) -> None:
    await tiny.a.create_guest("g1", 16)
    done = await steps(tiny.a, 500)
    here, there = tiny.a, tiny.b
    for _ in range(4):
        record = await here.migrate("g1", there, **ROOMY)
        assert record["outcome"] == "completed", record["reason"]
        assert record["time"] is None
        assert record["digest"]["source"] == record["digest"]["destination"] is not None
        assert [device["name"] for device in record["devices"]] == ["everything"]
        assert "stop-drain" not in [part["name"] for part in record["downtime"]["parts"]]
        assert "g1" not in await here.guests()
        await assert_whole(there)
        done = await steps(there, done + 100)
        here, there = there, here


async def test_a_paused_guest_arrives_paused_and_whole(tiny: Pair) -> None:
    await tiny.a.create_guest("g1", 16)
    await steps(tiny.a, 200)
    await tiny.a.command("x-migrated-guest-pause", {"guest": "g1"})
    record = await tiny.a.migrate("g1", tiny.b, **ROOMY)
    assert record["outcome"] == "completed", record["reason"]
    assert (await tiny.b.guest())["state"] == "paused"
    await assert_whole(tiny.b)


async def test_a_cancel_in_the_blackout_leaves_it_running_on_the_source(tiny: Pair) -> None:
    await tiny.a.create_guest("g1", 16)
    done = await steps(tiny.a, 200)
    migration_id = await tiny.a.begin_migration("g1", tiny.b, pause_before_switchover=True, **ROOMY)
    await tiny.a.until_status("g1", "pre-switchover")
    assert (await tiny.a.guest())["state"] == "paused"
    await tiny.a.command("migrate_cancel", {"guest": "g1"})
    record = await tiny.a.wait(migration_id)
    assert record["outcome"] == "cancelled", record["reason"]
    await steps(tiny.a, done + 100)
    await assert_whole(tiny.a)
    assert "g1" not in await tiny.b.guests()


async def test_a_restarted_daemon_finds_it_again(tiny: Pair) -> None:
    await tiny.a.create_guest("g1", 16)
    done = await steps(tiny.a, 100)
    tiny.a.kill()
    tiny.a.restart()
    assert await steps(tiny.a, done + 100) > done


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"auto_converge": True}, "auto_converge cannot be had for guest 'g1' (driver 'tiny')"),
        ({"time_policy": "freeze"}, "time_policy=freeze cannot be had for guest 'g1' (driver 'tiny')"),
        ({"dirty_tracking": "logged"}, "dirty_tracking=logged cannot be had for guest 'g1' (driver 'tiny')"),
    ],
)
async def test_what_needs_a_missing_facet_is_refused(tiny: Pair, parameters: dict[str, Any], sentence: str) -> None:
    await tiny.a.create_guest("g1", 16)
    record = await tiny.a.migrate("g1", tiny.b, **parameters)
    assert record["outcome"] == "refused"
    assert sentence in record["reason"]
    assert (await tiny.a.guest())["state"] == "running"


async def test_an_operation_that_only_another_vmm_has_is_refused(tiny: Pair) -> None:
    with pytest.raises(CommandError, match=r"a tiny guest has no options, and was given .*'workload': 'idle'"):
        await tiny.a.create_guest("g1", 16, workload="idle")


async def test_a_destination_without_the_driver_refuses(tiny: Pair, fresh: Pair) -> None:
    await tiny.a.create_guest("g1", 16)
    record = await tiny.a.migrate("g1", fresh.b)
    assert record["outcome"] == "refused"
    assert "needs the driver 'tiny', which the destination lacks; it has qemu, sim" in record["reason"]
