"""What a host has for QEMU guests, in the words in which a guest says what it needs."""

from __future__ import annotations

from pathlib import Path

from migrated.vmm.qemu.costs import SwitchoverCosts
from migrated.vmm.qemu.guest import QemuGuest
from migrated.vmm.qemu.offers import offers, words
from migrated.vmm.qemu.places import Place
from tests.migrated.qemu.conftest import BareQemu


async def test_a_guest_needs_nothing_that_its_own_host_does_not_have(bare_qemu: BareQemu, place: Path) -> None:
    qmp = await bare_qemu("-S")
    await qmp.close()  # a monitor takes one client
    guest = await QemuGuest.attach(qmp.path, Place(name="g", started_here=False), SwitchoverCosts(place / "costs.json"))
    try:
        needs = await guest.needs()
    finally:
        await guest.close()
    assert len(needs) == 1, "a machine, and no KVM"
    assert needs <= await offers(("qemu-system-x86_64",))


async def test_a_qemu_that_is_not_there_has_no_machines() -> None:
    assert await offers(("/nonexistent/qemu",)) <= words([], kvm=True)
    assert await offers(("/bin/false",)) <= words([], kvm=True)
