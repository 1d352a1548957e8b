"""A QEMU that was handed another one's memory refuses to run its guest: the memory is what it was.

kept private -> QEMU writes -> resume: its page goes into the file, cont fails -> QEMU ended -> the page is back
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migrated.base.errors import VmmError
from migrated.kernel import process_memory
from migrated.vmm.qemu.costs import SwitchoverCosts
from migrated.vmm.qemu.guest import QemuGuest
from migrated.vmm.qemu.handed_over import main_files
from migrated.vmm.qemu.places import Place
from migrated.vmm.qemu.qmp import Qmp, QmpCommandError
from migrated.vmm.qemu.ram import find_ram
from protocol.guest import PAGE_SIZE
from tests.migrated.qemu.conftest import BareQemu

OFFSET = 16 << 20
OURS = b"\x05" * PAGE_SIZE
THEIRS = b"\x07" * PAGE_SIZE


async def stopped_qemu(bare_qemu: BareQemu) -> Qmp:
    memory = ("-object", "memory-backend-memfd,id=mine,size=64M,share=on")
    return await bare_qemu("-S", *memory, machine="q35,accel=tcg,memory-backend=mine")


async def guest_of(qmp: Qmp, place: Path, **known: Any) -> QemuGuest:
    """The guest of a QEMU that nobody has let run."""
    record = Place(name="g1", started_here=True, incoming=True, **known)
    return QemuGuest(qmp, place / "0.qmp", record, await find_ram(qmp), 10.0, SwitchoverCosts(place / "costs.json"))


async def test_memory_is_what_it_was_when_qemu_refuses_to_run(
    bare_qemu: BareQemu, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmp = await stopped_qemu(bare_qemu)
    ram = await find_ram(qmp)
    (fd,) = main_files(qmp.pid, ram)
    os.pwrite(fd, OURS, OFFSET)
    guest = await guest_of(qmp, place)
    await guest.keep_memory_private()
    there = np.array([[ram.carried[0].address + OFFSET, PAGE_SIZE]], np.uint64)
    await asyncio.to_thread(process_memory.write, qmp.pid, there, np.frombuffer(THEIRS, np.uint8).copy())
    assert os.pread(fd, PAGE_SIZE, OFFSET) == OURS

    call = qmp.call

    async def refusing(command: str, *arguments: Any, **named: Any) -> Any:
        if command == "cont":
            raise QmpCommandError("a disk cannot be opened", "GenericError", "a disk cannot be opened")
        return await call(command, *arguments, **named)

    monkeypatch.setattr(qmp, "call", refusing)
    with pytest.raises(VmmError, match="a disk cannot be opened"):
        await guest.resume(1)
    assert os.pread(fd, PAGE_SIZE, OFFSET) == THEIRS, "a guest would have run with it"
    assert (await guest.status()).state == "incoming"
    await guest.destroy()
    assert os.pread(fd, PAGE_SIZE, OFFSET) == OURS
    os.close(fd)


async def test_a_guest_whose_memory_an_earlier_daemon_changed_is_none_that_never_ran(
    bare_qemu: BareQemu, place: Path
) -> None:
    """What was in the memory is known to nobody any more, so the source's guest must not go on."""
    qmp = await stopped_qemu(bare_qemu)
    assert (await (await guest_of(qmp, place)).status()).state == "incoming"
    assert (await (await guest_of(qmp, place, published=True)).status()).state == "paused"
