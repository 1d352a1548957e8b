"""What stands in the way of a migration, looked for in real QEMUs: each refusal with its sentence, tried for real."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migrated.vmm.qemu.checks import check_guest, drives_bypass_page_tables
from migrated.vmm.qemu.findings import Row, refusals
from migrated.vmm.qemu.process_checks import check_process
from migrated.vmm.qemu.qmp import Qmp
from migrated.vmm.qemu.ram import Ram, RamBlock, find_ram
from scripts.rig.waiting import until
from tests.migrated.qemu.conftest import START_S, BareQemu

SHARED = ("-object", "memory-backend-memfd,id=mine,size=64M,share=on")
SHARED_MACHINE = "q35,accel=tcg,memory-backend=mine"


async def rows_of(qmp: Qmp, ram: Ram | None = None) -> dict[str, Row]:
    return {row.name: row for row in await check_guest(qmp, ram or await find_ram(qmp))}


async def test_a_guest_as_everyone_starts_it_has_nothing_against_it(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu("-device", "VGA", "-trace", "vm_state_notify")
    rows = await rows_of(qmp)
    assert [row for row in rows.values() if row.verdict != "ok"] == []
    assert "no drives" in rows["drives"].sentence
    assert "which leaves memory to us" in rows["device state"].sentence
    assert (await qmp.call("query-status"))["status"] == "running"
    assert refusals(rows.values()) is None


async def test_the_checks_can_be_repeated_and_leave_qemu_able_to_migrate(bare_qemu: BareQemu, place: Path) -> None:
    qmp = await bare_qemu()
    for _ in range(3):
        assert (await rows_of(qmp))["QEMU's own blockers"].verdict == "ok"
    async with qmp.listen("STOP") as stopped:
        await qmp.call("migrate", uri=f"exec:cat > {place}/stream")
        await stopped()


async def python(code: str, *arguments: str) -> asyncio.subprocess.Process:
    """Another process, which has said one line and waits for the end of its input."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def test_another_process_that_maps_the_memory_is_named(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu(*SHARED, machine=SHARED_MACHINE)
    assert (await rows_of(qmp))["other mappers"].verdict != "refused"
    mapping = (await find_ram(qmp)).carried[0].mapping
    other = await python(
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); mapping = mmap.mmap(file.fileno(), 4096); "
        "print('ready', flush=True); sys.stdin.read()",
        f"/proc/{qmp.pid}/map_files/{mapping.begin:x}-{mapping.end:x}",
    )
    row = (await rows_of(qmp))["other mappers"]
    await other.communicate(b"")
    assert row.verdict == "refused"
    assert f"process {other.pid}" in row.sentence
    assert "is not tracked and would be lost" in row.sentence


async def test_a_vhost_user_back_end_is_named(bare_qemu: BareQemu, place: Path) -> None:
    """A real one, which writes what it reads from its disk into the guest's memory."""
    if (daemon := shutil.which("qemu-storage-daemon")) is None:
        pytest.skip("qemu-storage-daemon is not installed (Debian: qemu-system-common)")
    (place / "disk").write_bytes(bytes(1 << 20))

    async def listening() -> bool:
        return (place / "vhost").exists()

    back_end = await asyncio.create_subprocess_exec(
        daemon, "--blockdev", f"file,filename={place}/disk,node-name=d",
        "--export", f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={place}/vhost",
    )  # fmt: skip
    try:
        await until("the back end listens", listening, START_S)
        qmp = await bare_qemu(
            *SHARED, "-chardev", f"socket,id=v,path={place}/vhost", "-device", "vhost-user-blk-pci,id=blk,chardev=v",
            machine=SHARED_MACHINE,
        )  # fmt: skip
        refused = {name: row for name, row in (await rows_of(qmp)).items() if row.verdict == "refused"}
        assert any("vhost-user-blk" in row.sentence for row in refused.values())
    finally:
        back_end.kill()
        await back_end.wait()


