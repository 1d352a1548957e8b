"""After COMMIT without an answer the attempt is in doubt: told loudly, ended by the peer, its journal or an operator.

source  STOPPED -> COMMITTED --x (lost) ...... OUTCOME? on fresh connections ......> answer: RETIRED | ABORTED
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from migrated.cli.migratectl import main
from migrated.control.client import CommandError
from protocol.messages import FrameType
from scripts.rig.faults import AtFrame, Call, Cut, Way
from scripts.rig.faulty import FaultyPair
from scripts.rig.waiting import until

PARAMETERS = {"downtime_limit": 20_000, "timeout_s": 0.1, "on_timeout": "force"}
PATIENT = {"ready_timeout_s": 60.0}
"""The destination waits for the decision until the test lets it come."""
HASTY = {"ready_timeout_s": 0.2}
"""The destination gives the guest up before the decision can come."""


@pytest.fixture
async def doubtful(request: pytest.FixtureRequest) -> AsyncIterator[FaultyPair]:
    """Hosts of the test's own; parametrize it indirectly with their options."""
    with FaultyPair(**getattr(request, "param", {})) as pair:
        await pair.a.create_guest("g1", 16, profile="small")
        yield pair
        print(pair.log_tail())  # noqa: T201 - shown when the test failed
        await pair.recover()
        await pair.remove_guests()
        assert await pair.leftovers() == []


def options(limits: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"limits": limits, **others}


async def lose(pair: FaultyPair, frame: FrameType, *ways: Way) -> str:
    """Begin a migration whose first such frame is lost with all that follows. Returns its id."""
    proxy = pair.way_to(pair.b)
    fault = proxy.arm(AtFrame(frame), Cut(ways or (Way.TO_DESTINATION, Way.TO_SOURCE)))
    migration_id = await pair.a.begin_migration("g1", proxy.uri, **PARAMETERS)
    assert await pair.fired(fault, pair.a, migration_id)
    return migration_id


async def in_doubt(pair: FaultyPair, migration_id: str) -> None:
    """Wait for the doubt, and see that everyone is told of it."""
    record = await pair.a.wait(migration_id)
    assert record["outcome"] == "in-doubt"
    assert "resolve" in record["reason"]
    progress = await pair.a.progress()
    assert progress is not None
    assert progress["status"] == "in-doubt"
    assert (await pair.a.guests())["g1"]["state"] == "in-doubt"
    with pytest.raises(CommandError, match="COMMIT"):
        await pair.a.command("migrate_cancel", {"guest": "g1"})
    with pytest.raises(CommandError, match="in-doubt"):
        await pair.a.command("x-migrated-guest-resume", {"guest": "g1"})


async def outcome(pair: FaultyPair, migration_id: str) -> dict[str, Any]:
    """The record once the doubt has ended."""

    async def decided() -> dict[str, Any] | None:
        record = await pair.a.record(migration_id)
        return record if record is not None and record["outcome"] != "in-doubt" else None

    record = await until("the doubt ends", decided)
    assert pair.double_runs() == []
    return record


@pytest.mark.parametrize("doubtful", [options(PATIENT)], indirect=True)
async def test_a_lost_commit_arrives_over_a_fresh_connection(doubtful: FaultyPair) -> None:
    migration_id = await lose(doubtful, FrameType.COMMIT)
    await in_doubt(doubtful, migration_id)
    assert (await doubtful.b.guests())["g1"]["state"] == "incoming"
    doubtful.way_to(doubtful.b).heal()
    record = await outcome(doubtful, migration_id)
    assert record["outcome"] == "completed"
    assert await doubtful.settled() is doubtful.b
    assert (await doubtful.b.verify())["ok"]
    assert await doubtful.check_retry("g1", doubtful.b) == []


@pytest.mark.parametrize("doubtful", [options(HASTY)], indirect=True)
async def test_a_commit_that_comes_too_late_is_answered_with_the_proof(doubtful: FaultyPair) -> None:
    migration_id = await lose(doubtful, FrameType.COMMIT)
    await in_doubt(doubtful, migration_id)
    await doubtful.b.until_status("g1", "failed")
    doubtful.way_to(doubtful.b).heal()
    record = await outcome(doubtful, migration_id)
    assert record["outcome"] == "aborted"
    assert "discarded" in record["reason"]
    assert await doubtful.settled() is doubtful.a
    assert (await doubtful.a.verify())["ok"]
    assert await doubtful.check_retry("g1", doubtful.a) == []


async def test_a_lost_answer_is_asked_for_again(doubtful: FaultyPair) -> None:
    migration_id = await lose(doubtful, FrameType.RUNNING, Way.TO_SOURCE)
    await in_doubt(doubtful, migration_id)
    assert (await doubtful.b.guests())["g1"]["state"] == "running"
    doubtful.way_to(doubtful.b).heal()
    assert (await outcome(doubtful, migration_id))["outcome"] == "completed"
    assert await doubtful.settled() is doubtful.b
    assert (await doubtful.b.verify())["ok"]


@pytest.mark.parametrize("doubtful", [options(PATIENT)], indirect=True)
async def test_the_destination_restarts_after_it_voted(doubtful: FaultyPair) -> None:
    """It is killed before COMMIT comes; its journal knows the vote, and it runs the guest when it is told to."""
    proxy = doubtful.way_to(doubtful.b)
    fault = proxy.arm(AtFrame(FrameType.COMMIT), Call(doubtful.b.kill))
    migration_id = await doubtful.a.begin_migration("g1", proxy.uri, **PARAMETERS)
    assert await doubtful.fired(fault, doubtful.a, migration_id)
    await in_doubt(doubtful, migration_id)
    await doubtful.recover()
    assert (await outcome(doubtful, migration_id))["outcome"] == "completed"
    assert await doubtful.settled() is doubtful.b
    assert (await doubtful.b.verify())["ok"]


