"""The parts of a guest's machine, as QEMU itself tells them: the form in which the source's guest and the destination's
are compared. No path, no argument, nothing of the host is in it; nothing of it is ever carried out.
"""

from __future__ import annotations

import re
import uuid
import zlib
from typing import Annotated, Final

from pydantic import Field, ValidationError

from migrated.base.errors import VmmError
from migrated.vmm.qemu.qmp import Qmp, QmpCommandError
from migrated.vmm.qemu.ram import Ram
from protocol.guest import GuestDescription, WireModel

_DEVICE: Final = re.compile(r'^ *dev: (?P<type>[^,]+), id "')
_PROPERTY: Final = re.compile(
    r"^\s+(?P<name>addr|mac|unit-address|lun|scsi-id|serial|num-queues|queues|vectors) = (?P<value>.*)$"
)
_NAMESPACE: Final = uuid.UUID("8a9fc5fe-1d0f-4f3c-9a55-4c4e0d3a7f0e")
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
_MOST_BYTES: Final = 1 << 20

Text = Annotated[str, Field(max_length=512)]


class Blueprint(WireModel):
    """The machine.

    Attributes:
        qemu: version of QEMU; another one may take the guest over.
        machine, cpu: their types, versioned as QEMU does.
        accelerator: ``kvm`` or ``tcg``.
        features: of the guest's processor: the bits of each word, by "CPUID leaf.subleaf register". A type such
            as ``host`` stands for other features on another host, and a guest that runs goes on using what it found.
            None in what daemons before this described.
        blocks: every block of memory, "name size role", those too that do not travel.
        devices: every device, "type: properties", in QEMU's order. Not its id: that is a name of the host's, the guest
            never sees it, and QEMU's state goes by the place on the bus.
    """

    qemu: Text
    machine: Text
    cpu: Text
    accelerator: Text
    features: dict[Text, Annotated[int, Field(ge=0, lt=1 << 64)]] = Field(default_factory=dict, max_length=256)
    vcpus: Annotated[int, Field(ge=1, le=4096)]
    uuid: Text
    blocks: tuple[Text, ...]
    devices: tuple[Text, ...]

    def pack(self) -> bytes:
        """The bytes that travel in a guest's description."""
        return zlib.compress(self.model_dump_json().encode())

    @classmethod
    def unpack(cls, data: bytes) -> Blueprint:
        """The blueprint in a description.

        Raises:
            VmmError: it is none.
        """
        try:
            text = zlib.decompressobj()
            return cls.model_validate_json(text.decompress(data, _MOST_BYTES))
        except (zlib.error, ValidationError) as error:
            raise VmmError(f"the description of the guest carries no QEMU blueprint: {error}") from error

    def differences(self, other: Blueprint) -> list[str]:
        """Return the differences of ``other`` from this machine, one phrase each. A processor there may have further
        features: a guest that runs does not look again."""
        found = [
            f"{field} is {getattr(self, field)} at the source and {getattr(other, field)} here"
            for field in ("machine", "cpu", "accelerator", "vcpus", "uuid")
            if getattr(self, field) != getattr(other, field)
        ]
        found += [
            f"the processor here lacks features of {word}: {lacking:#x}"
            for word, bits in self.features.items()
            if (lacking := bits & ~other.features.get(word, 0))
        ]
        for what, mine, theirs in (
            ("memory block", self.blocks, other.blocks),
            ("device", self.devices, other.devices),
        ):
            found += [f"{what} only at the source: {item}" for item in _without(mine, theirs)]
            found += [f"{what} only here: {item}" for item in _without(theirs, mine)]
        return found


def unfit(source: GuestDescription, here: GuestDescription) -> list[str]:
    """Return the differences that make the guest here unfit for the state of the source's guest, one phrase each.

    Raises:
        VmmError: one of them is no QEMU guest's.
    """
    theirs, ours = Blueprint.unpack(source.vmm_config), Blueprint.unpack(here.vmm_config)
    return theirs.differences(ours) or source.differences(here)


def _without(items: tuple[str, ...], others: tuple[str, ...]) -> list[str]:
    left = list(others)
    missing = []
    for item in items:
        if item in left:
            left.remove(item)
        else:
            missing.append(item)
    return missing


async def draw(qmp: Qmp, name: str, ram: Ram) -> Blueprint:
    """The blueprint of a guest.

    Args:
        name: of the guest; its uuid is derived from it where QEMU was started without one.
    """
    cpus = await qmp.call("query-cpus-fast")
    machine = await qmp.call("qom-get", path="/machine", property="type")
    first_cpu = cpus[0]["qom-path"]
    cpu = await qmp.call("qom-get", path=first_cpu, property="type")
    kvm = await qmp.call("query-kvm")
    own_uuid = (await qmp.call("query-uuid"))["UUID"]
    blocks = [carried.block for carried in ram.carried] + [*ram.rebuilt, *ram.lost]
    return Blueprint(
        qemu=".".join(str(part) for part in qmp.version),
        machine=str(machine).removesuffix("-machine"),
        cpu=str(cpu),
        accelerator="kvm" if kvm["enabled"] else "tcg",
        features=await _features(qmp, first_cpu),
        vcpus=len(cpus),
        uuid=str(uuid.uuid5(_NAMESPACE, name)) if own_uuid == _NO_UUID else own_uuid,
        blocks=tuple(sorted(f"{block.label} {block.size} {block.role}" for block in blocks)),
        devices=tuple(parse_devices(await qmp.human("info qtree"))),
    )


async def _features(qmp: Qmp, cpu: str) -> dict[str, int]:
    """The features of a processor, none where its architecture has no such words."""
    try:
        words = await qmp.call("qom-get", path=cpu, property="feature-words")
    except QmpCommandError:
        return {}
    return {
        f"CPUID {word['cpuid-input-eax']:#x}.{word.get('cpuid-input-ecx', 0)} {word['cpuid-register']}": word[
            "features"
        ]
        for word in words
        if word["features"]
    }


def parse_devices(text: str) -> list[str]:
    """The devices in what ``info qtree`` answers, with the properties that decide where the guest sees them."""
    devices: list[str] = []
    for line in text.splitlines():
        if (match := _DEVICE.match(line)) is not None:
            devices.append(f"{match['type']}:")
        elif devices and (match := _PROPERTY.match(line)) is not None:
            devices[-1] += f" {match['name']}={match['value'].strip()}"
    return devices
