"""A guest carried by hand between two VMM processes, as a daemon does it, only without a network between."""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import msgpack
import numpy as np
import pytest

from protocol.guest_time import VmTimeData, adjust_time_data
from vmm_sim.host_clock import HostClock

DAY_NS = 86_400_000_000_000
HOST_A, HOST_B = HostClock(), HostClock(offset_ns=DAY_NS, wall_offset_ns=3_600_000_000_000)
OPTIONS_B = ("--hrtime-offset-ns", str(DAY_NS), "--wall-offset-ns", "3600000000000")


async def copy_memory(source: Any, destination: Any) -> None:
    """All of guest memory that is not a hole or zero."""
    replies = [await guest.call("memory") for guest in (source, destination)]
    maps = [mmap.mmap(reply["fds"][0], reply["bytes"]) for reply in replies]
    pages = [np.frombuffer(shared, dtype=np.uint64).reshape(-1, 512) for shared in maps]
    used = np.flatnonzero(pages[0].any(axis=1))
    pages[1][used] = pages[0][used]
    pages.clear()
    for reply, shared in zip(replies, maps, strict=True):
        shared.close()
        os.close(reply["fds"][0])


async def carry(house: Any, source: Any, name: str, to: HostClock, *options: str) -> Any:
    """Move the guest to a new process on host ``to``; the source is left paused."""
    description = (await source.call("describe"))["description"]
    path = house.directory / f"{name}.description"
    path.write_bytes(msgpack.packb(description))
    destination = await house.start(name, "--incoming-description", str(path), *options)
    await source.call("pause")
    pieces = []
    for device in description["devices"]:
        saved = await source.call("device-save", name=device["name"], kind=device["kind"])
        pieces.append((device, saved["payload"]))
    await copy_memory(source, destination)
    # One machine, so the true elapsed time is known: both hosts' clocks are shifts of the same one.
    exported = VmTimeData.model_validate((await source.call("time-export"))["time"])
    hrtime = to.hrtime_ns()
    source_clock = HOST_A if to is HOST_B else HOST_B
    elapsed_ns = hrtime - to.offset_ns - (exported.hrtime - source_clock.offset_ns)
    adjusted = adjust_time_data(
        exported, destination_hrtime=hrtime, destination_wall=to.wall(), elapsed_ns=elapsed_ns
    ).adjusted
    account = await destination.call("time-import", time=adjusted.model_dump(), error_ns=1000)
    assert account["vmm_ns"] >= 0
    assert account["vmm_ticks"] == account["vmm_ns"] * exported.guest_freq // 1_000_000_000
    for device, payload in pieces:
        await destination.call("device-load", payload, name=device["name"], kind=device["kind"], final=True)
    return destination


@pytest.mark.parametrize("workload", ["hot-cold", "fill", "delta"])
async def test_a_guest_survives_the_way_there_and_back(house: Any, workload: str) -> None:
    first = await house.start("a1", "--name", "g1", "--memory", "16MiB", "--workload", workload)
    await first.until(lambda status: status["step"] > 300)
    uptime = (await first.call("status"))["guest_uptime_ns"]
    armed_ns = time.monotonic_ns()
    due = (await first.call("timer-arm", in_ns=2_500_000_000))["due_uptime_ns"]
    second = await carry(house, first, "b1", HOST_B, *OPTIONS_B)
    stopped = (await first.call("status"))["step"]
    assert (await second.call("resume", epoch=1))["step"] == stopped
    await first.call("destroy")
    status = await second.until(lambda status: status["step"] > stopped)
    assert status["heartbeat"]["backwards"] == 0
    assert status["guest_uptime_ns"] > uptime
    assert status["platform"]["vmclock"]["disruption_marker"] == 2
    # The guest's own view of the blackout, and this machine's single clock.
    gap = status["stop_gap"]
    assert abs(gap["guest_ns"] - gap["host_ns"]) < 1_000_000
    assert (await second.call("verify"))["ok"]
    third = await carry(house, second, "a2", HOST_A)
    await third.call("resume", epoch=2)
    await second.call("destroy")
    status = await third.until(lambda status: status["timers"]["fired"])
    fired_ns = time.monotonic_ns()
    (timer,) = status["timers"]["fired"]
    assert timer["due_uptime_ns"] == due
    assert timer["fired_uptime_ns"] >= due
    # 2.5 s of guest time are 2.5 s of true time, whatever happened in between.
    assert fired_ns - armed_ns >= 2_499_000_000
    verdict = await third.call("verify")
    assert verdict["ok"], verdict["message"]
    (stopped,) = (entry for entry in second.run_log() if entry["event"] == "stop")
    assert third.run_log()[0]["event"] == "run"
    assert third.run_log()[0]["monotonic_ns"] >= stopped["monotonic_ns"], "one after the other"
    assert third.run_log()[0]["step"] == stopped["step"]
    assert third.run_log()[0]["epoch"] == 2


async def test_the_source_of_an_aborted_move_runs_on_as_if_after_a_pause(house: Any) -> None:
    first = await house.start("a1", "--name", "g1", "--memory", "8MiB", "--workload", "fill")
    await first.until(lambda status: status["step"] > 300)
    before = (await first.call("status"))["clock"]["boot_hrtime"]
    second = await carry(house, first, "b1", HOST_B, *OPTIONS_B)
    await second.call("destroy")
    assert second.process.wait(timeout=30) == 0
    assert second.run_log()[0]["event"] == "exit"
    stopped = (await first.call("status"))["step"]
    await first.call("resume", epoch=1)
    status = await first.until(lambda status: status["step"] > stopped)
    assert status["clock"]["boot_hrtime"] == before
    assert (await first.call("verify"))["ok"]


async def test_a_lost_page_is_caught_on_the_destination(house: Any) -> None:
    first = await house.start("a1", "--name", "g1", "--memory", "8MiB")
    await first.until(lambda status: status["step"] > 300)
    second = await carry(house, first, "b1", HOST_B, *OPTIONS_B)
    assert (await second.call("pause"))["was_paused"]
    assert (await second.call("verify"))["ok"]
    reply = await second.call("memory")
    os.pwrite(reply["fds"][0], bytes(4096), 300 * 4096)
    os.close(reply["fds"][0])
    verdict = await second.call("verify")
    assert not verdict["ok"]
    assert verdict["first_bad"] == (300,)
    assert "page 300" in verdict["message"]


async def test_an_unscaled_host_within_the_tolerance_is_remembered(house: Any) -> None:
    first = await house.start("a1", "--name", "g1", "--memory", "1MiB", "--set", "guest_freq=2000000000")
    await first.until(lambda status: status["step"] > 10)
    options = (*OPTIONS_B, "--host-freq", "2000400000", "--host-cannot-scale-tsc")
    second = await carry(house, first, "b1", HOST_B, *options)
    await second.call("resume")
    await second.until(lambda status: status["heartbeat"]["backwards"] == 0 and status["step"] > 20)
    third = await carry(house, second, "a2", HOST_A)
    await third.call("resume")
    assert (await third.call("verify"))["ok"]
