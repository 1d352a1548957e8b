"""What operators get wrong: each mistake gets a sentence, the right exit status, and leaves the guest running."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from migrated.cli.migratectl import main
from scripts.basics import ROOT
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

FAILED, USAGE, UNREACHABLE = 1, 2, 3


async def migratectl(host: Host, *arguments: str) -> Result:
    """Run migratectl in a thread: it brings an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, main, ["--socket", str(host.socket), "--json", *arguments])


@dataclass(frozen=True)
class Ran:
    """What a daemon said and how it ended."""

    status: int
    err: str


async def migrated(*arguments: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "migrated", *arguments, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, err.decode())


async def another_daemon(host: Host) -> Ran:
    """Try to start a daemon with a host's configuration."""
    return await migrated(host.role, "--config", str(host.write_config()))


@asynccontextmanager
async def stranger(greeting: bytes) -> AsyncIterator[str]:
    """Something listens that is no migrated daemon. Yields its URI."""

    async def on_connection(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    async with server:
        yield f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
async def pair(hosts: Pair) -> AsyncIterator[Pair]:
    """The hosts of the module with a running guest g1 on a, which no test may disturb."""
    if "g1" not in await hosts.a.guests():
        await hosts.a.create_guest("g1", 16)

        async def booted() -> bool:
            return not (await hosts.a.guest())["booting"]

        await until("guest g1 booted", booted)
    yield hosts
    print(hosts.log_tail())  # noqa: T201 - shown when the test failed
    assert await hosts.leftovers() == []


async def assert_untouched(pair: Pair) -> None:
    """The guest ran on all the time."""
    guest = await pair.a.guest()
    assert (guest["state"], guest["migration_id"]) == ("running", None)
    assert [entry["event"] for entry in pair.a.run_log()] == ["run"]


@pytest.mark.parametrize("uri", ["127.0.0.1:1", "udp:127.0.0.1:1", "tcp:127.0.0.1", "tcp::4460", "tcp:127.0.0.1:0"])
async def test_an_address_of_another_form_is_refused_with_the_form(pair: Pair, uri: str) -> None:
    ran = await migratectl(pair.a, "migrate", "g1", uri)
    assert ran.exit_code in (FAILED, USAGE)
    assert "tcp:HOST:PORT" in ran.stderr
    await assert_untouched(pair)


async def test_nobody_listens_there(pair: Pair) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        ran = await migratectl(pair.a, "migrate", "g1", f"tcp:127.0.0.1:{port}")
    assert ran.exit_code == FAILED
    assert f"127.0.0.1:{port} cannot be reached" in ran.stderr
    record = json.loads(ran.stdout)
    assert (record["outcome"], record["downtime"]) == ("failed", None)
    await assert_untouched(pair)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"SSH-2.0-x\r\n"])
async def test_something_else_listens_there(pair: Pair, greeting: bytes) -> None:
    async with stranger(greeting) as uri:
        ran = await migratectl(pair.a, "migrate", "g1", uri)
    assert ran.exit_code == FAILED
    assert uri.removeprefix("tcp:") in ran.stderr or "closed the connection" in ran.stderr
    await assert_untouched(pair)


async def test_an_unknown_guest_is_named_with_those_that_exist(pair: Pair) -> None:
    ran = await migratectl(pair.a, "migrate", "g2", pair.b.uri)
    assert ran.exit_code == FAILED
    assert "'g2'" in ran.stderr
    assert "g1" in ran.stderr.replace("g2", "")
    await assert_untouched(pair)


async def test_a_name_that_the_destination_has_already(pair: Pair) -> None:
    await pair.b.create_guest("g1", 16, workload="idle")
    ran = await migratectl(pair.a, "migrate", "g1", pair.b.uri)
    assert ran.exit_code == FAILED
    assert json.loads(ran.stdout)["outcome"] == "refused"
    assert "already on this host" in ran.stderr
    await assert_untouched(pair)
    assert (await pair.b.guest())["state"] == "running"
    await pair.b.command("x-migrated-guest-destroy", {"guest": "g1"})


async def test_two_daemons_of_the_same_host_name_do_not_take_a_guest_from_themselves(pair: Pair) -> None:
    ran = await migratectl(pair.a, "migrate", "g1", pair.a.uri)
    assert ran.exit_code == FAILED
    assert json.loads(ran.stdout)["outcome"] == "refused"
    assert "already" in ran.stderr
    await assert_untouched(pair)


