"""What the daemons need of a VMM, whatever its kind.

``Vmm`` is a guest that hands over its memory and its devices one by one, as vmm_sim does and a KVM-based VMM would.
A VMM that only offers an opaque stream (stock QEMU over QMP) will share ``describe``, ``status``, ``pause``,
``resume`` and ``destroy`` and replace the rest; the stories in ``source`` and ``destination`` reach guest state only
through the objects named here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Literal

from migrated.vmm.dirty_log import DirtyLog
from migrated.vmm.memory import GuestMemory
from protocol.guest import GuestDescription
from protocol.guest_time import VmTimeData
from protocol.messages import DeviceCost

DeviceKind = Literal["iterable", "non-iterable"]
_DRY_RUNS: Final = 15

GuestState = Literal["running", "paused", "incoming"]
DirtyTracking = Literal["auto", "pagemap-scan", "logged"]


@dataclass(frozen=True, slots=True)
class VmmStatus:
    """What a VMM says of itself. ``detail`` holds everything else, for people."""

    state: GuestState
    pid: int
    epoch: int
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SavedDevice:
    """One saved device state. ``ns`` is what saving cost in the VMM; ``remaining_bytes`` what an iterable device
    would still have to send."""

    state: bytes | bytearray | memoryview
    ns: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The final state of one device, to be loaded."""

    name: str
    kind: DeviceKind
    data: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a switchover would cost in this VMM now: per device, and to stop or resume the guest (ns).

    ``call_ns`` is what the longest of the calls took that told it: a call that resumes the guest costs as much on top.
    """

    devices: tuple[DeviceCost, ...]
    pause_ns: int
    resume_ns: int
    call_ns: int = 0


@dataclass(frozen=True, slots=True)
class TimeImport:
    """What importing time data cost: time since the snapshot as the VMM measured it, and the ticks it added."""

    vmm_ns: int
    vmm_ticks: int


class Vmm(ABC):
    """One guest. Every call has a bound in time and raises ``VmmError``, or ``VmmGoneError`` when nothing answers."""

    name: str
    pid: int

    @abstractmethod
    async def describe(self) -> GuestDescription:
        """The guest as it would be described to a destination."""

    @abstractmethod
    async def status(self) -> VmmStatus:
        """State and figures of the guest."""

    @abstractmethod
    async def memory(self) -> GuestMemory:
        """A mapping of the guest's memory, owned by the caller."""

    @abstractmethod
    async def start_dirty_log(self, mode: DirtyTracking) -> DirtyLog:
        """Begin to track writes. The log starts empty or full: the first collect tells what it knows."""

    @abstractmethod
    async def stop_dirty_log(self) -> None:
        """End tracking; without effect when it is off."""

    @abstractmethod
    async def pause(self) -> int:
        """Stop the vCPUs at an instruction boundary. Returns what it cost (ns)."""

    @abstractmethod
    async def resume(self, epoch: int) -> int:
        """Run the vCPUs; ends a running save. Returns when they ran (CLOCK_MONOTONIC, ns), by the VMM's own stamp: a
        daemon that was held up afterwards must not count that as downtime."""

    @abstractmethod
    async def take_lock(self) -> None:
        """Take the guest's ownership lock, which resuming needs; without effect when held, or when there is none."""

    @abstractmethod
    async def release_lock(self) -> None:
        """Let go of the ownership lock of a stopped guest."""

    @abstractmethod
    async def interrupt(self) -> None:
        """End running saves and loads: their calls raise ``VmmError``."""

    @abstractmethod
    async def export_time(self) -> VmTimeData:
        """The guest's time now. The guest is paused."""

    @abstractmethod
    async def import_time(self, time: VmTimeData, error_ns: int) -> TimeImport:
        """Give an incoming guest its time, known to within ``error_ns``. Before any final device state."""

    @abstractmethod
    async def save_device(self, name: str, kind: DeviceKind, round_number: int | None) -> SavedDevice:
        """Save a device: what an iterable one has new in a round, or (``None``) its final state."""

    async def save_devices(self, devices: Sequence[tuple[str, DeviceKind]]) -> list[SavedDevice]:
        """Save the final states of several devices in order; a driver may do it in one call."""
        return [await self.save_device(name, kind, None) for name, kind in devices]

    async def load_devices(self, states: Sequence[DeviceState]) -> list[int]:
        """Load the final states of several devices in order. Returns what each cost (ns)."""
        return [await self.load_device(state.name, state.kind, state.data, True) for state in states]

    @abstractmethod
    async def load_device(self, name: str, kind: DeviceKind, state: bytes | bytearray | memoryview, final: bool) -> int:
        """Load a device state into an incoming guest. Returns what it cost (ns)."""

    @abstractmethod
    async def dry_run(self, side: Literal["save", "load"]) -> DryRun:
        """What a switchover would cost here, without disturbing the guest."""

    async def typical_dry_run(self, side: Literal["save", "load"]) -> DryRun:
        """The median of a few dry runs, per device and for stop and resume: one odd run must not decide."""
        runs: list[DryRun] = []
        call_ns = 0
        for _ in range(_DRY_RUNS):
            begin_ns = time.monotonic_ns()
            runs.append(await self.dry_run(side))
            call_ns = max(call_ns, time.monotonic_ns() - begin_ns)
        devices = tuple(
            DeviceCost(name=costs[0].name, kind=costs[0].kind, ns=int(median(cost.ns for cost in costs)))
            for costs in zip(*(run.devices for run in runs), strict=True)
        )
        return DryRun(
            devices=devices,
            pause_ns=int(median(run.pause_ns for run in runs)),
            resume_ns=int(median(run.resume_ns for run in runs)),
            call_ns=call_ns,
        )

    @abstractmethod
    async def throttle(self, percent: int) -> None:
        """Make the vCPUs run that much less (0 to 99)."""

    @abstractmethod
    async def verify(self) -> dict[str, Any]:
        """Compare every byte of guest memory with what it must be."""

    @abstractmethod
    async def set_dirty_rate(self, bytes_per_s: int) -> None:
        """Change how fast the guest's workload writes."""

    @abstractmethod
    async def destroy(self) -> None:
        """End the guest and make sure that its process is gone."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the VMM without touching the guest."""
