"""A short soak; ``python -m scripts.soak --migrations 200`` is the long one."""

from __future__ import annotations

import asyncio
import json
import sys

from scripts.basics import ROOT

MIGRATIONS = 8


async def test_a_short_soak_ends_without_a_violation() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.soak", "--migrations", str(MIGRATIONS), "--seed", "7",
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(150):
            out, err = await process.communicate()
    except TimeoutError:
        process.terminate()  # it ends its daemons and guests before it ends
        await process.wait()
        raise
    assert process.returncode == 0, err.decode()
    counts = json.loads(out.splitlines()[-1])
    assert counts["migrations"] == MIGRATIONS
    assert counts["faults"] > 0
    assert counts["violations"] == 0
