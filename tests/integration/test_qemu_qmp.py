"""QEMU's own client library and shell drive real daemons, as they drive QEMU.

client at a    migrate --> active --> pass 1, 2 ... --> STOP, device --> pass ... --> completed
client at b                active ----------------------> device -----> RESUME --> completed
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scripts.rig.pair import Pair
from scripts.rig.terminal import Terminal

qmp = pytest.importorskip("qemu.qmp", reason="the qemu.qmp package is not installed")

SHELL = Path(sys.executable).parent / "qmp-shell"
PROMPT = r"\(QEMU\) "
EVENT_S = 60.0
SLOW = {"max-bandwidth": 4 << 20}
"""Rounds that last long enough to be looked at and cancelled."""


@contextlib.asynccontextmanager
async def connected(socket: Path) -> AsyncIterator[Any]:
    """QEMU's client, connected and past its capabilities negotiation."""
    client = qmp.QMPClient("test")
    await client.connect(str(socket))
    try:
        yield client
    finally:
        await client.disconnect()


async def story(listener: Any, *last: str) -> list[dict[str, Any]]:
    """The events up to a MIGRATION event with one of the statuses."""
    events: list[dict[str, Any]] = []
    while not events or events[-1]["data"].get("status") not in last:
        events.append(await asyncio.wait_for(listener.get(), EVENT_S))
    return events


def statuses(events: list[dict[str, Any]]) -> list[str]:
    """The statuses of the MIGRATION events."""
    return [event["data"]["status"] for event in events if event["event"] == "MIGRATION"]


async def test_a_migration_as_qemus_users_run_it(pair: Pair) -> None:
    """connect, capabilities, parameters, migrate, events in order on both hosts, query; then a second is cancelled."""
    await pair.a.create_guest("g1", 32)
    async with connected(pair.a.socket) as source, connected(pair.b.socket) as destination:
        assert source.greeting.QMP.capabilities == ["oob"]
        assert (await source.execute("query-version"))["package"].startswith("migrated ")
        on = [{"capability": name, "state": True} for name in ("events", "multifd", "switchover-abort")]
        await source.execute("migrate-set-capabilities", {"capabilities": on})
        await source.execute("migrate-set-parameters", {"guest": "g1", "downtime-limit": 20_000, "multifd-channels": 3})
        parameters = await source.execute("query-migrate-parameters", {"guest": "g1"})
        assert (parameters["downtime-limit"], parameters["multifd-channels"]) == (20_000, 3)

        listen = qmp.EventListener()
        with source.listen(listen), destination.listener() as arriving:
            begun = await source.execute("migrate", {"uri": pair.b.uri})
            migration_id = begun["migration-id"]
            left = await story(listen, "completed", "failed")
            arrived = await story(arriving, "completed", "failed")

        passes = [event["data"]["pass"] for event in left if event["event"] == "MIGRATION_PASS"]
        assert statuses(left) == statuses(arrived) == ["active", "device", "completed"]
        order = [event["data"].get("status", event["event"]) for event in left]
        assert order.index("active") < order.index("MIGRATION_PASS") < order.index("STOP")
        assert order.index("STOP") + 1 == order.index("device"), "as in QEMU's migration_completion()"
        assert [event["event"] for event in arrived][-2:] == ["RESUME", "MIGRATION"]
        for events in (left, arrived):
            stamps = [(event["timestamp"]["seconds"], event["timestamp"]["microseconds"]) for event in events]
            assert stamps == sorted(stamps)
            assert {event["data"]["guest"] for event in events} == {"g1"}

        info = await source.execute("query-migrate")
        record = await pair.a.wait(migration_id)
        assert info["status"] == "completed"
        assert info["downtime"] == round(record["downtime"]["measured_ns"] / 1e6)
        assert info["total-time"] == pytest.approx(record["total_ns"] / 1e6, abs=1)
        assert (info["ram"]["total"], info["ram"]["remaining"]) == (32 << 20, 0)
        assert info["ram"]["transferred"] == record["ram"]["transferred_bytes"] > 0
        assert passes == list(range(1, info["ram"]["dirty-sync-count"] + 1))
        assert len(passes) == record["ram"]["dirty_sync_count"] >= len(record["rounds"]) + 3, "two in the switchover"
        assert (await destination.execute("query-status", {"guest": "g1"}))["running"] is True

        with destination.listener(("MIGRATION",)) as listener:
            await destination.execute("migrate", {"guest": "g1", "uri": pair.a.uri, **SLOW})
            assert statuses(await story(listener, "active")) == ["active"]
            running = await destination.execute("query-migrate", {"guest": "g1"})
            assert running["status"] == "active"
            assert running["ram"]["remaining"] > 0
            await destination.execute("migrate_cancel", {"guest": "g1"}, oob=True)
            assert statuses(await story(listener, "cancelled", "failed", "completed")) == ["cancelling", "cancelled"]
        assert (await destination.execute("query-migrate", {"guest": "g1"}))["status"] == "cancelled"
        assert (await destination.execute("query-status", {"guest": "g1"}))["status"] == "running"
    assert (await pair.b.verify())["ok"]


