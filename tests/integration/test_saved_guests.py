"""Guests saved in files and restored, by real daemons and real guest processes, verified byte for byte.

a: save --running -> g1 runs on     a: save --stop -> g1 is gone     b: restore -> g1 runs there, its clock right
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from migrated.control.client import CommandError
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

ROOMY = {"downtime-limit": 20_000}
MS = 1_000_000


async def begin_save(host: Host, file: Path, **arguments: Any) -> str:
    answer = await host.command("x-migrated-save", {"guest": "g1", "file": str(file), **arguments})
    return str(answer["migration-id"])


async def save(host: Host, file: Path, **arguments: Any) -> dict[str, Any]:
    return await host.wait(await begin_save(host, file, **arguments))


async def restore(host: Host, file: Path, **arguments: Any) -> dict[str, Any]:
    answer = await host.command("x-migrated-restore", {"file": str(file), **arguments})
    return await host.wait(answer["migration-id"])


async def test_a_guest_is_put_away_and_brought_back_elsewhere(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "g1.saved"
    await pair.a.create_guest("g1", 32, workload="hot-cold", seed=7)
    before = await pair.a.guest()
    saved = await save(pair.a, file)
    assert (saved["outcome"], saved["reason"], saved["downtime"]) == ("completed", None, None)
    assert saved["peer"] == f"file:{file}"
    assert "g1" not in await pair.a.guests()
    assert (file.stat().st_mode & 0o777, list(tmp_path.iterdir())) == (0o600, [file])
    restored = await restore(pair.b, file)
    assert (restored["outcome"], restored["reason"]) == ("completed", None)
    assert restored["digest"]["source"] == restored["digest"]["destination"] == saved["digest"]["source"]
    assert (await pair.b.verify())["ok"]
    after = await pair.b.guest()
    assert (after["state"], after["uuid"], after["heartbeat"]["backwards"]) == ("running", before["uuid"], 0)
    assert after["step"] >= before["step"]
    # The guest's clock went on by the time that it lay in the file, known to within the export and the import.
    time = restored["time"]
    assert time["elapsed_lower_ns"] <= time["elapsed_ns"] <= time["elapsed_upper_ns"]
    lower_ns, upper_ns = time["wall_clock_skew_ns"]
    assert lower_ns - 50 * MS <= 0 <= upper_ns + 50 * MS
    assert pair.double_runs() == []
    assert (await pair.a.record(saved["migration_id"])) == saved


async def test_a_running_guest_is_saved_within_its_limit_and_goes_on(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "g1.saved"
    await pair.a.create_guest("g1", 32, workload="random", dirty_rate_bytes_per_s=30 << 20)
    saved = await save(pair.a, file, mode="running", **ROOMY)
    assert (saved["outcome"], saved["reason"]) == ("completed", None)
    downtime = saved["downtime"]
    assert sum(p["ns"] for p in downtime["parts"]) + downtime["unattributed_ns"] == downtime["measured_ns"]
    assert not downtime["limit_violated"]
    assert downtime["predicted_ns"] is not None
    assert len(saved["rounds"]) >= 1
    assert saved["ram"]["dirty_tracking"] == "pagemap-scan"
    assert (await pair.a.guest())["state"] == "running"
    assert (await pair.a.verify())["ok"]
    # The file is that of the moment of the stop; the guest of the same uuid must not be there twice.
    refused = await restore(pair.a, file, guest="g2")
    assert refused["outcome"] == "refused"
    assert "already" in refused["reason"]
    with pytest.raises(CommandError, match="already on this host"):
        await restore(pair.a, file)
    restored = await restore(pair.b, file, guest="other.name", **{"time-policy": "freeze"})
    assert (restored["outcome"], restored["time"]["elapsed_ns"]) == ("completed", 0)
    assert (await pair.b.verify("other.name"))["ok"]


async def test_a_paused_guest_stays_paused(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "g1.saved"
    await pair.a.create_guest("g1", 8, paused=True)
    assert (await save(pair.a, file, mode="running"))["outcome"] == "completed"
    assert (await pair.a.guest())["state"] == "paused"
    assert (await restore(pair.b, file))["outcome"] == "completed"
    assert (await pair.b.guest())["state"] == "paused"
    await pair.b.command("x-migrated-guest-resume", {"guest": "g1"})
    assert (await pair.b.verify())["ok"]


async def test_a_stop_that_would_be_too_long_is_given_up(pair: Pair, tmp_path: Path) -> None:
    """The devices take longer than the limit: the guest goes on, and nothing is left."""
    await pair.a.create_guest("g1", 8, workload="idle", profile="busy")
    file = tmp_path / "g1.saved"
    refused = await save(pair.a, file, mode="running", **{"downtime-limit": 1})
    assert refused["outcome"] == "refused"
    assert "--downtime-limit" in refused["reason"]
    forced = await save(pair.a, file, mode="running", **{"downtime-limit": 1, "on-timeout": "force", "timeout-s": 0.01})
    assert forced["outcome"] == "aborted"
    assert "it runs on and nothing was saved" in forced["reason"]
    assert forced["downtime"]["measured_ns"] > 0
    assert (await pair.a.guest())["state"] == "running"
    assert (await pair.a.verify())["ok"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["running", "stop"])
async def test_a_cancelled_save_leaves_the_guest_as_it_was(pair: Pair, tmp_path: Path, mode: str) -> None:
    await pair.a.create_guest("g1", 64, workload="fill")
    migration_id = await begin_save(pair.a, tmp_path / "g1.saved", mode=mode, **{"max-bandwidth": 4 << 20})
    await pair.a.until_status("g1", "active")
    await pair.a.command("migrate_cancel", {"guest": "g1"})
    record = await pair.a.wait(migration_id)
    assert record["outcome"] == "cancelled"
    assert (await pair.a.guest())["state"] == "running"
    assert (await pair.a.verify())["ok"]
    assert list(tmp_path.iterdir()) == []


async def test_damage_is_named_and_costs_only_the_restore(pair: Pair, tmp_path: Path) -> None:
    file, places = tmp_path / "g1.saved", random.Random(11)
    await pair.a.create_guest("g1", 8, workload="hot-cold")
    assert (await save(pair.a, file))["outcome"] == "completed"
    whole = file.read_bytes()
    for part in (0.3, 0.9):
        place = int(part * len(whole)) + places.randrange(1000)
        with file.open("r+b") as changed:
            changed.seek(place)
            changed.write(bytes([whole[place] ^ 0xFF]))
        damaged = await restore(pair.b, file)
        assert damaged["outcome"] == "failed"
        assert f"{file} is damaged in " in damaged["reason"]
        assert "begins at byte" in damaged["reason"]
        assert await pair.b.guests() == {}
        file.write_bytes(whole)
    assert (await restore(pair.b, file))["outcome"] == "completed"
    assert (await pair.b.verify())["ok"]


async def test_the_commands_of_qemu_mean_files_too(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "g1.saved"
    await pair.a.create_guest("g1", 8)
    with pytest.raises(CommandError, match="whole path"):
        await pair.a.begin_migration("g1", "file:g1.saved")
    saved = await pair.a.migrate("g1", f"file:{file}")
    assert saved["outcome"] == "completed"
    with pytest.raises(CommandError, match="give it as file:PATH"):
        await pair.b.command("migrate-incoming", {"uri": "tcp:127.0.0.1:1"})
    channel = {"channel-type": "main", "addr": {"transport": "file", "filename": str(file), "offset": 0}}
    begun = await pair.b.command("migrate-incoming", {"channels": [channel]})
    assert begun["guest"] == "g1"
    assert (await pair.b.wait(begun["migration-id"]))["outcome"] == "completed"
    shown = await pair.b.command("query-migrate", {"guest": "g1"})
    assert (shown["status"], shown["role"], shown["peer"]) == ("completed", "destination", f"file:{file}")


async def test_a_full_disk_costs_only_the_save(pair: Pair, small_disk: Path) -> None:
    await pair.a.create_guest("g1", 32, workload="fill")

    async def grown() -> bool:
        return int((await pair.a.guest())["step"]) > 0

    await until("a guest that has written memory", grown)
    for mode in ("running", "stop"):
        record = await save(pair.a, small_disk / "g1.saved", mode=mode, **ROOMY)
        assert record["outcome"] == ("failed" if mode == "running" else "aborted"), record["reason"]
        assert "No space left on device" in record["reason"]
        assert (await pair.a.guest())["state"] == "running"
        assert (await pair.a.verify())["ok"]
        assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("mode", ["running", "stop"])
async def test_a_killed_daemon_leaves_guest_or_file_and_nothing_else(fresh: Pair, tmp_path: Path, mode: str) -> None:
    """The daemon is killed in the middle of a save; another one in the middle of a restore."""
    file = tmp_path / "g1.saved"
    await fresh.a.create_guest("g1", 16, workload="fill")
    await begin_save(fresh.a, file, mode=mode, **{"max-bandwidth": 8 << 20})
    await fresh.a.until_status("g1", "active")
    fresh.a.kill()
    fresh.a.restart()
    assert list(tmp_path.iterdir()) == []
    assert (await fresh.a.guest())["state"] == "running"
    assert (await fresh.a.verify())["ok"]
    assert (await save(fresh.a, file))["outcome"] == "completed"
    await fresh.b.command("x-migrated-restore", {"file": str(file)})
    await fresh.b.until_status("g1", "active", "completed")
    fresh.b.kill()
    fresh.b.restart()
    if "g1" not in await fresh.b.guests():  # else it was killed just after the guest ran
        assert (await restore(fresh.b, file))["outcome"] == "completed"
    assert (await fresh.b.guest())["state"] == "running"
    assert (await fresh.b.verify())["ok"]
