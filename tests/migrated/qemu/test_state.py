"""Device state out of one QEMU and into another: the stream that is made of what QEMU saves, and its ways to fail.

No memory travels here, and some devices look into it when they are loaded: so the sources have not begun to run.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from migrated.base.errors import VmmError
from migrated.vmm.qemu.qmp import Qmp
from migrated.vmm.qemu.state import StateLoad, StateSave, with_machine
from tests.migrated.qemu.conftest import BareQemu

MACHINE = "pc-q35-7.2"


async def machine_of(qmp: Qmp) -> str:
    return str(await qmp.call("qom-get", path="/machine", property="type")).removesuffix("-machine")


def test_the_machine_type_is_put_behind_the_header() -> None:
    assert with_machine(b"QEVM\0\0\0\3\4rest", "q35") == b"QEVM\0\0\0\3\7\0\0\0\3q35\4rest"
    for strange in (b"", b"QEVM\0\0\0\2rest", b"XXXX\0\0\0\3rest"):
        with pytest.raises(VmmError, match="unknown format"):
            with_machine(strange, "q35")


async def test_devices_go_from_one_qemu_to_another(bare_qemu: BareQemu) -> None:
    devices = ("-device", "VGA", "-device", "virtio-rng-pci")
    source, target = await bare_qemu(*devices, "-S"), await bare_qemu(*devices, "-incoming", "defer", "-S")
    save, load = StateSave(source), StateLoad(target)
    await save.prepare()
    await load.prepare()
    stream, save_ns = await save.save(await machine_of(source), release_disks=True)
    assert save_ns > 0
    assert 10_000 < len(stream) < 4 << 20
    assert await load.load(stream) > 0
    assert (await target.call("query-status"))["status"] == "paused"
    await target.call("cont")
    # The source could go on: nothing that the save did stays.
    await source.call("cont")
    assert (await source.call("query-status"))["running"]
    save.close()
    load.close()


async def test_a_guest_can_be_saved_again_and_weighs_the_same(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu("-S")
    save = StateSave(qmp)
    first, _ = await save.save(MACHINE, release_disks=True)
    second, _ = await save.save(MACHINE, release_disks=True)
    assert len(first) == len(second)
    await qmp.call("cont")
    await save.release()
    assert await qmp.call("query-fdsets") == []


def open_memories() -> int:
    """How many files of device state this process has open."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("device-state" in link for link in links)


async def test_a_save_that_fails_leaves_no_file_open(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu("-S")
    await qmp.close()  # as when QEMU has ended
    save = StateSave(qmp)
    for _ in range(2):
        with pytest.raises(VmmError):
            await save.prepare()
    assert open_memories() == 0


async def test_a_load_lets_go_of_its_stream(bare_qemu: BareQemu) -> None:
    source, target = await bare_qemu("-S"), await bare_qemu("-incoming", "defer", "-S")
    save, load = StateSave(source), StateLoad(target)
    before = len(os.listdir("/proc/self/fd"))
    stream, _ = await save.save(await machine_of(source), release_disks=True)
    save.close()
    await load.load(stream)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_disk_is_free_for_the_destination_after_the_save_and_taken_back_by_a_resume(
    bare_qemu: BareQemu, place: Path
) -> None:
    """Both would open it for writing: the lock on the image decides, and says who has it."""
    disk = place / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = ("-drive", f"file={disk},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d")
    source, target = await bare_qemu(*drive, "-S"), await bare_qemu(*drive, "-incoming", "defer", "-S")
    save, load = StateSave(source), StateLoad(target)
    await load.prepare()
    stream, _ = await save.save(await machine_of(source), release_disks=True)
    await load.load(stream)
    await target.call("cont")
    with pytest.raises(VmmError, match="lock"):
        await source.call("cont")
    save.close()
    load.close()


async def test_a_stream_of_another_machine_is_refused(bare_qemu: BareQemu) -> None:
    source, target = await bare_qemu("-S", machine="pc,accel=tcg"), await bare_qemu("-incoming", "defer", "-S")
    save, load = StateSave(source), StateLoad(target)
    stream, _ = await save.save(await machine_of(source), release_disks=True)
    with pytest.raises(VmmError, match=r"refused the guest's device state|is lost|did not load"):
        await load.load(stream)
    save.close()
    load.close()


async def test_a_load_is_ended_by_an_interrupt_within_moments(bare_qemu: BareQemu) -> None:
    target = await bare_qemu("-incoming", "defer", "-S")
    load = StateLoad(target)
    await load.prepare()
    loading = asyncio.create_task(load.load(b"QEVM\0\0\0\3"))  # and then nothing: it waits for the rest
    await asyncio.sleep(0)
    load.interrupt()
    with pytest.raises(VmmError):
        async with asyncio.timeout(20):
            await loading
    load.close()
