"""Where guest memory is: what QEMU lists, against QEMUs of every kind, and texts of versions that are not here."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from migrated.base.errors import VmmError
from migrated.kernel import process_memory
from migrated.kernel.privileges import keep_only
from migrated.vmm.memory import WORDS_PER_PAGE, FileRegion
from migrated.vmm.qemu.access import open_mapped, open_memory
from migrated.vmm.qemu.qmp import Qmp
from migrated.vmm.qemu.ram import (
    Mapping,
    Ram,
    RamBlock,
    are_apart,
    arrange,
    by_size,
    find_ram,
    parse_blocks,
    parse_view,
    read_maps,
    seen_of,
)
from migrated.vmm.qemu.ram import (
    place as put,
)
from tests.migrated.qemu.conftest import BareQemu

MIB = 1 << 20


def carried(ram: Ram) -> dict[str, tuple[int, str, bool]]:
    return {one.block.label: (one.block.size, one.block.backing, one.block.shared) for one in ram.carried}


async def test_private_memory_video_memory_and_firmware(bare_qemu: BareQemu) -> None:
    ram = await find_ram(await bare_qemu("-device", "VGA", "-device", "virtio-rng-pci"))
    assert not ram.lost
    assert carried(ram) == {
        "ram@0x0": (64 * MIB, "private", False),
        "0000:00:01.0/vga.vram": (16 * MIB, "private", False),
        "pc.bios": (256 << 10, "private", False),
    }
    assert [one.first_page for one in ram.carried] == [0, 16384, 20480]
    assert {block.role for block in ram.rebuilt} == {"rebuilt"}


async def test_an_incoming_qemu_has_the_same_pages(bare_qemu: BareQemu) -> None:
    arguments = ("-device", "VGA")
    here, there = await bare_qemu(*arguments), await bare_qemu(*arguments, "-incoming", "defer", "-S")
    assert carried(await find_ram(here)) == carried(await find_ram(there))


async def test_an_incoming_qemu_has_firmware_of_its_own_until_its_memory_is_cleared(
    bare_qemu: BareQemu, place: Path
) -> None:
    """Where the source's has a page of zeros, none is sent: what stands there would stay."""
    (place / "flash").write_bytes(b"other" * (1 << 18))
    os.truncate(place / "flash", 1 << 20)
    flash = f"if=pflash,format=raw,readonly=on,file={place}/flash"
    qmp = await bare_qemu("-drive", flash, "-incoming", "defer", "-S")
    ram = await find_ram(qmp)
    memory = open_memory("g1", qmp.pid, ram)
    whole = np.empty((ram.pages, WORDS_PER_PAGE), np.uint64)
    memory.read(np.arange(ram.pages), whole)
    assert whole.any()
    memory.make_zero()
    memory.read(np.arange(ram.pages), whole)
    assert not whole.any()
    memory.release()


@pytest.mark.parametrize("kind", ["file", "memfd"])
async def test_shared_memory(bare_qemu: BareQemu, place: Path, kind: str) -> None:
    path = f",mem-path={place}/ram" if kind == "file" else ""
    backend = f"memory-backend-{kind},id=mine,size=64M,share=on{path}"
    ram = await find_ram(await bare_qemu("-object", backend, machine="pc,accel=tcg,memory-backend=mine"))
    assert carried(ram)["ram@0x0"] == (64 * MIB, kind, True)


@pytest.mark.parametrize("named", [True, False])
def test_shared_memory_can_be_opened_without_privileges(tmp_path: Path, named: bool) -> None:
    """QEMU's own user reaches the file through QEMU's descriptor of it: opening a mapping takes a capability."""
    fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT) if named else os.memfd_create("ram")
    os.truncate(fd, 2 * MIB)
    with mmap.mmap(fd, MIB, offset=MIB) as memory:
        address = np.frombuffer(memory, np.uint8).ctypes.data
        if named:
            (tmp_path / "ram").unlink()
        block = put(RamBlock("mine", MIB, "main"), address, read_maps(os.getpid()))
        found: list[FileRegion] = []

        def open_it() -> None:
            keep_only(())  # of this thread
            found.extend(open_mapped(os.getpid(), arrange([block]).carried))

        thread = threading.Thread(target=open_it)
        thread.start()
        thread.join()
        os.close(fd)
        (region,) = found
        os.pwrite(region.fd, b"seen", region.offset)
        os.close(region.fd)
        assert memory[:4] == b"seen"


