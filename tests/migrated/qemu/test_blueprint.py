"""What a machine is made of, compared between two QEMUs, and what a stranger may send as one."""

from __future__ import annotations

import zlib

import pytest

from migrated.base.errors import VmmError
from migrated.vmm.qemu.blueprint import Blueprint, draw, parse_devices
from migrated.vmm.qemu.ram import find_ram
from tests.migrated.qemu.conftest import BareQemu

TREE = """\
bus: main-system-bus
  type System
  dev: q35-pcihost, id ""
    bus: pcie.0
      type PCIE
      dev: virtio-net-pci, id "net0"
        disable-legacy = "off"
        addr = 02.0
        class Ethernet controller, addr 00:02.0, pci id 1af4:1000 (sub 1af4:0001)
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-net-device, id ""
            mac = "52:54:00:12:34:56"
            netdev = "n0"
"""


def test_devices_with_what_the_guest_sees_of_their_place() -> None:
    assert parse_devices(TREE) == [
        "q35-pcihost:",
        "virtio-net-pci: addr=02.0",
        'virtio-net-device: mac="52:54:00:12:34:56"',
    ]


async def test_equal_machines_are_equal_whatever_backs_their_memory_and_names_their_devices(
    bare_qemu: BareQemu,
) -> None:
    devices = ("-device", "VGA", "-device", "virtio-rng-pci")
    backend = ("-object", "memory-backend-memfd,id=mine,size=64M,share=on")
    one = await bare_qemu(*devices)
    devices = ("-device", "VGA,id=screen", "-device", "virtio-rng-pci,id=dice")
    other = await bare_qemu(*devices, *backend, "-incoming", "defer", "-S", machine="q35,accel=tcg,memory-backend=mine")
    mine, theirs = [await draw(qmp, "web", await find_ram(qmp)) for qmp in (one, other)]
    assert mine.differences(theirs) == []
    assert Blueprint.unpack(mine.pack()) == mine
    assert len(mine.pack()) < 4096


async def test_another_machine_is_told_apart(bare_qemu: BareQemu) -> None:
    one, other = await bare_qemu("-device", "VGA"), await bare_qemu("-smp", "2", machine="pc,accel=tcg", memory="128M")
    mine, theirs = [await draw(qmp, "web", await find_ram(qmp)) for qmp in (one, other)]
    found = mine.differences(theirs)
    assert any(phrase.startswith("machine is pc-q35") for phrase in found)
    assert "vcpus is 1 at the source and 2 here" in found
    assert "memory block only at the source: ram@0x0 67108864 main" in found
    assert "memory block only here: ram@0x0 134217728 main" in found
    assert any(phrase.startswith("device only at the source: VGA") for phrase in found)


async def test_a_processor_that_lacks_a_feature_is_told_apart(bare_qemu: BareQemu) -> None:
    """The same type on another host: what ``host`` or ``max`` stands for is what QEMU says of the processor."""
    qmp = await bare_qemu()
    mine = await draw(qmp, "web", await find_ram(qmp))
    word = "CPUID 0x1.0 ECX"
    assert mine.features[word]
    less = mine.model_copy(update={"features": {**mine.features, word: mine.features[word] & ~1}})
    assert mine.differences(less) == [f"the processor here lacks features of {word}: 0x1"]
    assert less.differences(mine) == []


async def test_a_guest_without_a_uuid_has_one_of_its_name(bare_qemu: BareQemu) -> None:
    qmp = await bare_qemu()
    ram = await find_ram(qmp)
    web, again, other = [(await draw(qmp, name, ram)).uuid for name in ("web", "web", "database")]
    assert web == again != other


@pytest.mark.parametrize(
    "data",
    [b"", b"no blueprint", zlib.compress(b"{}"), zlib.compress(bytes(100 << 20)), zlib.compress(b'{"qemu": 7}')],
)
def test_what_is_no_blueprint_is_refused(data: bytes) -> None:
    with pytest.raises(VmmError, match="carries no QEMU blueprint"):
        Blueprint.unpack(data)