async def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    ran = await migratectl(Host(tmp_path, "nobody"), "status")
    assert ran.exit_code == UNREACHABLE
    assert str(tmp_path / "control.sock") in ran.stderr


async def test_a_parameter_out_of_range_changes_nothing(pair: Pair) -> None:
    ran = await migratectl(pair.a, "migrate", "g1", pair.b.uri, "--channels", "99")
    assert ran.exit_code in (FAILED, USAGE)
    assert "channels" in ran.stderr
    await assert_untouched(pair)


async def test_a_busy_port(pair: Pair) -> None:
    other = Host(pair.directory / "busy", "busy")
    other.port = pair.b.port
    ran = await another_daemon(other)
    assert ran.status == FAILED
    said = other.log_tail()
    assert f"127.0.0.1:{pair.b.port}" in said
    assert "[listen] address" in said


async def test_a_control_socket_of_a_live_daemon(pair: Pair) -> None:
    other = Host(pair.directory / "second", "second", control={"socket": str(pair.a.socket)})
    ran = await another_daemon(other)
    assert ran.status == FAILED
    assert str(pair.a.socket) in other.log_tail()
    assert await pair.a.command("query-version")


async def test_a_state_directory_of_a_live_daemon(pair: Pair) -> None:
    other = Host(pair.directory / "third", "third", state={"directory": str(pair.a.directory / "state")})
    ran = await another_daemon(other)
    assert ran.status == FAILED
    assert "another daemon uses the state directory" in other.log_tail()


async def test_a_typo_in_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "typo.toml"
    path.write_text('[limits]\nheartbeat_intervall_s = 1\n[listen]\naddress = "here"\n', encoding="utf-8")
    for command in ("host", "check-config"):
        arguments = ("--config", str(path)) if command == "host" else (str(path),)
        ran = await migrated(command, *arguments)
        assert ran.status == USAGE
        assert "did you mean 'heartbeat_interval_s'" in ran.err
        assert "listen.address" in ran.err
        assert ran.err.count(str(path)) == 2


REWRITER = """
import os, sys, msgpack
arguments = sys.argv[1:]
if "--incoming-description" in arguments:
    path = arguments[arguments.index("--incoming-description") + 1]
    with open(path, "rb") as file:
        guest = msgpack.unpackb(file.read())
    version, config, seed = msgpack.unpackb(guest["vmm_config"])
    {change}
    guest["vmm_config"] = msgpack.packb([version, config, seed])
    with open(path, "wb") as file:
        file.write(msgpack.packb(guest))
os.execv(sys.executable, [sys.executable, "-m", "vmm_sim.main", *arguments])
"""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('config["memory_bytes"] *= 2; guest["memory"][0]["size_bytes"] *= 2', "memory"),
        ('config["devices"] = [d for d in config["devices"] if d["name"] != "virtio-blk"]', "virtio-blk"),
        ('config["vcpus"] += 1; guest["vcpus"] += 1', "vcpus"),
    ],
)
async def test_a_destination_that_builds_another_guest_refuses_and_says_what_differs(
    pair: Pair, change: str, named: str
) -> None:
    """The destination's VMM does not do what the description says: a real one may be of another version."""
    script = pair.directory / "vmm.py"
    script.write_text(REWRITER.replace("{change}", change), encoding="utf-8")
    odd = Host(pair.directory / "odd", "odd", vmm={"command": [sys.executable, str(script)]})
    odd.start()
    try:
        await pair.a.create_guest("g2", 16, profile="small")
        record: dict[str, Any] = await pair.a.migrate("g2", odd)
        assert record["outcome"] in ("refused", "failed")
        assert named in record["reason"]
        await assert_untouched(pair)
        assert await odd.guests() == {}
        assert odd.vmm_pids() == {}
        retry = await pair.a.migrate("g2", pair.b, downtime_limit=20_000)
        assert retry["outcome"] == "completed", retry["reason"]
    finally:
        odd.close()
        for host in pair.hosts:
            if "g2" in await host.guests():
                await host.command("x-migrated-guest-destroy", {"guest": "g2"})
