"""The checks that the other tests rest on find what they are there to find, on real hosts."""

from __future__ import annotations

from migrated.control.client import ControlClient
from scripts.rig.pair import Pair


async def test_a_descriptor_too_many_is_found(pair: Pair) -> None:
    async with await ControlClient.connect(pair.a.socket) as client:
        await client.command("query-version")
        assert any("more of socket" in found for found in pair.a.excess(0))
        assert pair.b.excess(0) == []


async def test_guest_processes_are_told_apart_by_host(pair: Pair) -> None:
    await pair.a.create_guest("g1", 16)
    pid = (await pair.a.guests())["g1"]["pid"]
    assert pair.a.vmm_pids() == {pid: "g1"}
    assert pair.b.vmm_pids() == {}