async def test_numa_backends_of_different_kinds(bare_qemu: BareQemu) -> None:
    ram = await find_ram(
        await bare_qemu(
            "-object", "memory-backend-ram,id=n0,size=32M", "-object", "memory-backend-memfd,id=n1,size=32M,share=on",
            "-numa", "node,memdev=n0", "-numa", "node,memdev=n1",
        )
    )  # fmt: skip
    assert carried(ram)["ram@0x0"] == (32 * MIB, "private", False)
    assert carried(ram)["ram@0x2000000"] == (32 * MIB, "memfd", True)


async def test_four_gibibytes_around_the_pci_hole_are_one_block(bare_qemu: BareQemu) -> None:
    ram = await find_ram(await bare_qemu(memory="4G"))
    block = ram.carried[0].block
    assert block.size == 4096 * MIB
    assert block.seen[0].guest_address == 0
    above = [seen for seen in block.seen if seen.guest_address >= 1 << 32]
    assert above
    assert above[0].offset + sum(seen.size for seen in above) == block.size


async def test_what_is_found_is_the_guests_memory(bare_qemu: BareQemu) -> None:
    """Firmware begins its last 16 bytes with a jump: read through the address that was found."""
    qmp = await bare_qemu()
    firmware = next(one for one in (await find_ram(qmp)).carried if one.block.role == "firmware")
    into = np.zeros(16, np.uint8)
    process_memory.read(qmp.pid, np.array([[firmware.address + firmware.block.size - 16, 16]], np.uint64), into)
    assert into[0] == 0xEA


class ChangingView:
    """A monitor of a guest whose firmware shadows itself below 1 MiB between two questions, ``changes`` times. Its
    process is this one, with 64 MiB of RAM and 256 KiB of firmware."""

    def __init__(self, changes: int) -> None:
        self.pid = os.getpid()
        self.changes = changes
        self.ram, self.firmware = mmap.mmap(-1, 64 * MIB), mmap.mmap(-1, 256 << 10)
        self.asked = 0

    async def call(self, _command: str) -> list[dict[str, str]]:
        return [{"id": "pc.ram"}]

    async def human(self, command: str) -> str:
        match command.split():
            case ["info", "ramblock"]:
                return "  pc.ram  4 KiB  0x0 0x0 0x4000000\n  pc.bios  4 KiB  0x0 0x0 0x40000"
            case ["info", "mtree", "-f"]:
                self.asked += 1
                below = "pc.ram @00000000000e0000" if self.asked % 2 == 0 and self.changes else "pc.bios"
                self.changes -= self.asked % 2 == 0 and self.changes > 0
                return f"""FlatView #0
 AS "memory", root: system
  0000000000000000-00000000000dffff (prio 0, ram): pc.ram
  00000000000e0000-00000000000fffff (prio 1, rom): {below}
  0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000"""
            case ["gpa2hva", where]:
                at = int(where, 16)
                shadowed = not 0xE0000 <= at < 0x100000 or self.changes
                return f"it is {address_of(self.ram) + at if shadowed else address_of(self.firmware):#x}"
        raise AssertionError(command)


def address_of(memory: mmap.mmap) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


async def test_memory_that_the_guest_rearranges_meanwhile_is_looked_at_again() -> None:
    """Firmware was found inside of main memory, where it shadows itself: other bytes than its own would travel."""
    monitor = ChangingView(changes=1)
    found = {one.block.name: one.address for one in (await find_ram(cast("Qmp", monitor))).carried}
    assert found == {"pc.ram": address_of(monitor.ram), "pc.bios": address_of(monitor.firmware)}