async def test_errors_are_its_execute_error_with_qemus_classes(pair: Pair) -> None:
    await pair.a.create_guest("idle", 16)
    async with connected(pair.a.socket) as client:
        for command, arguments, kind, sentence in [
            ("device_add", {}, "CommandNotFound", "The command device_add has not been found"),
            ("migrate", {"uri2": "x"}, "GenericError", "Parameter 'uri2' is unexpected"),
            ("migrate", {"guest": "idle", "uri": "exec:cat"}, "GenericError", "tcp:HOST:PORT"),
            ("migrate", {"guest": "nobody", "uri": "tcp:127.0.0.1:1"}, "DeviceNotFound", "nobody"),
            ("migrate-set-parameters", {"downtime-limit": "long"}, "GenericError", "downtime-limit"),
            ("migrate-continue", {"guest": "idle", "state": "pre-switchover"}, "GenericError", "not in expected state"),
        ]:
            with pytest.raises(qmp.ExecuteError, match=re.escape(sentence)) as caught:
                await client.execute(command, arguments)
            assert caught.value.error_class == kind, command
        with pytest.raises(qmp.ExecuteError, match="does not support OOB"):
            await client.execute("stop", {"guest": "idle"}, oob=True)
        assert await client.execute("query-migrate", {"guest": "idle"}) == {}, "nothing has begun"


async def test_a_migration_typed_into_qemus_shell(pair: Pair) -> None:
    await pair.a.create_guest("g1", 16)
    await asyncio.to_thread(_type_a_migration, pair)
    record = (await pair.b.command("x-migrated-history", {"last": 1}))[0]
    assert (record["guest"], record["outcome"], record["parameters"]["channels"]) == ("g1", "completed", 3)
    assert (await pair.b.verify())["ok"]


def _type_a_migration(pair: Pair) -> None:
    with Terminal([str(SHELL), str(pair.a.socket)]) as shell:

        def answer(line: str) -> Any:
            """What the shell shows for a line."""
            shell.press(f"{line}\n")
            return json.loads(shell.read_until(PROMPT).split("\n")[1])

        assert "Connected to QEMU" in shell.read_until(PROMPT)
        shell.press("query-migrate-cap\t")
        assert "query-migrate-capabilities" in shell.read_until("capabilities"), "the shell completes our commands"
        shell.press("\n")
        assert "switchover-abort" in shell.read_until(PROMPT)
        assert answer("migrate-set-parameters guest=g1 downtime-limit=20000 multifd-channels=3") == {"return": {}}
        begun = answer(f"migrate uri={pair.b.uri} guest=g1")
        record = answer(f"x-migrated-wait migration-id={begun['return']['migration-id']}")["return"]
        assert record["outcome"] == "completed", record["reason"]
        info = answer("query-migrate")["return"]
        assert info["downtime"] == round(record["downtime"]["measured_ns"] / 1e6)
        assert answer("fly")["error"] == {"class": "CommandNotFound", "desc": "The command fly has not been found"}
        shell.press("\n")
        assert "MIGRATION_PASS" in shell.read_until(PROMPT), "an empty line shows the events"
        shell.press("\x04")
        assert shell.wait() == 0