async def test_the_destination_restarts_after_it_ran_the_guest(doubtful: FaultyPair) -> None:
    migration_id = await lose(doubtful, FrameType.RUNNING, Way.TO_SOURCE)
    doubtful.b.kill()
    await in_doubt(doubtful, migration_id)
    await doubtful.recover()
    assert (await outcome(doubtful, migration_id))["outcome"] == "completed"
    assert await doubtful.settled() is doubtful.b
    assert (await doubtful.b.verify())["ok"]


@pytest.mark.parametrize("doubtful", [options(PATIENT)], indirect=True)
async def test_the_source_restarts_after_commit(doubtful: FaultyPair) -> None:
    proxy = doubtful.way_to(doubtful.b)
    fault = proxy.arm(AtFrame(FrameType.COMMIT), Call(doubtful.a.kill))
    migration_id = await doubtful.a.begin_migration("g1", proxy.uri, **PARAMETERS)
    assert await doubtful.fired(fault, doubtful.a, migration_id)
    await doubtful.recover()
    record = await outcome(doubtful, migration_id)
    assert record["outcome"] == "completed"
    assert await doubtful.settled() is doubtful.b
    assert (await doubtful.b.verify())["ok"]
    assert doubtful.a.vmm_pids() == {}


@pytest.mark.parametrize("doubtful", [options(HASTY)], indirect=True)
async def test_an_operator_runs_it_here_after_the_other_host_gave_up(doubtful: FaultyPair) -> None:
    migration_id = await lose(doubtful, FrameType.COMMIT)
    await in_doubt(doubtful, migration_id)
    await doubtful.b.until_status("g1", "failed")
    record = await doubtful.a.command("x-migrated-resolve", {"migration-id": migration_id, "action": "run-here"})
    assert record["outcome"] == "aborted"
    assert "operator" in record["reason"]
    assert (await doubtful.a.guest())["state"] == "running"
    doubtful.way_to(doubtful.b).heal()
    assert await doubtful.settled() is doubtful.a
    assert (await doubtful.a.verify())["ok"]
    assert doubtful.double_runs() == []
    assert await doubtful.check_retry("g1", doubtful.a) == []


async def test_an_operator_discards_it_here_while_the_other_host_runs_it(doubtful: FaultyPair) -> None:
    migration_id = await lose(doubtful, FrameType.RUNNING, Way.TO_SOURCE)
    await in_doubt(doubtful, migration_id)
    record = await doubtful.a.command("x-migrated-resolve", {"migration-id": migration_id, "action": "discard"})
    assert record["outcome"] == "completed"
    assert await doubtful.a.guests() == {}
    assert doubtful.a.vmm_pids() == {}
    doubtful.way_to(doubtful.b).heal()
    assert await doubtful.settled() is doubtful.b
    assert (await doubtful.b.verify())["ok"]
    assert doubtful.double_runs() == []


@pytest.mark.parametrize("doubtful", [options({}, shared_lock=True)], indirect=True)
async def test_a_shared_lock_fences_an_operator_who_is_wrong(doubtful: FaultyPair) -> None:
    """The guest runs on b; whoever runs it on a all the same is stopped by the lock, and told so."""
    migration_id = await lose(doubtful, FrameType.RUNNING, Way.TO_SOURCE)
    await in_doubt(doubtful, migration_id)
    await doubtful.a.command("x-migrated-resolve", {"migration-id": migration_id, "action": "run-here"})
    guest = await doubtful.a.guest()
    assert guest["state"] == "paused"
    record = await doubtful.a.record(migration_id)
    assert record is not None
    assert "lock" in record["reason"]
    with pytest.raises(CommandError, match="lock"):
        await doubtful.a.command("x-migrated-guest-resume", {"guest": "g1"})
    assert (await doubtful.b.guest())["state"] == "running"
    assert doubtful.double_runs() == []


async def test_migratectl_says_in_doubt_and_resolves_with_a_warning(doubtful: FaultyPair) -> None:
    def migratectl(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["--socket", str(doubtful.a.socket), *arguments])

    proxy = doubtful.way_to(doubtful.b)
    fault = proxy.arm(AtFrame(FrameType.RUNNING), Cut((Way.TO_SOURCE,)))
    ran = await asyncio.to_thread(migratectl, "--json", "migrate", "g1", proxy.uri, "--downtime-limit", "20s")
    assert fault.fired_at_ns
    assert ran.exit_code == 4
    record = json.loads(ran.stdout)
    assert record["outcome"] == "in-doubt"
    ran = await asyncio.to_thread(migratectl, "resolve", record["migration_id"], "--discard")
    assert ran.exit_code == 2
    assert "destroys the last copy" in ran.stderr
    assert (await doubtful.a.guests())["g1"]["state"] == "in-doubt"
    ran = await asyncio.to_thread(migratectl, "resolve", record["migration_id"], "--discard", "--yes")
    assert ran.exit_code == 0
    assert await doubtful.a.guests() == {}
    assert (await doubtful.b.verify())["ok"]


async def test_resolve_is_only_for_what_is_in_doubt(doubtful: FaultyPair) -> None:
    record = await doubtful.a.migrate("g1", doubtful.b, **PARAMETERS)
    with pytest.raises(CommandError, match="not in doubt"):
        await doubtful.a.command("x-migrated-resolve", {"migration-id": record["migration_id"], "action": "run-here"})
    assert await doubtful.a.guests() == {}
