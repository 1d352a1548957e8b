"""The guest's clock is set through a scripted guest agent: right answers, refusals, silence, and left-overs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from migrated.base.errors import VmmError
from migrated.vmm.qemu.agent import set_wall_clock
from scripts.qemu_rig.agent import BEHIND_NS, RIGHT, scripted_agent

LONG_S = 60.0


async def test_the_clock_is_set_to_the_hosts_and_how_far_it_was_behind_is_told(tmp_path: Path) -> None:
    clock_ns = [0]

    def set_clock(arguments: dict[str, Any]) -> object:
        clock_ns[0] = arguments["time"]
        return {"return": {}}

    answers = {**RIGHT, "guest-set-time": set_clock}
    begin_ns = time.time_ns()
    async with scripted_agent(tmp_path / "agent", answers) as asked:
        behind_ns = await set_wall_clock(tmp_path / "agent", LONG_S)
    took_ns = time.time_ns() - begin_ns
    assert asked == ["guest-sync", "guest-get-time", "guest-set-time"]
    assert abs(behind_ns - BEHIND_NS) <= took_ns
    assert begin_ns <= clock_ns[0] <= begin_ns + 2 * took_ns


async def test_an_agent_that_refuses_or_lies_is_told(tmp_path: Path) -> None:
    answers = {**RIGHT, "guest-get-time": lambda _: {"error": {"desc": "it is disabled"}}}
    async with scripted_agent(tmp_path / "agent", answers):
        with pytest.raises(VmmError, match=r"refused guest-get-time: .*it is disabled"):
            await set_wall_clock(tmp_path / "agent", LONG_S)
    answers["guest-get-time"] = lambda _: {"return": "noon"}
    async with scripted_agent(tmp_path / "again", answers) as asked:
        with pytest.raises(VmmError, match="no time"):
            await set_wall_clock(tmp_path / "again", LONG_S)
    assert "guest-set-time" not in asked


async def test_a_port_without_an_agent_is_not_waited_for_long(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="cannot be asked"):
        await set_wall_clock(tmp_path / "none", LONG_S)
    async with scripted_agent(tmp_path / "agent", {"guest-sync": lambda _: {"return": "another number"}}):
        with pytest.raises(VmmError, match="is qemu-guest-agent running"):
            await set_wall_clock(tmp_path / "agent", 0.1)
