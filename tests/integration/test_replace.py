"""A guest gets another VMM on the same host: its memory is handed over, in one daemon and between two, and after every
failure the source's memory is what it was."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.processes import is_alive
from scripts.rig.waiting import until

ROOMY: Final[dict[str, Any]] = {"downtime_limit": 20_000}
"""A limit that no scheduler gets in the way of."""
TRIES: Final = 20


def memory_of(pid: int) -> str:
    """The digest of a guest's memory, by the memfd in its process."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "guest-memory" in os.readlink(link):
            return hashlib.sha256(link.read_bytes()).hexdigest()
    raise AssertionError(f"process {pid} has no guest memory")


def private_kib(pid: int) -> int:
    """How much of its guest memory a process has written without anybody else seeing it (KiB)."""
    _, _, mapping = Path(f"/proc/{pid}/smaps").read_text().partition("guest-memory")
    return int(mapping.partition("Anonymous:")[2].split()[0]) if mapping else 0  # it has only just begun


async def writing(first: int, second: int) -> str | None:
    """Whether a guest's second process has ``written`` its memory by loading, or it is ``over``; None before."""
    with contextlib.suppress(OSError):
        if private_kib(second) >= 24:
            return "written"
    return None if is_alive(first) and is_alive(second) else "over"


def inode_of(pid: int) -> int:
    """Which memory a guest's process has."""
    return next(link.stat().st_ino for link in Path(f"/proc/{pid}/fd").iterdir() if "guest-memory" in os.readlink(link))


async def until_incoming(host: Host, first: int) -> int:
    """Process id of a guest's second process, once the host has it beside the first."""

    async def there() -> int | None:
        return next((pid for pid in host.vmm_pids() if pid != first), None)

    return await until("a second process", there)


async def assert_alone_and_whole(pair: Pair, host: Host, pid: int) -> None:
    """The guest runs on a host in one process, and all of it is right."""
    guest = await host.guest()
    assert (guest["state"], guest["pid"]) == ("running", pid)
    assert (await host.verify())["ok"]
    assert pair.double_runs() == []


async def test_a_replaced_guest_runs_on_in_the_same_memory(pair: Pair) -> None:
    await pair.a.create_guest("g1", 64, profile="load-writes")
    before = await pair.a.guest()
    memory = inode_of(before["pid"])
    for _ in range(3):  # there and back between the two places that its processes have
        record = await pair.a.replace(**ROOMY)
        assert (record["outcome"], record["reason"]) == ("completed", None)
        assert (record["ram"]["shared"], record["ram"]["normal_pages"], record["rounds"]) == (True, 0, [])
        assert record["digest"] == {"algorithm": "not copied", "source": None, "destination": None}
        assert (record["peer"], record["source_host"]) == ("local:", record["destination_host"])
        assert {line["side"] for line in record["events"]} == {"source", "destination"}
        after = await pair.a.guest()
        assert after["pid"] != before["pid"]
        assert inode_of(after["pid"]) == memory
        await assert_alone_and_whole(pair, pair.a, after["pid"])
        before = after
    assert [guest["name"] for guest in await pair.a.command("x-migrated-guest-list")] == ["g1"]
    assert len(await pair.a.command("x-migrated-history", {"guest": "g1", "last": 3})) == 3
    back = await pair.a.migrate("g1", pair.b, **ROOMY)  # what was replaced migrates as before, its memory copied
    assert (back["outcome"], back["ram"]["shared"], back["digest"]["algorithm"]) == ("completed", False, "xxh3-frames")
    assert (await pair.b.verify())["ok"]


async def test_a_guest_moves_between_two_daemons_on_one_host_without_a_copy(pair: Pair) -> None:
    await pair.a.create_guest("g1", 64, profile="load-writes", seed=2)
    memory = inode_of((await pair.a.guest())["pid"])
    record = await pair.a.migrate("g1", pair.b.unix_uri, **ROOMY)
    assert (record["outcome"], record["ram"]["shared"]) == ("completed", True)
    assert (await pair.a.guests(), inode_of((await pair.b.guest())["pid"])) == ({}, memory)
    assert (await pair.b.verify())["ok"]
    assert await until("the record at the destination", lambda: pair.b.record(record["migration_id"])) == record
    assert pair.double_runs() == []


async def test_a_paused_guest_stays_paused(pair: Pair) -> None:
    await pair.a.create_guest("g1", 64, profile="load-writes", paused=True)
    refused = await pair.a.replace(definition="web-2")  # an option that is for QEMU guests
    assert (refused["outcome"], refused["downtime"]) == ("refused", None)
    assert "guest 'g1' is no QEMU guest and has no definition: leave it out" in refused["reason"]
    record = await pair.a.replace()
    assert record["outcome"] == "completed"
    assert (await pair.a.guest())["state"] == "paused"
    assert (await pair.a.verify())["ok"]
    await pair.a.command("x-migrated-guest-resume", {"guest": "g1"})
    assert (await pair.a.verify())["ok"]


