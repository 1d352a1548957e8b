"""Bare QEMU processes, which start in half a second: a machine with firmware and no system to boot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from migrated.base.errors import VmmError
from migrated.vmm import spawn
from migrated.vmm.qemu.qmp import Qmp

QEMU = "qemu-system-x86_64"
START_S = 60.0

BareQemu = Callable[..., Awaitable[Qmp]]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="qm-") as path:
        yield Path(path)


@pytest_asyncio.fixture
async def bare_qemu(place: Path) -> AsyncIterator[BareQemu]:
    """Starts QEMUs, with these arguments behind the common ones, and gives a connection to the monitor of each."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed (Debian: qemu-system-x86)")
    if os.geteuid() != 0:
        pytest.skip("only root may look into another process's memory for sure")
    # As the daemon starts them: whoever waits for a child takes the stops of its tracer away.
    processes: list[int] = []
    connections: list[Qmp] = []

    async def start(*arguments: str, machine: str = "q35,accel=tcg", memory: str = "64M") -> Qmp:
        number = len(processes)
        path = place / f"{number}.qmp"
        command = [
            QEMU, "-machine", machine, "-m", memory, "-nodefaults", "-no-user-config", "-display", "none",
            "-qmp", f"unix:{path},server=on,wait=off", *arguments,
        ]  # fmt: skip
        log = place / f"{number}.log"
        processes.append(spawn.start_process(command, log))
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(VmmError):
                    connections.append(await Qmp.connect(path))
                    return connections[-1]
                assert not spawn.reap(processes[-1]), log.read_text()
                await asyncio.sleep(0.02)

    yield start
    for connection in connections:
        await connection.close()
    for pid in processes:
        await spawn.make_sure_gone(pid, START_S)
