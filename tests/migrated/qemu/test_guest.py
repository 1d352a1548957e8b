"""A guest's description of itself, by a bare QEMU."""

from __future__ import annotations

import os
from pathlib import Path

from migrated.vmm.qemu.costs import SwitchoverCosts
from migrated.vmm.qemu.guest import QemuGuest
from migrated.vmm.qemu.places import Place
from migrated.vmm.qemu.ram import find_ram
from tests.migrated.qemu.conftest import BareQemu

MIB = 1 << 20


async def test_video_memory_counts_as_device_state_only_where_main_memory_is_handed_over(
    bare_qemu: BareQemu, place: Path
) -> None:
    """It travels as pages else, ahead of the stop: a guest with much of it can be moved within a small limit."""
    backend = ("-object", "memory-backend-memfd,id=mine,size=64M,share=on")
    qmp = await bare_qemu("-device", "VGA,vgamem_mb=64", *backend, machine="q35,accel=tcg,memory-backend=mine")
    at = Place(name="web", started_here=False)
    guest = QemuGuest(qmp, place / "0.qmp", at, await find_ram(qmp), 1.0, SwitchoverCosts(place / "costs.json"))
    copied = (await guest.describe()).devices[0].state_bytes
    assert copied < MIB
    files = await guest.memory_files()
    for fd in files:
        os.close(fd)
    assert files
    assert (await guest.describe()).devices[0].state_bytes > copied + 64 * MIB
