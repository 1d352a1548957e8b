"""The description of a guest on the wire: its identity, its memory map and its devices.

The source describes its guest before a byte of memory moves, so that the destination can build an equal,
empty guest or refuse with the name of what differs. Nothing here is specific to one kind of VMM; data that only the VMM
understands travels in ``vmm_config``, which the daemons pass on unread.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PAGE_SIZE: Final = 4096
MAX_MEMORY_BYTES: Final = 1 << 44
MAX_DEVICES: Final = 1024
MAX_DEVICE_STATE_BYTES: Final = 1 << 32
MAX_VMM_CONFIG_BYTES: Final = 32 << 10

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
GuestName = Annotated[str, Field(min_length=1, max_length=64, pattern=NAME_PATTERN)]
NonNegativeNs = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]


DeviceKind = Literal["iterable", "non-iterable"]
"""Iterable devices send state in rounds while the guest runs, and the rest at the stop; others send all of it then."""


class WireModel(BaseModel):
    """Base of all models that are sent to another process: frozen, strict types, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class MemoryRegion(WireModel):
    """One contiguous piece of guest memory.

    ``offset_pages`` is the region's place in the guest's page numbering: pages of all regions are numbered
    without gaps in the order of the regions, and every page number on the wire counts that way.
    ``guest_address`` is where the guest sees it (bytes).
    """

    name: Name
    guest_address: Annotated[int, Field(ge=0, lt=1 << 52)]
    size_bytes: Annotated[int, Field(gt=0, le=MAX_MEMORY_BYTES)]
    offset_pages: Annotated[int, Field(ge=0, lt=MAX_MEMORY_BYTES // PAGE_SIZE)]

    @property
    def pages(self) -> int:
        """Number of pages in the region."""
        return self.size_bytes // PAGE_SIZE


class DeviceDescription(WireModel):
    """One device whose state travels. A device that has both an iterable and a non-iterable part (as VFIO has)
    is listed once for each, under the same name.

    ``state_bytes`` is the usual size of its state; ``expected_save_ns`` and ``expected_load_ns`` are the durations of
    saving and loading it that the describing VMM expects on its own host (0 when it does not know).
    """

    name: Name
    kind: DeviceKind
    state_bytes: Annotated[int, Field(ge=0, le=MAX_DEVICE_STATE_BYTES)]
    expected_save_ns: NonNegativeNs = 0
    expected_load_ns: NonNegativeNs = 0


class GuestDescription(WireModel):
    """Everything the destination must know to build an equal guest, or to refuse.

    ``vmm`` names the driver that the guest needs. ``guest_time`` says whether the guest's time travels apart from its
    devices; if not, no TIME_ASK is sent. ``guest_freq`` is the guest's TSC frequency (Hz), 0 where the VMM does not
    say.
    """

    name: GuestName
    uuid: Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
    vmm: Name
    machine: Name
    page_size: Annotated[int, Field(gt=0, le=1 << 21)]
    memory: Annotated[tuple[MemoryRegion, ...], Field(min_length=1, max_length=64)]
    devices: Annotated[tuple[DeviceDescription, ...], Field(max_length=MAX_DEVICES)]
    vcpus: Annotated[int, Field(ge=1, le=4096)]
    guest_freq: Annotated[int, Field(ge=0, lt=1 << 64)]
    guest_time: bool
    expected_stop_ns: NonNegativeNs = 0
    expected_resume_ns: NonNegativeNs = 0
    vmm_config: Annotated[bytes, Field(max_length=MAX_VMM_CONFIG_BYTES)] = b""

    @model_validator(mode="after")
    def _regions_fit_together(self) -> GuestDescription:
        if self.page_size != PAGE_SIZE:
            raise ValueError(f"page size {self.page_size} is not supported: only {PAGE_SIZE} is")
        if self.guest_time and not self.guest_freq:
            raise ValueError("guest_freq must be known where guest_time says that the guest's time travels")
        expected = 0
        for region in self.memory:
            if region.size_bytes % PAGE_SIZE:
                raise ValueError(f"memory region {region.name!r} is not a whole number of pages")
            if region.offset_pages != expected:
                raise ValueError(
                    f"memory region {region.name!r} starts at page {region.offset_pages}, expected {expected}"
                )
            expected += region.pages
        if expected * PAGE_SIZE > MAX_MEMORY_BYTES:
            raise ValueError(f"guest memory is larger than {MAX_MEMORY_BYTES} bytes")
        keys = [(device.name, device.kind) for device in self.devices]
        if len(set(keys)) != len(keys):
            raise ValueError("a device is listed twice with the same name and kind")
        return self

    @property
    def pages(self) -> int:
        """Number of guest pages over all regions."""
        return sum(region.pages for region in self.memory)

    @property
    def memory_bytes(self) -> int:
        """Guest memory in bytes over all regions."""
        return self.pages * PAGE_SIZE

    def differences(self, other: GuestDescription) -> list[str]:
        """Return the differences that make ``other`` unfit for this guest's state, one phrase each; empty when there is
        none."""
        found: list[str] = []
        for field in ("uuid", "vmm", "machine", "page_size", "vcpus", "guest_freq", "guest_time"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                found.append(f"{field} is {mine} here and {theirs} there")
        if self.memory != other.memory:
            found.append(
                f"the memory map has {len(self.memory)} regions with {self.memory_bytes} bytes here "
                f"and {len(other.memory)} regions with {other.memory_bytes} bytes there"
            )
        mine_devices = {(d.name, d.kind) for d in self.devices}
        their_devices = {(d.name, d.kind) for d in other.devices}
        found.extend(f"device {name} ({kind}) exists only here" for name, kind in sorted(mine_devices - their_devices))
        found.extend(f"device {name} ({kind}) exists only there" for name, kind in sorted(their_devices - mine_devices))
        return found
