"""The real ``qemu.qmp`` client library and shell drive a migration."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

qmp = pytest.importorskip("qemu.qmp", reason="the qemu.qmp package is not installed")

TIMEOUT_S = 30.0


async def test_the_client_library_runs_a_whole_migration(daemon: Any, control_socket: Path) -> None:
    """connect, capabilities, parameters, migrate, follow events in order, query, and the next one cancelled."""
    daemon.add_guest("g1")
    client = qmp.QMPClient("test")
    await client.connect(str(control_socket))
    try:
        assert client.greeting.QMP.capabilities == ["oob"]
        assert {"name": "query-migrate"} in await client.execute("query-commands")
        capabilities = [{"capability": name, "state": True} for name in ("events", "switchover-abort", "multifd")]
        await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
        await client.execute("migrate-set-parameters", {"downtime-limit": 150, "max-bandwidth": 1 << 30})
        parameters = await client.execute("query-migrate-parameters")
        assert (parameters["downtime-limit"], parameters["max-bandwidth"]) == (150, 1 << 30)
        assert await client.execute("query-migrate") == {}

        with client.listener(("MIGRATION", "MIGRATION_PASS")) as listener:
            begun = await client.execute("migrate", {"uri": "tcp:127.0.0.1:4460"})
            daemon.events.publish("MIGRATION_PASS", {"pass": 1})
            assert (await client.execute("query-migrate"))["status"] == "active"
            daemon.move(begun["migration-id"], status="device")
            daemon.end(begun["migration-id"], outcome="completed")
            seen = [await asyncio.wait_for(listener.get(), TIMEOUT_S) for _ in range(4)]
            assert [event["data"].get("status", "pass") for event in seen] == ["active", "pass", "device", "completed"]
            info = await client.execute("query-migrate")
            assert (info["status"], info["downtime"]) == ("completed", 66)

            await client.execute("migrate", {"uri": "tcp:127.0.0.1:4460"})
            await client.execute("migrate_cancel")
            seen = [await asyncio.wait_for(listener.get(), TIMEOUT_S) for _ in range(2)]
            assert seen[1]["data"]["status"] == "cancelled"

        with pytest.raises(qmp.ExecuteError, match="Parameter 'uri2' is unexpected") as caught:
            await client.execute("migrate", {"uri2": "x"})
        assert caught.value.error.error.class_ == "GenericError"
    finally:
        await client.disconnect()


async def test_the_shell_runs_commands(daemon: Any, control_socket: Path) -> None:
    daemon.add_guest("g1")
    shell = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qemu.qmp.qmp_shell",
        str(control_socket),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    script = "query-version\nmigrate uri=tcp:127.0.0.1:4460 guest=g1 downtime-limit=100\nstop guest=g1\nfly\n"
    output, _ = await asyncio.wait_for(shell.communicate(script.encode()), TIMEOUT_S)
    assert "migrated 0.1.0" in output.decode()
    assert "The command fly has not been found" in output.decode()
    assert daemon.started == [("g1", "tcp:127.0.0.1:4460", {"downtime_limit_ms": 100.0})]
    assert daemon.guests["g1"]["state"] == "paused"
