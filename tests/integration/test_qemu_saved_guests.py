"""A real Linux guest in stock QEMU is saved while it runs, then for good, and goes on on another host where it was.

a  web runs  ==>  web.saved, web runs on  ==>  web.saved again, web is gone        b  web goes on from the file
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.qemu_rig.console import Console
from scripts.qemu_rig.definition import console_paths, write_definition
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import BOOT_TIMEOUT_S, Backing, QemuSpec
from scripts.qemu_rig.workload import Workload
from scripts.rig.host import Host
from scripts.rig.pair import Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qs-") as path:
        yield Path(path)


async def console_of(host: Host) -> Console:
    return await asyncio.to_thread(Console, *console_paths(host.directory / "guests", "web"))


@pytest.mark.parametrize("backing", ["private", "memfd"])
async def test_a_linux_guest_goes_on_from_a_file(image: GuestImage, directory: Path, backing: Backing) -> None:
    file = directory / "web.saved"
    spec = QemuSpec(workload=Workload.hot_cold(64, 20), backing=backing)
    pair = Pair(vmm={"driver": "qemu"})
    for number, host in enumerate(pair.hosts):
        definitions = directory / host.name
        host.configure(qemu={"ram_directory": str(directory / "ram"), "definitions": str(definitions)})
        definitions.mkdir()
        write_definition(definitions, "web", spec, image, number)
    with pair:
        await pair.a.create_guest("web", spec.memory_mib)
        console = await console_of(pair.a)
        await asyncio.to_thread(console.wait_for, "READY", BOOT_TIMEOUT_S)
        for mode in ("running", "stop"):
            arguments = {"guest": "web", "file": str(file), "mode": mode, "force": True, "downtime-limit": 10_000}
            begun = await pair.a.command("x-migrated-save", arguments)
            record = await pair.a.wait(begun["migration-id"])
            assert record["outcome"] == "completed", record["reason"]
            if mode == "running":
                assert 0 < record["downtime"]["measured_ns"] < record["downtime"]["limit_ns"]
                assert await asyncio.to_thread(console.check) == 0
                await asyncio.to_thread(console.wait_for_beats, 20, 60.0)
        assert await pair.a.guests() == {}
        before = console.beats()[-1]
        begun = await pair.b.command("x-migrated-restore", {"file": str(file)})
        record = await pair.b.wait(begun["migration-id"])
        assert record["outcome"] == "completed", record["reason"]
        assert record["digest"]["source"] == record["digest"]["destination"]
        arrived = await console_of(pair.b)
        await asyncio.to_thread(arrived.wait_for_beats, 20, 60.0)
        assert arrived.beats()[0].sequence > before.sequence
        assert await asyncio.to_thread(arrived.check) == 0
        console.close()
        arrived.close()
        await pair.remove_guests()
        assert await pair.leftovers() == []
