"""What operators do to a migration under way: cancel it in every state, hold it, ask for it twice, stop the daemon.

setup -> active -> [hold] -> device -> completed
  cancel   cancel    cancel    cancel   too late
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from migrated.control.client import CommandError, ControlClient
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

MS = 1_000_000
CANCEL_S = 1.0
"""100 ms on an idle machine, with room for a busy one."""
SLOW = {"max_bandwidth": 4 << 20}
"""Rounds that last long enough to be cancelled in."""
HELD = {"pause_before_switchover": True, "downtime_limit": 20_000, "timeout_s": 0.1, "on_timeout": "force"}


async def cancel(pair: Pair, migration_id: str) -> dict[str, Any]:
    """Cancel on the source; it takes effect at once."""
    begin = time.monotonic()
    await pair.a.command("migrate_cancel", {"guest": "g1"})
    record = await pair.a.wait(migration_id)
    assert time.monotonic() - begin < CANCEL_S
    return record


async def assert_runs_on(pair: Pair, record: dict[str, Any]) -> None:
    """The guest is the source's, whole, and nothing is left on the destination."""
    assert record["outcome"] == "cancelled"
    assert "cancelled" in record["reason"]
    assert await pair.settled() is pair.a
    assert (await pair.a.guest())["state"] == "running"
    assert (await pair.a.verify())["ok"]
    assert pair.double_runs() == []
    theirs = await pair.b.progress()
    assert theirs is None or theirs["status"] == "failed"


async def assert_retry_works(pair: Pair) -> None:
    record = await pair.a.migrate("g1", pair.b, downtime_limit=20_000)
    assert record["outcome"] == "completed", record["reason"]
    assert (await pair.b.verify())["ok"]


async def test_cancel_while_it_is_set_up(pair: Pair) -> None:
    await pair.a.create_guest("g1", 32)
    migration_id = await pair.a.begin_migration("g1", pair.b)
    await assert_runs_on(pair, await cancel(pair, migration_id))
    await assert_retry_works(pair)


async def test_cancel_while_rounds_run(pair: Pair) -> None:
    await pair.a.create_guest("g1", 64)
    migration_id = await pair.a.begin_migration("g1", pair.b, **SLOW)
    await pair.a.until_status("g1", "active")
    record = await cancel(pair, migration_id)
    await assert_runs_on(pair, record)
    assert record["downtime"] is None
    assert [entry["event"] for entry in pair.a.run_log()] == ["run"], "the guest was never stopped"
    await assert_retry_works(pair)


async def test_cancel_in_the_hold(pair: Pair) -> None:
    await pair.a.create_guest("g1", 32)
    migration_id = await pair.a.begin_migration("g1", pair.b, **HELD)
    await pair.a.until_status("g1", "pre-switchover")
    record = await cancel(pair, migration_id)
    await assert_runs_on(pair, record)
    downtime = record["downtime"]
    assert sum(part["ns"] for part in downtime["parts"]) + downtime["unattributed_ns"] == downtime["measured_ns"]
    await assert_retry_works(pair)


async def test_cancel_while_the_guest_is_stopped(pair: Pair) -> None:
    """The destination is in the middle of a load of 250 ms when the cancel comes."""
    await pair.a.create_guest("g1", 32, profile="slow-load")
    migration_id = await pair.a.begin_migration("g1", pair.b, downtime_limit=20_000)
    await pair.a.until_status("g1", "device")
    record = await cancel(pair, migration_id)
    await assert_runs_on(pair, record)
    assert record["downtime"]["measured_ns"] > 0
    await assert_retry_works(pair)


async def test_a_second_cancel_is_no_error_and_neither_is_one_without_a_migration(pair: Pair) -> None:
    await pair.a.create_guest("g1", 64)
    await pair.a.command("migrate_cancel", {"guest": "g1"})
    migration_id = await pair.a.begin_migration("g1", pair.b, **SLOW)
    await pair.a.until_status("g1", "active")
    await pair.a.command("migrate_cancel", {"guest": "g1"})
    await pair.a.command("migrate_cancel", {"guest": "g1"})
    assert (await pair.a.wait(migration_id))["outcome"] == "cancelled"
    await pair.a.command("migrate_cancel", {"guest": "g1"})


async def test_the_destinations_operator_gives_up(pair: Pair) -> None:
    await pair.a.create_guest("g1", 64)
    migration_id = await pair.a.begin_migration("g1", pair.b, **SLOW)
    await pair.b.until_status("g1", "active")
    await pair.a.until_status("g1", "active")
    await pair.b.command("migrate_cancel", {"guest": "g1"})
    record = await pair.a.wait(migration_id)
    assert record["outcome"] == "cancelled"
    assert "destination" in record["reason"]
    assert await pair.settled() is pair.a
    await assert_retry_works(pair)


