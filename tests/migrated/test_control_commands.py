"""Commands over the control socket to a host with tiny guests: arguments, guests, migrations and what they answer."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.migrated.control_sockets import connected
from tests.tiny_vmm.hosts import TinyHost


async def test_arguments_are_checked_before_anything_happens(daemon: TinyHost, control_socket: Path) -> None:
    await daemon.add_guest("g1")
    async with connected(control_socket) as client:
        for arguments in (
            {"uri": "tcp:a:1", "downtime-limit": "300"},
            {"uri": "tcp:a:1", "downtime-limit": -5},
            {"uri": "tcp:a:1", "downtime-limt": 5},
            {"uri": "udp:a:1"},
            {},
        ):
            assert "error" in await client.ask("migrate", arguments)
        assert daemon.operations.progress(None) == []
        wrong = {"multifd-channels": 3, "downtime-limit": -1}
        assert "error" in await client.ask("migrate-set-parameters", wrong)
        assert (await client.ask("query-migrate-parameters"))["return"]["multifd-channels"] == 2


async def test_a_migration_from_start_to_end(daemon: TinyHost, destination: TinyHost, control_socket: Path) -> None:
    await daemon.add_guest("g1")
    async with connected(control_socket) as client:
        assert await client.ask("query-migrate") == {"return": {}}
        arguments = {"uri": destination.uri, "downtime-limit": 20_000, "pause-before-switchover": True}
        begun = (await client.ask("migrate", arguments | {"detach": True}))["return"]
        await daemon.until_status("g1", "pre-switchover")
        info = (await client.ask("query-migrate"))["return"]
        assert (info["status"], info["guest"], info["migration-id"]) == ("pre-switchover", "g1", begun["migration-id"])
        assert "downtime" not in info
        async with connected(control_socket) as waiting:
            waiting.send({"execute": "x-migrated-wait", "arguments": begun, "id": 1})
            assert await client.ask("migrate-continue", {"state": "pre-switchover"}) == {"return": {}}
            record = (await waiting.reply())["return"]
        assert record["outcome"] == "completed", record["reason"]
        assert (record["parameters"]["downtime_limit_ms"], record["guest"]) == (20_000, "g1")
        assert [guest["name"] for guest in await destination.operations.guest_list()] == ["g1"]
        info = (await client.ask("query-migrate", {"guest": "g1"}))["return"]
        assert (info["status"], info["downtime"]) == ("completed", round(record["downtime"]["measured_ns"] / 1e6))
        beginning = {"migration-id": begun["migration-id"][:8]}
        assert (await client.ask("x-migrated-show", beginning))["return"] == record
        told = [one["migration_id"] for one in (await client.ask("x-migrated-history"))["return"]]
        assert told == [begun["migration-id"]]
        assert (await client.ask("x-migrated-history-stats"))["return"]["outcomes"] == {"completed": 1}
        assert "migrated_migrations_total" in (await client.ask("x-migrated-metrics"))["return"]["text"]


async def test_query_migrate_does_not_need_the_record(
    daemon: TinyHost, control_socket: Path, short_directory: Path, silent_uri: str
) -> None:
    """The history cannot be read any more when the migration has ended: its own figures do."""
    await daemon.add_guest("g1")
    async with connected(control_socket) as client:
        begun = (await client.ask("migrate", {"uri": silent_uri}))["return"]
        await client.ask("migrate_cancel")
        await client.ask("x-migrated-wait", begun)
        with sqlite3.connect(short_directory / "a" / "state" / "history.sqlite") as history:
            assert history.execute("DELETE FROM records").rowcount == 1
        history.close()
        assert "error" in await client.ask("x-migrated-show", begun)
        info = (await client.ask("query-migrate"))["return"]
        assert (info["status"], info["error-desc"]) == ("cancelled", "cancelled by the operator")


async def test_after_a_restart_query_migrate_tells_the_last_record(
    daemon: TinyHost, control_socket: Path, record_of: Callable[..., Any]
) -> None:
    daemon.remember(record_of(outcome="cancelled", reason="Cancelled by the operator."))
    async with connected(control_socket) as client:
        info = (await client.ask("query-migrate"))["return"]
        assert (info["status"], info["error-desc"]) == ("cancelled", "Cancelled by the operator.")
        assert (await client.ask("query-migrate", {"guest": "other"}))["return"] == {}


async def test_the_guest_may_be_left_out_only_where_it_is_plain(daemon: TinyHost, control_socket: Path) -> None:
    async with connected(control_socket) as client:
        assert (await client.ask("stop"))["error"]["class"] == "DeviceNotFound"
        for name in ("g1", "old"):
            await daemon.add_guest(name)
        daemon.guest("old").overlay = "retired"  # as if it had left and its process did not end
        assert (await client.ask("stop"))["return"] == {}
        assert (await client.ask("query-status"))["return"] == {"running": False, "status": "paused", "guest": "g1"}
        assert (await client.ask("cont"))["return"] == {}
        await daemon.add_guest("g2")
        several = (await client.ask("stop"))["error"]["desc"]
        assert "g1" in several
        assert "g2" in several
        assert "old" not in several
        assert (await client.ask("query-status", {"guest": "old"}))["return"]["status"] == "postmigrate"


async def test_cancel_and_continue_find_their_migration(
    daemon: TinyHost, destination: TinyHost, control_socket: Path, silent_uri: str
) -> None:
    for name in ("g1", "g2"):
        await daemon.add_guest(name)
    async with connected(control_socket) as client:
        assert await client.ask("migrate_cancel") == {"return": {}}
        begun = (await client.ask("migrate", {"guest": "g1", "uri": silent_uri}))["return"]
        wrong = await client.ask("migrate-continue", {"state": "pre-switchover"})
        assert wrong["error"]["desc"] == "Migration not in expected state: setup"
        await client.ask("migrate", {"guest": "g2", "uri": silent_uri})
        assert "g1, g2" in (await client.ask("migrate_cancel"))["error"]["desc"]
        assert await client.ask("migrate_cancel", {"guest": "g1"}) == {"return": {}}
        assert (await client.ask("x-migrated-wait", begun))["return"]["outcome"] == "cancelled"
        assert [one.status for one in daemon.operations.progress("g2")] == ["setup"]
        assert await client.ask("migrate_cancel") == {"return": {}}
        await daemon.until_status("g2", "cancelled")
        held = {"guest": "g2", "uri": destination.uri, "downtime-limit": 20_000, "pause-before-switchover": True}
        begun = (await client.ask("migrate", held))["return"]
        await daemon.until_status("g2", "pre-switchover")
        assert await client.ask("migrate-continue", {"state": "pre-switchover"}) == {"return": {}}
        assert (await client.ask("x-migrated-wait", begun))["return"]["outcome"] == "completed"


async def test_guests_are_created_from_checked_arguments(daemon: TinyHost, control_socket: Path) -> None:
    async with connected(control_socket) as client:
        arguments = {"guest": "g1", "memory-bytes": 2 << 20, "paused": True}
        assert (await client.ask("x-migrated-guest-create", arguments))["return"]["state"] == "paused"
        arguments["guest"] = "g2"
        reply = await client.ask("x-migrated-guest-create", arguments | {"options": {"huge-pages": "true"}})
        assert reply["error"]["desc"] == "a tiny guest has no options, and was given {'huge-pages': 'true'}"
        for wrong in (
            {"guest": "../x"},
            {"memory-bytes": 5},
            {"options": {"a": 1}},
            {"options": {"name": "another"}},
            {"options": {"api-socket": "/tmp/x.sock"}},
            {"options": {"lock-directory": "/tmp"}},
            {"options": {"set=x --name": "another"}},
        ):
            reply = await client.ask("x-migrated-guest-create", arguments | wrong)
            assert reply["error"]["desc"].startswith("The guest cannot be created: ")
        reply = await client.ask("x-migrated-guest-create", arguments | {"options": {"set": "a\0b"}})
        assert reply["error"]["desc"] == "Parameter 'options' holds a character that no text has"
        assert [guest["name"] for guest in await daemon.operations.guest_list()] == ["g1"]


async def test_the_schema_names_every_argument(control_socket: Path) -> None:
    async with connected(control_socket) as client:
        schema = (await client.ask("x-migrated-schema"))["return"]
        names = {command["name"] for command in (await client.ask("query-commands"))["return"]}
    commands = {command["name"]: command for command in schema["commands"]}
    assert set(commands) == names
    migrate = {argument["name"]: argument for argument in commands["migrate"]["arguments"]}
    assert migrate["uri"]["type"] == "string"
    assert migrate["on-timeout"]["values"] == ["abort", "force"]
    assert commands["migrate_cancel"]["allow-oob"] is True
    limit = next(p for p in schema["parameters"] if p["name"] == "downtime-limit")
    assert (limit["default"], limit["minimum"], limit["maximum"]) == (300, 0, 2_000_000)