async def test_an_iterable_device_sends_its_state_before_the_stop(pair: Pair) -> None:
    await pair.a.create_guest("g1", 64, profile="busy")
    for _ in range(2):
        record = await pair.a.replace(**ROOMY)
        assert record["outcome"] == "completed", record["reason"]
        (iterable,) = (device for device in record["devices"] if device["kind"] == "iterable")
        assert iterable["precopy_bytes"] > iterable["bytes"]
    assert (await pair.a.verify())["ok"]


async def test_another_program_is_used_where_one_is_named(pair: Pair, tmp_path: Path) -> None:
    await pair.a.create_guest("g1", 64, workload="idle")
    program = tmp_path / "another vmm"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vmm_sim.main "$@"\n')
    program.chmod(0o700)
    record = await pair.a.replace(vmm=[str(program), "--dirty-tracking", "logged"], **ROOMY)
    assert record["outcome"] == "completed", record["reason"]
    command = Path(f"/proc/{(await pair.a.guest())['pid']}/cmdline").read_bytes()
    assert b"--dirty-tracking" in command
    before = await pair.a.guest()
    failed = await pair.a.replace(vmm=["/nonexistent/vmm"], **ROOMY)
    assert failed["outcome"] == "refused"
    assert "/nonexistent/vmm" in failed["reason"]
    await assert_alone_and_whole(pair, pair.a, before["pid"])


async def test_memory_is_what_it_was_after_an_abort_of_a_load_that_wrote_to_it(pair: Pair) -> None:
    """A guest that stands still shows it to the byte. A busy machine may look too late: then it is tried again.

    replace -> loads ... writes memory ... killed -> aborted, nothing of it is in the source's memory
    """
    for _ in range(TRIES):
        await pair.remove_guests()
        await pair.a.create_guest("g1", 64, profile="load-writes", paused=True)
        assert (await pair.a.verify())["ok"]  # it has booted
        pid = (await pair.a.guest())["pid"]
        before = memory_of(pid)
        migration_id = await pair.a.begin_replacement(**ROOMY)
        second = await until_incoming(pair.a, pid)
        seen = await until("pages that loading has written", lambda: writing(pid, second))  # noqa: B023
        if seen == "written":
            pair.a.kill_process(second)
        record = await pair.a.wait(migration_id)
        if record["outcome"] != "completed":
            break
    assert (record["outcome"], seen) == ("aborted", "written"), record["reason"]
    assert memory_of(pid) == before
    assert (await pair.a.guest())["pid"] == pid
    assert (await pair.a.verify())["ok"]


@pytest.mark.parametrize("victim", ["new vmm", "daemon", "nobody: the limit", "nobody: cancelled"])
async def test_the_guest_runs_on_whoever_fails_it(fresh: Pair, victim: str) -> None:
    pair, host = fresh, fresh.a
    await host.create_guest("g1", 32, profile="slow-load")
    pid = (await host.guest())["pid"]
    limit = 150 if victim.endswith("limit") else 20_000
    migration_id = await host.begin_replacement(downtime_limit=limit, timeout_s=0.1, on_timeout="force")
    second = await until_incoming(host, pid)
    if not victim.endswith("limit"):
        await host.until_status("g1", "device")
    if victim == "new vmm":
        host.kill_process(second)
    elif victim == "daemon":
        host.kill()
        await asyncio.to_thread(host.restart)
    elif victim.endswith("cancelled"):
        await host.command("migrate_cancel", {"guest": "g1"})
    if victim != "daemon":
        record = await host.wait(migration_id)
        wanted = "cancelled" if victim.endswith("cancelled") else "aborted"
        assert record["outcome"] == wanted, record["reason"]
    await pair.settled()
    await assert_alone_and_whole(pair, host, pid)
    record = await host.replace(**ROOMY)  # a retry works at once
    assert record["outcome"] == "completed", record["reason"]
    assert (await host.verify())["ok"]
    assert pair.double_runs() == []


async def test_a_daemon_that_has_not_both_roles_replaces_no_guest(tmp_path_factory: pytest.TempPathFactory) -> None:
    host: Any = Host(tmp_path_factory.mktemp("s"), "s", role="source")
    host.start()
    try:
        await host.create_guest("g1", 16, workload="idle")
        with pytest.raises(Exception, match="run `migrated host`"):
            await host.begin_replacement()
    finally:
        host.close()