async def test_a_hold_lasts_until_the_operator_goes_on_and_does_not_count(pair: Pair) -> None:
    await pair.a.create_guest("g1", 32, profile="small")
    limits = HELD | {"downtime_limit": 2_000}
    migration_id = await pair.a.begin_migration("g1", pair.b, **limits)
    await pair.a.until_status("g1", "pre-switchover")
    assert (await pair.a.guest())["state"] == "paused"
    held_since = time.monotonic()

    async def longer_than_the_limit() -> bool:
        return time.monotonic() - held_since > 2.5

    await until("the limit has passed in the hold", longer_than_the_limit)
    await pair.a.command("migrate-continue", {"guest": "g1", "state": "pre-switchover"})
    record = await pair.a.wait(migration_id)
    assert record["outcome"] == "completed", record["reason"]
    downtime = record["downtime"]
    assert downtime["hold_ns"] >= 2_400 * MS
    assert downtime["measured_ns"] >= downtime["hold_ns"], "the guest was stopped all the time"
    assert sum(part["ns"] for part in downtime["parts"]) + downtime["unattributed_ns"] == downtime["measured_ns"]
    assert (await pair.b.verify())["ok"]
    assert pair.double_runs() == []


async def test_nothing_is_held_so_nothing_can_go_on(pair: Pair) -> None:
    await pair.a.create_guest("g1", 16)
    with pytest.raises(CommandError, match="not in expected state: none"):
        await pair.a.command("migrate-continue", {"guest": "g1", "state": "pre-switchover"})


async def test_a_second_migration_of_the_same_guest_is_refused_and_the_first_goes_on(pair: Pair) -> None:
    await pair.a.create_guest("g1", 32)
    migration_id = await pair.a.begin_migration("g1", pair.b, downtime_limit=20_000, max_bandwidth=8 << 20)
    with pytest.raises(CommandError, match=migration_id):
        await pair.a.begin_migration("g1", pair.b)
    for command in ("x-migrated-guest-pause", "x-migrated-guest-resume", "x-migrated-guest-destroy"):
        with pytest.raises(CommandError, match="being migrated"):
            await pair.a.command(command, {"guest": "g1"})
    await pair.a.command("migrate-set-parameters", {"guest": "g1", "max-bandwidth": 0})
    assert (await pair.a.wait(migration_id))["outcome"] == "completed", "a cap that is lifted counts at once"


async def test_events_tell_the_story_in_order(pair: Pair) -> None:
    await pair.a.create_guest("g1", 16)
    async with await ControlClient.connect(pair.a.socket) as client:
        record = await pair.a.migrate("g1", pair.b, downtime_limit=20_000)
        assert record["outcome"] == "completed", record["reason"]
        story: list[str] = []
        async with asyncio.timeout(10):
            async for event in client.events():
                story.append(event["data"].get("status", event["event"]))
                if story[-1] == "completed":
                    break
    assert [name for name in story if name.islower()] == ["active", "device", "completed"]
    assert story.index("MIGRATION_PASS") < story.index("STOP") < story.index("device")


async def test_a_paused_guest_neither_stops_nor_resumes(pair: Pair) -> None:
    """As with QEMU: the guest never ran, so there is nothing to tell."""
    await pair.a.create_guest("g1", 16, paused=True)
    async with await ControlClient.connect(pair.a.socket) as here, await ControlClient.connect(pair.b.socket) as there:
        migration_id = await pair.a.begin_migration("g1", pair.b, pause_before_switchover=True)
        await pair.a.until_status("g1", "pre-switchover")
        assert (await cancel(pair, migration_id))["outcome"] == "cancelled"
        record = await pair.a.migrate("g1", pair.b)
        assert record["outcome"] == "completed", record["reason"]
        await pair.b.until_status("g1", "completed")
        for client in (here, there):
            names = []
            async with asyncio.timeout(10):
                async for event in client.events():
                    names.append(event["event"])
                    if event["event"] == "MIGRATION" and event["data"]["status"] == "completed":
                        break
            assert not {"STOP", "RESUME"} & set(names)


async def test_an_orderly_stop_of_the_daemon_keeps_its_guests_and_ends_its_migrations(fresh: Pair) -> None:
    await fresh.a.create_guest("g1", 64)
    migration_id = await fresh.a.begin_migration("g1", fresh.b, **SLOW)
    await fresh.a.until_status("g1", "active")
    pid = (await fresh.a.guests())["g1"]["pid"]
    assert fresh.a.stop() == 0
    fresh.a.restart()
    record = await fresh.a.record(migration_id)
    assert record is not None
    assert (record["outcome"], (await fresh.a.guests())["g1"]["pid"]) == ("cancelled", pid)
    assert "stopping" in record["reason"]
    assert await fresh.settled() is fresh.a
    assert (await fresh.a.verify())["ok"]
    retry = await fresh.a.migrate("g1", fresh.b, downtime_limit=20_000)
    assert retry["outcome"] == "completed", retry["reason"]
    assert fresh.double_runs() == []


async def test_a_killed_daemon_finds_its_running_guest_again(fresh: Pair) -> None:
    await fresh.a.create_guest("g1", 16)
    before = await fresh.a.guest()
    fresh.a.kill()
    fresh.a.restart()
    after = await fresh.a.guest()
    assert (after["pid"], after["state"]) == (before["pid"], "running")
    assert after["step"] >= before["step"]
    assert [entry["event"] for entry in fresh.a.run_log()] == ["run"]
