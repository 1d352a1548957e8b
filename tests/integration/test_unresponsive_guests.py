"""A VMM that does not answer, stopped by a signal here, holds up nobody else, and is taken up again when it answers.

daemon |-- list: g1 running, g2 and g3 unresponsive --| kill -9 | start |-- the same --| CONT |-- all running --|
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from datetime import datetime
from typing import Any

import pytest

from migrated.control.client import CommandError
from migrated.guests.registry import ANSWER_S
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

NAMES = ("g1", "g2", "g3")
SILENT = ("g2", "g3")


async def three_guests(host: Host) -> dict[str, int]:
    """Create them. Returns their process ids by name."""
    for name in NAMES:
        await host.create_guest(name, 16)
    return {name: guest["pid"] for name, guest in (await host.guests()).items()}


async def timed_list(host: Host) -> tuple[dict[str, dict[str, Any]], float]:
    """All guests by name, and how long asking for them took (s)."""
    began = time.monotonic()
    return await host.guests(), time.monotonic() - began


async def test_one_list_waits_once_for_all_that_do_not_answer(fresh: Pair) -> None:
    pids = await three_guests(fresh.a)
    for name in SILENT:
        os.kill(pids[name], signal.SIGSTOP)
    guests, took_s = await timed_list(fresh.a)
    assert took_s < 2 * ANSWER_S, "they are not asked one after the other"
    assert {name: guest["state"] for name, guest in guests.items()} == {
        "g1": "running", "g2": "unresponsive", "g3": "unresponsive",
    }  # fmt: skip
    for name in SILENT:
        assert str(pids[name]) in guests[name]["reason"]
        assert guests[name]["memory_bytes"] == 16 << 20
    assert "reason" not in guests["g1"]
    shown, status = await asyncio.gather(fresh.a.guest("g2"), fresh.a.command("query-status", {"guest": "g3"}))
    assert (shown["state"], shown["reason"]) == ("unresponsive", guests["g2"]["reason"])
    assert (status["running"], status["status"]) == (False, "internal-error")

    began = time.monotonic()
    with pytest.raises(CommandError, match="Several guests"):
        await fresh.a.command("query-status")
    assert time.monotonic() - began < ANSWER_S, "which guests there are is known without asking them"
    record = await fresh.a.migrate("g1", fresh.b, downtime_limit=20_000)
    assert record["outcome"] == "completed", record["reason"]

    os.kill(pids["g3"], signal.SIGCONT)
    os.kill(pids["g2"], signal.SIGCONT)
    states = {name: guest["state"] for name, guest in (await fresh.a.guests()).items()}
    assert states == {"g2": "running", "g3": "running"}


async def test_a_daemon_starts_beside_guests_that_do_not_answer_and_takes_them_up_later(fresh: Pair) -> None:
    pids = await three_guests(fresh.a)
    sockets = {name: fresh.a.directory / "guests" / f"{name}.sock" for name in NAMES}
    for name in SILENT:
        os.kill(pids[name], signal.SIGSTOP)
    fresh.a.kill()
    fresh.a.restart()
    found = [entry for entry in fresh.a.log() if entry["event"] == "a guest does not answer"]
    assert {entry["guest"] for entry in found} == set(SILENT)
    first, last = (datetime.fromisoformat(entry["timestamp"]) for entry in (found[0], found[-1]))
    assert (last - first).total_seconds() < ANSWER_S / 2, "they are not asked one after the other"

    guests, took_s = await timed_list(fresh.a)
    assert took_s < ANSWER_S, "they are known not to answer"
    assert {name: guest["state"] for name, guest in guests.items()} == {
        "g1": "running", "g2": "unresponsive", "g3": "unresponsive",
    }  # fmt: skip
    assert {guests[name]["pid"] for name in SILENT} == {pids[name] for name in SILENT}
    assert all(path.exists() for path in sockets.values()), "the socket of a process that lives is not stale"
    with pytest.raises(CommandError, match="unresponsive"):
        await fresh.a.command("x-migrated-guest-pause", {"guest": "g2"})
    with pytest.raises(CommandError, match="already on this host"):
        await fresh.a.create_guest("g2", 16)

    os.kill(pids["g3"], signal.SIGKILL)
    await until("g3 is known to be gone", lambda: _listed(fresh.a, {"g1", "g2"}))
    assert not sockets["g3"].exists()
    os.kill(pids["g2"], signal.SIGCONT)
    await until("g2 runs", lambda: _listed(fresh.a, {"g1", "g2"}, "running"))
    record = await fresh.a.migrate("g2", fresh.b, downtime_limit=20_000)
    assert record["outcome"] == "completed", record["reason"]
    assert (await fresh.b.verify("g2"))["ok"]
    assert fresh.double_runs("g2") == []


async def _listed(host: Host, names: set[str], *states: str) -> bool:
    """Whether these guests, and no others, are listed, in one of the states if there are any."""
    guests = await host.guests()
    return set(guests) == names and all(not states or guest["state"] in states for guest in guests.values())


async def test_nothing_is_decided_about_a_guest_that_does_not_answer(fresh: Pair) -> None:
    """The daemon dies while it holds the stopped guest, whose process stops too: the attempt stays open until it
    answers, and then the guest is the source's."""
    pid = (await fresh.a.create_guest("g1", 16))["pid"]
    migration_id = await fresh.a.begin_migration(
        "g1", fresh.b, pause_before_switchover=True, downtime_limit=20_000, timeout_s=0.1, on_timeout="force"
    )
    await fresh.a.until_status("g1", "pre-switchover")
    os.kill(pid, signal.SIGSTOP)
    fresh.a.kill()
    fresh.a.restart()
    silent = await fresh.a.guest()
    assert (silent["state"], silent["migration_id"]) == ("unresponsive", migration_id)
    assert await fresh.a.record(migration_id) is None
    os.kill(pid, signal.SIGCONT)
    assert await fresh.settled() is fresh.a
    record = await fresh.a.record(migration_id)
    assert record is not None
    assert record["outcome"] == "aborted"
    assert (await fresh.a.guest())["state"] == "running"
    assert (await fresh.a.verify())["ok"]
    assert fresh.double_runs() == []