async def test_a_tracer_is_named(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    tracer = await python(
        "import sys; from migrated.kernel.ptrace import TracedThread; "
        "TracedThread(int(sys.argv[1])); print('ready', flush=True); sys.stdin.read()",
        str(qmp.pid),
    )
    row = (await rows_of(qmp))["tracer"]
    assert row.verdict == "refused"
    assert f"by process {tracer.pid}" in row.sentence
    await tracer.communicate(b"")
    assert (await rows_of(qmp))["tracer"].verdict == "ok"


async def test_a_device_that_cannot_migrate_is_refused_and_not_left_out(bare_qemu: BareQemu, place: Path) -> None:
    """QEMU's save of devices alone would pass it over in silence."""
    (place / "disk").write_bytes(bytes(1 << 20))
    drive = f"file={place}/disk,format=raw,if=none,id=d"
    qmp = await bare_qemu("-drive", drive, "-device", "ich9-ahci,id=a", "-device", "vmcoreinfo", "-device", "pvpanic",
                          "-device", "nvme,serial=s,drive=d")  # fmt: skip
    row = (await rows_of(qmp))["QEMU's own blockers"]
    assert row.verdict == "refused"
    assert "nvme" in row.sentence


@pytest.mark.parametrize(("cache", "fenced"), [("none", True), ("writeback", False)])
async def test_drives_past_the_page_tables_need_the_fence(
    bare_qemu: BareQemu, place: Path, cache: str, fenced: bool
) -> None:
    (place / "disk").write_bytes(bytes(1 << 20))
    drive = f"file={place}/disk,format=raw,if=none,id=d,cache={cache}"
    qmp = await bare_qemu("-drive", drive, "-device", "virtio-blk-pci,drive=d")
    assert drives_bypass_page_tables(await qmp.call("query-named-block-nodes")) is fenced
    assert ("past the page tables" in (await rows_of(qmp))["drives"].sentence) is fenced


async def test_locked_memory_is_tracked_and_said(bare_qemu: BareQemu) -> None:
    row = (await rows_of(await bare_qemu("-overcommit", "mem-lock=on")))["pinned memory"]
    assert row.verdict == "warning"
    assert "KiB of QEMU are locked" in row.sentence


async def test_a_balloon_and_a_missing_run_log_are_warnings(bare_qemu: BareQemu) -> None:
    rows = await rows_of(await bare_qemu("-device", "virtio-balloon-pci"))
    assert rows["balloon"].verdict == rows["run log"].verdict == "warning"
    assert "-trace vm_state_notify" in rows["run log"].sentence


async def test_virtio_mem_of_an_old_qemu_is_refused(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu(
        "-object", "memory-backend-ram,id=vm,size=64M,reserve=off", "-device", "virtio-mem-pci,memdev=vm,id=hot",
        memory="64M,maxmem=256M,slots=2",
    )  # fmt: skip
    row = (await rows_of(qmp)).get("virtio-mem")
    assert (row is not None and row.verdict == "refused") is (qmp.version < (8, 1, 0))


async def test_memory_that_cannot_be_found_is_refused(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    found = await find_ram(qmp)
    lost = RamBlock("0000:00:09.0/strange.ram", 1 << 20, "device")
    rows = await rows_of(qmp, Ram(found.carried, found.rebuilt, (lost,)))
    assert rows["memory 0000:00:09.0/strange.ram"].verdict == "refused"
    assert "would be lost" in (refusals(rows.values()) or "")


async def test_a_second_monitor_is_a_warning_while_somebody_holds_it(bare_qemu: BareQemu, place: Path) -> None:
    qmp = await bare_qemu("-qmp", f"unix:{place}/second,server=on,wait=off")
    assert (await rows_of(qmp))["monitors"].verdict == "ok"
    second = await Qmp.connect(place / "second")
    try:
        assert (await rows_of(qmp))["monitors"].verdict == "warning"
    finally:
        await second.close()


async def test_every_sentence_says_something(bare_qemu: BareQemu) -> None:
    rows = await check_guest(qmp := await bare_qemu(), await find_ram(qmp))
    assert all(len(row.sentence) > 10 and row.verdict in ("ok", "warning", "refused") for row in rows)
    assert os.getpid() != qmp.pid


def test_a_process_that_may_not_be_looked_into_is_not_taken_for_a_clean_one() -> None:
    """What cannot be seen is refused, with what it is."""
    ended = subprocess.Popen(["true"])
    ended.wait()  # its number is free, and nothing is to be seen of it
    rows = {row.name: row for row in check_process(ended.pid, Ram(()))}
    for name, what in (("device files", "files"), ("io_uring", "buffers"), ("pinned memory", "pinned")):
        assert rows[name].verdict == "refused"
        assert what in rows[name].sentence
