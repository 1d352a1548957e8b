"""The real ``qemu.qmp`` client library and shell drive a migration."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.tiny_vmm.hosts import TinyHost

qmp = pytest.importorskip("qemu.qmp", reason="the qemu.qmp package is not installed")

TIMEOUT_S = 30.0


async def test_the_client_library_runs_a_whole_migration(
    daemon: TinyHost, destination: TinyHost, control_socket: Path, silent_uri: str
) -> None:
    """connect, capabilities, parameters, migrate, follow events in order, query, and the next one cancelled."""
    await daemon.add_guest("g1")
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

        await client.execute("migrate-set-parameters", {"downtime-limit": 20_000})
        with client.listener("MIGRATION") as listener:
            begun = await client.execute("migrate", {"uri": destination.uri})
            seen: list[str] = []
            while seen[-1:] != ["completed"]:
                event = await asyncio.wait_for(listener.get(), TIMEOUT_S)
                assert event["data"]["migration-id"] == begun["migration-id"]
                seen.append(event["data"]["status"])
            assert seen == ["active", "device", "completed"]
            info = await client.execute("query-migrate")
            assert info["status"] == "completed"
            assert info["downtime"] > 0

        await daemon.add_guest("g2")
        begun = await client.execute("migrate", {"guest": "g2", "uri": silent_uri})
        assert (await client.execute("query-migrate"))["status"] == "setup"
        await client.execute("migrate_cancel")
        assert (await client.execute("x-migrated-wait", begun))["outcome"] == "cancelled"

        with pytest.raises(qmp.ExecuteError, match="Parameter 'uri2' is unexpected") as caught:
            await client.execute("migrate", {"uri2": "x"})
        assert caught.value.error.error.class_ == "GenericError"
    finally:
        await client.disconnect()


async def test_the_shell_runs_commands(daemon: TinyHost, control_socket: Path) -> None:
    await daemon.add_guest("g1")
    shell = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qemu.qmp.qmp_shell",
        str(control_socket),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    script = "query-version\nstop guest=g1\nmigrate uri=tcp:127.0.0.1:9 guest=g1 downtime-limit=100\nfly\n"
    output, _ = await asyncio.wait_for(shell.communicate(script.encode()), TIMEOUT_S)
    assert "migrated 0.1.0" in output.decode()
    assert "The command fly has not been found" in output.decode()
    (begun,) = daemon.operations.progress("g1")
    assert (begun.peer, begun.downtime_limit_ns) == ("tcp:127.0.0.1:9", 100_000_000)
    assert await daemon.state_of("g1") == "paused"
