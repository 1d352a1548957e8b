"""The VMM as a process: start, end, run log, pause and resume, and an API that answers whatever it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from protocol.guest import GuestDescription
from tests.vmm_sim.conftest import START_TIMEOUT_S
from vmm_sim.client import VmmClient, VmmError, VmmGone

SMALL = ("--name", "g1", "--memory", "8MiB")


async def test_a_guest_runs_pauses_and_ends(house: Any) -> None:
    guest = await house.start("g1", *SMALL, "--workload", "fill", "--seed", "5")
    status = await guest.until(lambda status: status["step"] > 0)
    assert (status["state"], status["name"], status["pid"]) == ("running", "g1", guest.process.pid)
    assert status["memory_bytes"] == 8 << 20
    paused = await guest.call("pause")
    assert (await guest.call("status"))["state"] == "paused"
    assert (await guest.call("verify"))["ok"]
    resumed = await guest.call("resume", epoch=9)
    assert resumed["step"] == paused["step"]
    status = await guest.until(lambda status: status["step"] > paused["step"])
    assert (status["state"], status["epoch"]) == ("running", 9)
    await guest.call("destroy")
    assert guest.process.wait(timeout=30) == 0
    assert not guest.socket_path.exists()
    log = guest.run_log()
    assert [(entry["event"], entry["epoch"]) for entry in log] == [("run", 0), ("stop", 0), ("run", 9), ("exit", 9)]
    assert [entry["step"] for entry in log[1:3]] == [paused["step"]] * 2
    assert all(a["monotonic_ns"] <= b["monotonic_ns"] for a, b in itertools.pairwise(log))
    assert {entry["pid"] for entry in log} == {guest.process.pid}


async def test_pause_is_exact_a_hundred_times(house: Any) -> None:
    """Nothing is written between pause and resume, and the next run starts at the very next step."""
    guest = await house.start("g1", *SMALL, "--workload", "fill")
    reply = await guest.call("memory")
    (fd,) = reply["fds"]
    step = 0
    for _ in range(100):
        paused = await guest.call("pause")
        assert paused["step"] >= step
        step = paused["step"]
        before = os.pread(fd, 1 << 20, 0)
        assert os.pread(fd, 1 << 20, 0) == before
        assert (await guest.call("resume"))["step"] == step
    await guest.call("pause")
    assert (await guest.call("verify"))["ok"]
    os.close(fd)


async def test_pause_and_resume_are_idempotent(house: Any) -> None:
    guest = await house.start("g1", *SMALL)
    assert (await guest.call("resume"))["was_running"]
    first = await guest.call("pause")
    second = await guest.call("pause")
    assert (second["step"], second["was_paused"]) == (first["step"], True)
    assert "was_paused" not in first
    assert [entry["event"] for entry in guest.run_log()] == ["run", "stop"]


async def test_stops_and_resumes_are_carried_out_in_the_order_in_which_they_came(house: Any) -> None:
    """Nobody waits for the answer before the next is sent, as when a stop is given up."""
    guest = await house.start("g1", *SMALL)
    for _ in range(50):
        answers = [asyncio.create_task(guest.call(op)) for op in ("pause", "resume", "pause", "resume")]
        stopped, ran, *_ = [await answer for answer in answers]
        assert "was_paused" not in stopped
        assert "was_running" not in ran
    assert (await guest.call("status"))["state"] == "running"


async def test_a_paused_guest_never_runs(house: Any) -> None:
    guest = await house.start("g1", *SMALL, "--paused")
    await guest.until(lambda status: not status["booting"])
    status = await guest.call("status")
    assert (status["state"], status["step"], status["heartbeat"]["beats"]) == ("paused", 0, 0)
    assert (await guest.call("verify"))["ok"]
    assert guest.run_log() == []


async def test_the_rate_is_kept_changed_and_throttled(house: Any) -> None:
    """Steps over guest time, between two statuses of the running guest. Time that a busy machine keeps it from running
    is lost to it, so it is asked until it had a quieter moment."""
    guest = await house.start("g1", *SMALL, "--workload", "random", "--dirty-rate", "20MiB/s")

    async def rate(over_ns: int = 200_000_000) -> float:
        first = await guest.call("status")
        last = await guest.until(lambda s: s["guest_uptime_ns"] >= first["guest_uptime_ns"] + over_ns)
        seconds = (last["guest_uptime_ns"] - first["guest_uptime_ns"]) / 1e9
        return float((last["step"] - first["step"]) * 4096 / seconds / (1 << 20))

    async def rate_above(wanted: float) -> float:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (seen := await rate()) <= wanted and time.monotonic() < deadline:
            pass
        return seen

    await guest.until(lambda status: status["step"] > 0)
    assert 5 < await rate_above(5) < 30
    await guest.call("throttle", percent=75)
    assert 1 < await rate_above(1) < 8
    await guest.call("throttle", percent=0)
    await guest.call("set-rate", dirty_rate=80 << 20)
    assert 20 < await rate_above(20) < 120
    assert (await guest.call("status"))["dirty_rate_bytes_per_s"] == 80 << 20


async def test_a_throttled_fill_does_less(house: Any) -> None:
    guest = await house.start("g1", *SMALL, "--workload", "fill")

    async def steps(over_ns: int = 300_000_000) -> int:
        first = await guest.call("status")
        last = await guest.until(lambda s: s["guest_uptime_ns"] >= first["guest_uptime_ns"] + over_ns)
        return int(last["step"] - first["step"])

    await guest.until(lambda status: status["step"] > 0)
    full = await steps()
    await guest.call("throttle", percent=95)
    assert 0 < await steps() < full / 4


async def test_the_guest_feels_a_pause_and_the_host_confirms_it(house: Any) -> None:
    guest = await house.start("g1", *SMALL, "--workload", "idle")
    await guest.until(lambda status: status["heartbeat"]["beats"] > 3)
    assert (await guest.call("status"))["stop_gap"] is None
    await guest.call("pause")
    before = (await guest.call("status"))["guest_uptime_ns"]
    await guest.until(lambda status: status["guest_uptime_ns"] > before + 30_000_000)
    await guest.call("resume")
    status = await guest.until(lambda status: status["stop_gap"] is not None)
    gap = status["stop_gap"]
    assert gap["guest_ns"] > 30_000_000
    assert abs(gap["guest_ns"] - gap["host_ns"]) < 2_000_000
    assert status["heartbeat"]["max_gap_ns"] >= gap["guest_ns"]
    assert gap["guest_ns"] in [entry["gap_ns"] for entry in status["heartbeat"]["gaps"]]


async def test_timers_fire_at_their_guest_time(house: Any) -> None:
    guest = await house.start("g1", *SMALL, "--workload", "idle")
    await guest.until(lambda status: status["heartbeat"]["beats"] > 0)
    due = (await guest.call("timer-arm", in_ns=50_000_000))["due_uptime_ns"]
    (timer,) = (await guest.until(lambda status: status["timers"]["fired"]))["timers"]["fired"]
    assert timer["due_uptime_ns"] == due
    assert due <= timer["fired_uptime_ns"] < due + 1_000_000_000
    assert (await guest.call("status"))["timers"]["pending"] == ()


async def test_status_answers_while_saves_run_and_interrupt_ends_them(house: Any) -> None:
    profile = house.directory / "slow.toml"
    profile.write_text('[[device]]\nname = "slow"\nkind = "non-iterable"\nsave_us = 3600000000\n', encoding="utf-8")
    guest = await house.start("g1", *SMALL, "--profile", str(profile), "--paused")
    saves = [asyncio.create_task(guest.call("device-save", name="slow", kind="non-iterable")) for _ in range(5)]
    for _ in range(3):
        assert (await guest.call("status"))["state"] == "paused"
    while not all(save.done() for save in saves):
        await guest.call("interrupt")  # one that has not begun yet is not interrupted
    for save in saves:
        with pytest.raises(VmmError, match="Interrupted"):
            await save


PARENT = """
import subprocess, sys
print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def orphan(house: Any) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A guest that another process started: its pid, and that parent."""
    command = [sys.executable, "-c", PARENT, *house.command("g1", *SMALL)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        yield pid, parent
        parent.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_a_guest_outlives_its_parent_and_sigterm_ends_it_as_destroy_does(
    house: Any, orphan: tuple[int, subprocess.Popen[str]]
) -> None:
    pid, parent = orphan

    async def steps(client: VmmClient) -> int:
        return int((await client.call("status")).meta["step"])

    async def poll_for_ever(client: VmmClient) -> None:
        while True:
            await client.call("status")

    async with await house.connect("g1") as client:
        parent.kill()
        parent.wait()
        step = await steps(client)
        while await steps(client) <= step:
            continue
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(VmmGone):
            await poll_for_ever(client)
    assert '"event": "exit"' in (house.directory / "g1.runlog").read_text(encoding="utf-8").splitlines()[-1]
    assert not (house.directory / "g1.sock").exists()


async def test_a_socket_path_in_use_is_refused_and_a_stale_one_replaced(house: Any) -> None:
    guest = await house.start("g1", *SMALL)
    assert stat.S_IMODE(guest.socket_path.stat().st_mode) == 0o600
    second = house.launch(house.command("g1", *SMALL))
    assert second.wait(timeout=30) == 2
    assert second.stderr is not None
    assert "A live VMM uses" in second.stderr.read()
    assert (await guest.call("status"))["state"] == "running"
    guest.process.kill()
    guest.process.wait()
    assert guest.socket_path.exists()
    third = await house.start("g1", *SMALL)
    assert (await third.call("status"))["pid"] == third.process.pid


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--memory", "lots"), "'lots' is not a size"),
        (("--workload", "dance"), "workload"),
        (("--set", "colour=3"), "colour"),
        (("--set", "colour"), "KEY=VALUE"),
        (("--profile", "/nowhere/p.toml"), "/nowhere/p.toml cannot be read"),
        (("--incoming-description", "/nowhere/d"), "/nowhere/d cannot be read"),
        (("--host-freq", "9000000000", "--host-cannot-scale-tsc"), "cannot scale"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_sentence(tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    command = [sys.executable, "-m", "vmm_sim.main", "--api-socket", str(tmp_path / "s.sock"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_socket_path_that_cannot_be_bound_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "file.sock"
    plain.write_text("mine", encoding="utf-8")
    for path, sentence in (
        (plain, "not a socket"),
        (tmp_path / "none" / "s.sock", "No such file"),
        (tmp_path / ("x" * 150 + ".sock"), "too long"),
    ):
        command = [sys.executable, "-m", "vmm_sim.main", "--api-socket", str(path), "--memory", "1MiB"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2
        assert sentence in ended.stderr
    assert plain.read_text(encoding="utf-8") == "mine"


async def test_a_description_builds_an_equal_guest_or_is_refused(house: Any) -> None:
    guest = await house.start("g1", *SMALL, "--set", "guest_freq=2649958945")
    described = (await guest.call("describe"))["description"]
    path = house.directory / "d.msgpack"
    path.write_bytes(msgpack.packb(described))
    incoming = await house.start("g2", "--name", "g1", "--incoming-description", str(path))
    assert (await incoming.call("status"))["state"] == "incoming"
    twin = GuestDescription.model_validate((await incoming.call("describe"))["description"])
    original = GuestDescription.model_validate(described)
    assert original.differences(twin) == []
    assert (twin.devices, twin.name) == (original.devices, original.name)
    for options, change, sentence in (
        ((), {"vcpus": 3}, "contradicts"),
        ((), {"guest_freq": 1_000_000_001}, "contradicts"),
        ((), {"vmm_config": b"\xc1"}, "cannot be read"),
        ((), {"vmm_config": msgpack.packb([1, {"name": "g1"}, 0])}, "not usable"),
        ((), {"vmm_config": msgpack.packb([9, {}, 0])}, "another version"),
        ((), {"machine": "pc"}, "contradicts"),
        ((), {"page_size": "4096"}, "not usable"),
        (("--host-freq", "1000000000", "--host-cannot-scale-tsc"), {}, "cannot scale"),
        (("--memory", "4MiB"), {}, "leave out other options"),
        (("--name", "g9"), {}, "is of guest g1"),
    ):
        path.write_bytes(msgpack.packb({**described, **change}))
        refused = house.launch(house.command("g3", "--incoming-description", str(path), *options))
        assert refused.wait(timeout=30) == 2
        assert refused.stderr is not None
        assert sentence in refused.stderr.read()


@pytest.mark.parametrize(
    ("op", "arguments", "error"),
    [
        ("dance", {}, "UnknownOperation"),
        ("throttle", {}, "InvalidArgument"),
        ("throttle", {"percent": 100}, "InvalidArgument"),
        ("throttle", {"percent": True}, "InvalidArgument"),
        ("throttle", {"percent": 1.0}, "InvalidArgument"),
        ("pause", {"now": 1}, "InvalidArgument"),
        ("device-save", {"name": 5, "kind": "iterable"}, "InvalidArgument"),
        ("device-save", {"name": "x", "kind": "odd"}, "InvalidArgument"),
        ("device-save", {"name": "x", "kind": "iterable", "round": -1}, "InvalidArgument"),
        ("device-load", {"name": "x", "kind": "iterable", "final": 1}, "InvalidArgument"),
        ("device-load", {"name": "x", "kind": "iterable"}, "InvalidArgument"),
        ("dirty-log-start", {"mode": "magic"}, "InvalidArgument"),
        ("dirty-log-start", {"mode": [1]}, "InvalidArgument"),
        ("time-import", {"time": None}, "NotIncoming"),
        ("dry-run", {"side": "top"}, "InvalidArgument"),
        ("dry-run-states", {"bytes": 1 << 40}, "InvalidArgument"),
        ("timer-arm", {"in_ns": -1}, "InvalidArgument"),
    ],
)
async def test_wrong_requests_are_named_errors(house: Any, op: str, arguments: dict[str, Any], error: str) -> None:
    guest = await house.start("g1", "--memory", "1MiB", "--workload", "idle")
    with pytest.raises(VmmError) as raised:
        await guest.call(op, **arguments)
    assert raised.value.name == error
    assert raised.value.message.endswith(".")
    assert (await guest.call("status"))["state"] == "running"


async def test_states_are_handed_over_for_nothing_both_ways(house: Any) -> None:
    """So that a daemon can time the calls of a switchover beforehand; the guest does not notice."""
    guest = await house.start("g1", *SMALL)
    assert len((await guest.client.call("dry-run-states", bytes=1 << 20)).payload) == 1 << 20
    assert not (await guest.client.call("dry-run-states", b"x" * (1 << 20), bytes=0)).payload
    assert (await guest.call("status"))["state"] == "running"


async def test_damaged_frames_cost_their_connection_and_nothing_else(house: Any) -> None:
    guest = await house.start("g1", *SMALL)
    meta = msgpack.packb({"id": 1, "op": "status"})
    for data in (
        struct.pack("!II", (1 << 20) + 1, 0),
        struct.pack("!II", 10, (1 << 30) + 1),
        struct.pack("!II", 4, 0) + b"\xc1\xc1\xc1\xc1",
        struct.pack("!II", 1, 0) + b"\x01",
        struct.pack("!II", 1000, 0) + b"\x91" * 1000,
        struct.pack("!II", len(meta), 0) + meta[:-1],
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(30)
            stranger.connect(str(guest.socket_path))
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            answer = b""
            # A connection that is closed with bytes unread is reset, and the answer may be lost with it.
            with contextlib.suppress(ConnectionResetError):
                while chunk := stranger.recv(65536):
                    answer += chunk
            assert answer == b"" or b"BadFrame" in answer
    assert (await guest.call("status"))["state"] == "running"


async def test_several_clients_are_served_at_once(house: Any) -> None:
    guest = await house.start("g1", *SMALL)
    clients: list[VmmClient] = [await house.connect("g1") for _ in range(5)]
    replies = await asyncio.gather(*(client.call("status") for client in clients for _ in range(10)))
    assert {reply.meta["name"] for reply in replies} == {"g1"}
    for client in clients:
        await client.close()
    assert (await guest.call("status"))["name"] == "g1"
