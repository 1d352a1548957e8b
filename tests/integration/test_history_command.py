"""``migratectl history`` after real migrations: filters, figures and exports, over the daemon's sudden death.

failed, completed g1, failed g2, failed g2 | kill -9 | start | history of the newest three
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scripts.rig.pair import Pair

MIGRATECTL = Path(sys.executable).parent / "migratectl"
NOWHERE = "tcp:127.0.0.1:1"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """Two hosts that keep three records each."""
    with Pair(quick=True, history={"max_records": 3}) as made:
        yield made
        print(made.log_tail())  # noqa: T201 - shown when the test failed


async def ctl(socket: Path, *arguments: str) -> str:
    """What migratectl prints."""

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [MIGRATECTL, "--socket", socket, *arguments],
            capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "TZ": "UTC"},
        )  # fmt: skip

    done = await asyncio.to_thread(run)
    assert done.stderr == ""
    return done.stdout


async def test_the_history_tells_what_happened_after_a_daemon_was_killed(pair: Pair) -> None:
    await pair.a.create_guest("g1", 16)
    await pair.a.create_guest("g2", 16)
    forgotten = await pair.a.migrate("g2", NOWHERE)
    moved = await pair.a.migrate("g1", pair.b, downtime_limit=20_000)
    failed = [await pair.a.migrate("g2", NOWHERE) for _ in range(2)]
    assert [record["outcome"] for record in (moved, *failed)] == ["completed", "failed", "failed"]
    pair.a.kill()
    pair.a.restart()

    async def ids(*filters: str) -> list[str]:
        found: list[dict[str, Any]] = json.loads(await ctl(pair.a.socket, "--json", "history", *filters))
        return [record["migration_id"] for record in found]

    newest_first = [record["migration_id"] for record in (*failed[::-1], moved)]
    assert await ids() == newest_first
    assert forgotten["migration_id"] not in newest_first
    assert await ids("--guest", "g1") == await ids("--outcome", "completed") == newest_first[2:]
    assert await ids("--guest", "g2", "--outcome", "failed", "--last", "1") == newest_first[:1]
    between = failed[0]["started_at"].partition(".")[0]  # the whole second
    later = [record["migration_id"] for record in failed[::-1] if record["started_at"] >= between]
    assert set(later) <= set(await ids("--since", between))
    assert set(await ids("--since", between)) | set(await ids("--until", between)) == set(newest_first)
    assert not set(await ids("--since", between)) & set(await ids("--until", between))

    rows = list(csv.DictReader(io.StringIO(await ctl(pair.a.socket, "history", "--csv"))))
    assert [row["migration_id"] for row in rows] == newest_first
    assert rows[2]["downtime_measured_ns"] == str(moved["downtime"]["measured_ns"])
    assert rows[0]["reason"] == failed[1]["reason"]

    stats = json.loads(await ctl(pair.a.socket, "--json", "history", "--stats"))
    downtime = moved["downtime"]
    assert stats["outcomes"] == {"completed": 1, "failed": 2}
    assert stats["downtime_ns"]["p50"] == stats["downtime_ns"]["max"] == downtime["measured_ns"]
    error_pct = abs(downtime["predicted_ns"] - downtime["measured_ns"]) / downtime["measured_ns"] * 100
    assert stats["prediction_error_pct"]["p95"] == pytest.approx(error_pct)
    told = await ctl(pair.a.socket, "history", "--stats")
    assert "2 (66.7%)" in told
    assert "prediction error" in told

    theirs = json.loads(await ctl(pair.b.socket, "--json", "history"))
    assert [(record["migration_id"], record["outcome"]) for record in theirs] == [(moved["migration_id"], "completed")]
