"""One simulated guest behind the seam.

Devices are saved and loaded one by one, so that each state travels while the next is saved; those that cost less than
a call are asked for together.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from migrated.base.errors import VmmError
from migrated.kernel.scheduling import Precedence, threads_of
from migrated.vmm import spawn
from migrated.vmm.dirty_log import ByteMapLog, DirtyLog, PagemapScanLog
from migrated.vmm.memory import FileRegion, GuestMemory, MappedMemory, Span
from migrated.vmm.seam import (
    DirtyTracking,
    ExpectedCosts,
    GuestStatus,
    GuestTime,
    Iterations,
    ObservedGap,
    OwnershipLock,
    PauseTime,
    Side,
    StateBounds,
    StatePart,
    Throttle,
    TimeImport,
    VmmGuest,
)
from migrated.vmm.sim.calls import PAUSE_S, STATE_S, VERIFY_S, Calls
from protocol.guest import PAGE_SIZE, DeviceKind, GuestDescription
from protocol.guest_time import VmTimeData
from protocol.messages import DeviceCost

_CHEAP_NS: Final = 300_000
"""A device that is expected to cost less is asked for together with its neighbours: the call would cost more."""
_DRY_RUNS: Final = 15
_CALLS_TRIED: Final = 5
_MOST_TRIED_BYTES: Final = 4 << 20
"""States beyond this size are tried with so many bytes; the rest is expected to take as long for each byte."""
GONE_S: Final = 10.0
"""How long a killed process may take to go."""

One = TypeVar("One")


class _Time(GuestTime):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def export_time(self) -> VmTimeData:
        return _time_in((await self._calls.call("time-export")).meta)

    async def import_time(self, time: VmTimeData, error_ns: int) -> TimeImport:
        meta = (await self._calls.call("time-import", time=time.model_dump(), error_ns=error_ns)).meta
        return TimeImport(vmm_ns=meta["vmm_ns"], vmm_ticks=meta["vmm_ticks"])


class _Iterations(Iterations):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def save_iteration(self, name: str, number: int) -> StatePart:
        reply = await self._calls.call("device-save", STATE_S, name=name, kind="iterable", round=number)
        return StatePart(name, "iterable", reply.payload, reply.meta["ns"])

    async def load_iteration(self, part: StatePart) -> int:
        reply = await self._calls.call("device-load", STATE_S, part.data, name=part.name, kind=part.kind, final=False)
        return int(reply.meta["ns"])


class _Throttle(Throttle):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def set_throttle(self, percent: int) -> None:
        await self._calls.call("throttle", percent=percent)


class _Lock(OwnershipLock):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def take(self) -> None:
        await self._calls.call("lock", **({} if self.token is None else {"token": self.token}))

    async def carry(self) -> None:
        if self.token is not None:
            await self._calls.call("fence", token=self.token)

    async def release(self) -> None:
        await self._calls.call("unlock")


class SimGuest(VmmGuest):
    """A connected simulated guest.

    Args:
        calls: the connection, owned from here on.
        api_socket: where the VMM listens.
        locked: whether this host keeps ownership locks.
    """

    driver = "sim"
    dirty_tracking = frozenset({"pagemap-scan", "logged"})

    def __init__(self, calls: Calls, api_socket: Path, *, locked: bool) -> None:
        self.name = calls.name
        self.pid = calls.pid
        self.api_socket = api_socket
        self.time = _Time(calls)
        self.iterations = _Iterations(calls)
        self.throttle = _Throttle(calls)
        self.lock = _Lock(calls) if locked else None
        self._calls = calls
        self._description: GuestDescription | None = None
        self._largest_bytes: list[int] = []
        """Size that no state of a device exceeds, for each device of the description; empty where the VMM does not
        tell."""
        self._costs_ns: dict[tuple[str, str], int] = {}
        """Expected duration of saving, or of loading, each device (ns), by name and kind; of the direction that was
        asked for last."""

    async def describe(self) -> GuestDescription:
        reply = await self._calls.call("describe")
        try:
            self._description = GuestDescription.model_validate(reply.meta["description"])
            self._largest_bytes = [int(size) for size in reply.meta.get("largest_bytes", ())]
        except (KeyError, ValueError, TypeError) as error:
            raise VmmError(f"the VMM of guest {self.name} describes it in a way we cannot use: {error}") from error
        return self._description

    def state_bounds(self, description: GuestDescription) -> StateBounds:
        if len(self._largest_bytes) != len(description.devices):
            return super().state_bounds(description)
        devices = [(device.name, device.kind) for device in description.devices]
        return StateBounds(dict(zip(devices, self._largest_bytes, strict=True)), sum(self._largest_bytes))

    async def status(self) -> GuestStatus:
        meta = (await self._calls.call("status")).meta
        gap = meta.get("stop_gap")
        try:
            return GuestStatus(
                state=meta["state"],
                pid=meta["pid"],
                epoch=meta["epoch"],
                detail=dict(meta),
                observed_gap=ObservedGap(gap["guest_ns"], gap["host_ns"]) if gap else None,
            )
        except (LookupError, TypeError) as error:
            raise VmmError(f"the VMM of guest {self.name} gives a status that we cannot use: {error!r}") from error

    async def memory(self) -> GuestMemory:
        reply = await self._calls.call("memory")
        return MappedMemory([FileRegion(reply.fds[0], reply.meta["bytes"] // PAGE_SIZE)])

    async def memory_files(self) -> Sequence[int]:
        return (await self._calls.call("memory")).fds

    async def start_dirty_log(self, mode: DirtyTracking) -> DirtyLog:
        reply = await self._calls.call("dirty-log-start", mode=mode, present_only=True)
        pages = reply.meta["bytes"] // PAGE_SIZE
        if reply.meta["mode"] == "pagemap-scan":
            present_only = bool(reply.meta.get("present_only", False))
            return PagemapScanLog(reply.fds[0], [Span(reply.meta["address"], pages, 0)], present_only)
        return ByteMapLog(reply.fds[0], pages)

    async def stop_dirty_log(self) -> None:
        await self._calls.call("dirty-log-stop")

    async def pause(self) -> PauseTime:
        meta = (await self._calls.call("pause", PAUSE_S)).meta
        return PauseTime(int(meta["ns"]), guest_time=_time_in(meta))

    async def resume(self, epoch: int) -> int:
        return int((await self._calls.call("resume", PAUSE_S, epoch=epoch)).meta["running_at_ns"])

    async def interrupt(self) -> None:
        await self._calls.call("interrupt")

    async def state_out(self, kind: DeviceKind) -> AsyncIterator[Sequence[StatePart]]:
        description = self._description or await self.describe()
        devices = [(device.name, device.kind) for device in description.devices if device.kind == kind]
        for group in _grouped(devices, [self._costs_ns.get(device, 0) for device in devices]):
            wanted = [(name, device_kind, 0) for name, device_kind in group]
            reply = await self._calls.call("devices-save", STATE_S, devices=wanted)
            view, offset = memoryview(reply.payload), 0
            parts: list[StatePart] = []
            for (name, device_kind), meta in zip(group, reply.meta["saved"], strict=True):
                state = view[offset : offset + meta["bytes"]]
                parts.append(StatePart(name, device_kind, state, meta["ns"]))
                offset += meta["bytes"]
            yield parts

    async def state_in(self, parts: Sequence[StatePart]) -> Sequence[int]:
        costs: list[int] = []
        for group in _grouped(parts, [self._costs_ns.get((part.name, part.kind), 0) for part in parts]):
            described = [(part.name, part.kind, len(part.data)) for part in group]
            payload = b"".join(part.data for part in group)
            reply = await self._calls.call("devices-load", STATE_S, payload, devices=described)
            costs += [int(meta["ns"]) for meta in reply.meta["loaded"]]
        return costs

    async def expected_costs(self, side: Side) -> ExpectedCosts:
        """The median of a few rehearsals, for each device and for stop and resume: one odd run must not decide. A
        device's cost includes the call in which its state is handed over, tried with as many bytes."""
        runs: list[dict[str, Any]] = []
        call_ns = 0
        for _ in range(_DRY_RUNS):
            begin_ns = time.monotonic_ns()
            runs.append((await self._calls.call("dry-run", side=side)).meta)
            call_ns = max(call_ns, time.monotonic_ns() - begin_ns)
        devices = tuple(
            DeviceCost(name=rows[0]["name"], kind=rows[0]["kind"], ns=ns, spread_ns=spread_ns)
            for rows in zip(*(run["devices"] for run in runs), strict=True)
            for ns, spread_ns in [_typical([row["ns"] for row in rows])]
        )
        pause_ns, pause_spread_ns = _typical([run["pause_ns"] for run in runs])
        self._costs_ns = {(cost.name, cost.kind): cost.ns for cost in devices}
        calls = await self._try_calls(side)
        devices = tuple(_with_call(cost, calls.get((cost.name, cost.kind))) for cost in devices)
        return ExpectedCosts(
            devices=devices,
            pause_ns=pause_ns,
            pause_spread_ns=pause_spread_ns,
            resume_ns=int(median(run["resume_ns"] for run in runs)),
            call_ns=call_ns,
            basis="tried",
        )

    async def _try_calls(self, side: Side) -> dict[tuple[str, str], tuple[int, int]]:
        """Time the calls that will hand device states over, with as many bytes and nothing to do.

        Returns:
            What a call takes, and how far single tries lay from that (ns), by the first device of the call.
        """
        description = self._description or await self.describe()
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for kind in ("iterable", "non-iterable"):
            devices = [device for device in description.devices if device.kind == kind]
            costs_ns = [self._costs_ns.get((device.name, device.kind), 0) for device in devices]
            for group in _grouped(devices, costs_ns):
                size = sum(device.state_bytes for device in group)
                tried = min(size, _MOST_TRIED_BYTES)
                with Precedence(threads_of(os.getpid(), self.pid)):  # as in the blackout
                    tries_ns = [await self._try_call(side, tried) for _ in range(_CALLS_TRIED)]
                ns, spread_ns = _typical(tries_ns)
                scale = size / tried if tried else 1.0
                found[group[0].name, group[0].kind] = int(ns * scale), int(spread_ns * scale)
        return found

    async def _try_call(self, side: Side, size: int) -> int:
        """Hand over so many bytes for nothing; returns how long that took (ns)."""
        payload, wanted = (b"", size) if side == "save" else (bytes(size), 0)
        begin_ns = time.monotonic_ns()
        await self._calls.call("dry-run-states", STATE_S, payload, bytes=wanted)
        return time.monotonic_ns() - begin_ns

    async def own_operation(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """``verify`` compares every byte of memory with its correct content; ``set-dirty-rate`` changes how fast the
        workload writes (``bytes_per_s``)."""
        match name:
            case "verify":
                meta = (await self._calls.call("verify", VERIFY_S)).meta
                return {key: value for key, value in meta.items() if key != "id"}
            case "set-dirty-rate":
                await self._calls.call("set-rate", dirty_rate=arguments["bytes_per_s"])
                return {}
            case _:
                return await super().own_operation(name, arguments)

    async def destroy(self) -> None:
        with contextlib.suppress(VmmError):
            await self._calls.call("destroy")
        await self.close()
        if not await spawn.make_sure_gone(self.pid, GONE_S):
            raise VmmError(f"the VMM of guest {self.name} (pid {self.pid}) does not end; end it by hand")
        self.api_socket.unlink(missing_ok=True)

    async def close(self) -> None:
        await self._calls.close()


def _time_in(meta: Mapping[str, Any]) -> VmTimeData:
    """The guest's time in an answer of the VMM."""
    try:
        return VmTimeData.model_validate(meta.get("time"))
    except ValidationError as error:
        raise VmmError(f"the VMM gives a guest time that we cannot use: {error.errors()[0]['msg']}") from error


def _with_call(cost: DeviceCost, call: tuple[int, int] | None) -> DeviceCost:
    """The cost of a device with that of the call for it, if it has one of its own."""
    if call is None:
        return cost
    ns, spread_ns = call
    return cost.model_copy(update={"ns": cost.ns + ns, "spread_ns": int(math.hypot(cost.spread_ns, spread_ns))})


def _typical(tries_ns: list[int]) -> tuple[int, int]:
    """The median of some tries, and the distance from it that two thirds of them stayed within."""
    centre_ns = int(median(tries_ns))
    return centre_ns, sorted(abs(ns - centre_ns) for ns in tries_ns)[2 * len(tries_ns) // 3]


def _grouped(items: Sequence[One], costs_ns: Sequence[int]) -> Iterator[list[One]]:
    """The items in order, cheap neighbours together."""
    group: list[One] = []
    for item, cost_ns in zip(items, costs_ns, strict=True):
        if cost_ns < _CHEAP_NS:
            group.append(item)
            continue
        if group:
            yield group
            group = []
        yield [item]
    if group:
        yield group