async def test_a_guest_that_never_stands_still_is_refused() -> None:
    with pytest.raises(VmmError, match="changes all the while which memory it sees where"):
        await find_ram(cast("Qmp", ChangingView(changes=1000)))


def test_blocks_that_overlap_are_not_apart() -> None:
    main = RamBlock("pc.ram", 64 * MIB, "main", address=0x10000000)
    inside = RamBlock("pc.bios", 256 << 10, "firmware", address=0x100C0000)
    assert not are_apart([inside, main])
    assert are_apart([main, replace(inside, address=0x10000000 + 64 * MIB), replace(inside, address=None)])


def test_newer_qemus_tell_the_address() -> None:
    text = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007fc0d7e00000  rw
   0000:00:01.0/vga.vram    2 MiB  0x0000000010080000 0x0000000001000000 0x0000000001000000 0x00007fc0d6a00000  rw
"""
    assert parse_blocks(text) == [
        ("pc.ram", 0x10000000, 0x7FC0D7E00000),
        ("0000:00:01.0/vga.vram", 0x1000000, 0x7FC0D6A00000),
    ]
    with pytest.raises(VmmError, match="lists no blocks"):
        parse_blocks("unknown command: 'info ramblock'")


def test_only_the_view_of_the_cpus_counts() -> None:
    text = """\
FlatView #0
 AS "I/O", root: io
  0000000000000000-0000000000000007 (prio 0, ram): other

FlatView #1
 AS "memory", root: system
 Root memory region: system
  0000000100000000-000000017fffffff (prio 0, ram): pc.ram @0000000080000000 KVM
  0000000000000000-000000007fffffff (prio 0, ram): pc.ram KVM
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
"""
    view = parse_view(text)
    names = ["pc.ram", "0000:00:01.0/vga.vram", "0000:00:02.0/vga.vram"]
    assert [seen.guest_address for seen in seen_of("pc.ram", names, view)] == [0, 1 << 32]
    assert seen_of("pc.ram", names, view)[1].offset == 0x80000000
    # Two cards with memory of the same name cannot be told apart here.
    assert seen_of("0000:00:01.0/vga.vram", names, view) == ()
    assert len(seen_of("0000:00:01.0/vga.vram", names[:2], view)) == 1


def guarded(begin: int, size: int) -> list[Mapping]:
    anonymous = ("00:00", 0, "")
    return [
        Mapping(begin, begin + size, "rw-p", 0, *anonymous),
        Mapping(begin + size, begin + size + 4096, "---p", 0, *anonymous),
    ]


def test_an_unseen_block_is_found_by_its_size_only_where_that_is_certain() -> None:
    video = RamBlock("vga.vram", 16 * MIB, "device")
    one = guarded(0x7F0000000000, 16 * MIB)
    two = guarded(0x7F1000000000, 16 * MIB)
    assert by_size([video], one)[0].address == 0x7F0000000000
    assert by_size([video], one + two)[0].address is None
    other = RamBlock("other.vram", 16 * MIB, "device")
    assert [block.address for block in by_size([video, other], one)] == [None, None]
    assert by_size([video], guarded(0x7F0000000000, 8 * MIB))[0].address is None
    assert arrange(by_size([video, other], one)).lost == (other, video)


def test_a_block_is_put_only_where_all_of_it_is_mapped_as_one_thing() -> None:
    block = RamBlock("pc.ram", 8192, "main")
    first = Mapping(0x1000, 0x2000, "rw-s", 0, "fd:00", 7, "/ram")
    same = [first, Mapping(0x2000, 0x3000, "rw-s", 4096, "fd:00", 7, "/ram")]
    assert put(block, 0x1000, same).address == 0x1000
    assert put(block, 0x2000, same).address is None
    other = [first, same[1]._replace(inode=8)]
    assert put(block, 0x1000, other).address is None
    assert put(block, None, same).address is None


async def test_memory_of_a_process_that_ended(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    os.kill(qmp.pid, 9)
    with pytest.raises(VmmError):
        await find_ram(qmp)
