"""Guests for the tests: as objects inside the test, and as the real processes that daemons start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm_sim.client import VmmClient, VmmGone
from vmm_sim.clock import HostTsc
from vmm_sim.config import GuestConfig, build_config
from vmm_sim.host_clock import HostClock
from vmm_sim.runlog import RunLog
from vmm_sim.vmm import Vmm

UUID = "11111111-2222-3333-4444-555555555555"
START_TIMEOUT_S = 30.0


class StillClock(HostClock):
    """A host whose clocks show what the test sets."""

    def __init__(self, hrtime: int = 1_000_000_000_000, wall_ns: int = 1_683_850_713_000_000_000) -> None:
        super().__init__()
        self.hrtime = hrtime
        self.wall_ns = wall_ns

    def hrtime_ns(self) -> int:
        return self.hrtime

    def wall(self) -> tuple[int, int]:
        return divmod(self.wall_ns, 1_000_000_000)


@pytest.fixture
def still_clock() -> type[StillClock]:
    """Hosts whose clocks stand still."""
    return StillClock


@pytest.fixture
def config() -> Callable[..., GuestConfig]:
    """Makes guest configs: small memory, everything else as asked for."""

    def make(**options: Any) -> GuestConfig:
        return build_config({"name": "g1", "uuid": UUID, "memory": "4MiB", **options})

    return make


@pytest.fixture
def make_vmm(config: Callable[..., GuestConfig], tmp_path: Path) -> Iterator[Callable[..., Vmm]]:
    """Makes VMMs inside the test's process, booted and paused, or incoming; they end with the test."""
    made: list[tuple[Vmm, RunLog]] = []

    def make(
        *, incoming: bool = False, host: HostClock | None = None, tsc: HostTsc | None = None, **options: Any
    ) -> Vmm:
        guest = config(**options)
        run_log = RunLog(tmp_path / f"{len(made)}.runlog")
        tsc = tsc or HostTsc(guest.guest_freq)
        vmm = Vmm(guest, host=host or HostClock(), host_tsc=tsc, run_log=run_log, incoming=incoming)
        made.append((vmm, run_log))
        vmm.start(paused=True)
        if not incoming:
            vmm.pause()  # returns once the guest has booted
        return vmm

    yield make
    for vmm, run_log in made:
        vmm.shut_down()
        run_log.close()


class Guest:
    """One VMM process and a connection to it."""

    def __init__(self, process: subprocess.Popen[str], socket_path: Path, client: VmmClient) -> None:
        self.process = process
        self.socket_path = socket_path
        self.client = client

    async def call(self, op: str, payload: bytes | bytearray = b"", **args: Any) -> dict[str, Any]:
        """The reply's map; its payload under ``payload``, its descriptors under ``fds``."""
        reply = await self.client.call(op, payload, **args)
        return {**reply.meta, "payload": reply.payload, "fds": reply.fds}

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status for which ``holds``."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not holds(status := await self.call("status")):
            assert time.monotonic() < deadline, f"the guest never got there: {status}"
            await asyncio.sleep(0.002)
        return status

    def run_log(self) -> list[dict[str, Any]]:
        """The run log's entries."""
        lines = self.socket_path.with_suffix(".runlog").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


class GuestHouse:
    """Starts VMM processes in one short directory (socket paths are limited) and ends them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.guests: list[Guest] = []
        self._processes: list[subprocess.Popen[str]] = []

    def command(self, name: str, *options: str) -> list[str]:
        """Command line of a VMM with API socket ``<name>.sock``."""
        socket_path = self.directory / f"{name}.sock"
        return [sys.executable, "-m", "vmm_sim.main", "--api-socket", str(socket_path), *options]

    def launch(self, command: list[str]) -> subprocess.Popen[str]:
        """Start a process that is killed at the end of the test, if it still lives."""
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        self._processes.append(process)
        return process

    async def start(self, name: str = "g1", *options: str) -> Guest:
        """A VMM that answers."""
        process = self.launch(self.command(name, *options))
        client = await self.connect(name, process)
        guest = Guest(process, self.directory / f"{name}.sock", client)
        self.guests.append(guest)
        return guest

    async def connect(self, name: str, process: subprocess.Popen[str] | None = None) -> VmmClient:
        """Another connection to a VMM."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return await VmmClient.connect(self.directory / f"{name}.sock")
            except VmmGone:
                if process is not None and process.poll() is not None and process.stderr is not None:
                    pytest.fail(f"the VMM ended with {process.returncode}: {process.stderr.read()}")
                assert time.monotonic() < deadline, "the VMM never answered"
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        """End everything."""
        for guest in self.guests:
            await guest.client.close()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, 9) if process.poll() is None else None
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


@pytest.fixture
async def house() -> AsyncIterator[GuestHouse]:
    """Starts VMM processes."""
    directory = Path(tempfile.mkdtemp(prefix="vmm"))
    guests = GuestHouse(directory)
    try:
        yield guests
    finally:
        await guests.close()
        shutil.rmtree(directory)
