"""The driver of the very small VMM in ``process.py``: no facet, one block of state, memory of another process.

It stands for every VMM that gives little, and shows that nothing above the seam knows another.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from migrated.base.errors import VmmError, VmmGoneError, VmmSilentError
from migrated.settings.config import Config
from migrated.vmm import spawn
from migrated.vmm.dirty_log import DirtyLog, PagemapScanLog
from migrated.vmm.memory import GuestMemory, ProcessMemory, Span
from migrated.vmm.seam import (
    DirtyTracking,
    Driver,
    ExpectedCosts,
    GuestRequest,
    GuestStatus,
    Incoming,
    PauseTime,
    Side,
    StatePart,
    VmmGuest,
)
from protocol.guest import PAGE_SIZE, DeviceDescription, DeviceKind, GuestDescription, MemoryRegion
from protocol.messages import DeviceCost

_PROCESS: Final = Path(__file__).with_name("process.py")
_ANSWER_S: Final = 5.0
_START_S: Final = 30.0
_GONE_S: Final = 10.0
_STATE: Final = "everything"


class TinyGuest(VmmGuest):
    """One guest; every call has a connection of its own."""

    driver = "tiny"
    dirty_tracking = frozenset({"pagemap-scan"})

    def __init__(self, api_socket: Path, pid: int, identity: str) -> None:
        self.name = api_socket.stem.removesuffix("~")
        self.pid = pid
        self.api_socket = api_socket
        self._uuid = identity

    async def call(self, op: str, timeout_s: float | None = _ANSWER_S, **arguments: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(self.api_socket)
                try:
                    writer.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
                    answer = await reader.readline()
                finally:
                    writer.close()
        except TimeoutError as error:
            raise VmmSilentError(f"the VMM of guest {self.name} did not answer {op}", self.pid) from error
        except OSError as error:
            raise VmmGoneError(f"the VMM of guest {self.name} is gone: {error}") from error
        if not answer:
            raise VmmGoneError(f"the VMM of guest {self.name} hung up")
        found = json.loads(answer)
        if "error" in found:
            raise VmmError(f"the VMM of guest {self.name} refused {op}: {found['error']}")
        return dict(found["ok"])

    async def describe(self) -> GuestDescription:
        size = int((await self.call("memory"))["pages"]) * PAGE_SIZE
        return GuestDescription(
            name=self.name,
            uuid=self._uuid,
            vmm=self.driver,
            machine="tiny-1",
            page_size=PAGE_SIZE,
            memory=(MemoryRegion(name="ram", guest_address=0, size_bytes=size, offset_pages=0),),
            devices=(DeviceDescription(name=_STATE, kind="non-iterable", state_bytes=64),),
            vcpus=1,
            guest_freq=0,
            guest_time=False,
        )

    async def status(self) -> GuestStatus:
        found = await self.call("status")
        return GuestStatus(found["state"], found["pid"], found["epoch"], found)

    async def _span(self, op: str) -> Span:
        found = await self.call(op)
        return Span(found["address"], found["pages"], 0)

    async def memory(self) -> GuestMemory:
        return ProcessMemory(self.name, self.pid, [await self._span("memory")], sparse=True)

    async def start_dirty_log(self, mode: DirtyTracking) -> DirtyLog:
        span = await self._span("track")
        fd = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        return PagemapScanLog(fd, [span], present_only=False)

    async def stop_dirty_log(self) -> None:
        await self.call("untrack")

    async def pause(self) -> PauseTime:
        begin_ns = time.monotonic_ns()
        await self.call("pause")
        return PauseTime(time.monotonic_ns() - begin_ns)

    async def resume(self, epoch: int) -> int:
        return int((await self.call("resume", epoch=epoch))["running_at_ns"])

    async def interrupt(self) -> None:
        """Nothing that this VMM does takes long."""

    async def state_out(self, kind: DeviceKind) -> AsyncIterator[Sequence[StatePart]]:
        if kind == "non-iterable":
            yield [StatePart(_STATE, kind, base64.b64decode((await self.call("save"))["state"]))]

    async def state_in(self, parts: Sequence[StatePart]) -> Sequence[int]:
        costs_ns = []
        for part in parts:
            begin_ns = time.monotonic_ns()
            await self.call("load", state=base64.b64encode(part.data).decode())
            costs_ns.append(time.monotonic_ns() - begin_ns)
        return costs_ns

    async def expected_costs(self, side: Side) -> ExpectedCosts:
        return ExpectedCosts((DeviceCost(name=_STATE, kind="non-iterable", ns=0),), 0, 0, 0, "guessed")

    async def own_operation(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return await self.call("verify") if name == "verify" else await super().own_operation(name, arguments)

    async def destroy(self) -> None:
        with contextlib.suppress(VmmError):
            await self.call("destroy")
        if not await spawn.make_sure_gone(self.pid, _GONE_S):
            raise VmmError(f"the VMM of guest {self.name} (pid {self.pid}) does not end")
        self.api_socket.unlink(missing_ok=True)
        self.api_socket.with_suffix(".uuid").unlink(missing_ok=True)

    async def close(self) -> None:
        """There is no connection to close."""


class TinyDriver(Driver):
    """Guests in a directory of their own below the guests' directory; NAME.uuid beside a socket is the identity."""

    name = "tiny"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._directory = config.vmm.directory / self.name

    def places(self) -> Sequence[Path]:
        return sorted(self._directory.glob("*.sock"))

    async def attach(self, api_socket: Path, timeout_s: float | None) -> TinyGuest:
        guest = TinyGuest(api_socket, 0, api_socket.with_suffix(".uuid").read_text(encoding="ascii"))
        guest.pid = int((await guest.call("status", timeout_s))["pid"])
        return guest

    async def create(self, request: GuestRequest) -> TinyGuest:
        if request.options:
            given = dict(sorted(request.options.items()))
            raise VmmError(f"a tiny guest has no options, and was given {given}")
        state = "paused" if request.paused else "running"
        return await self._start(request.name, str(uuid.uuid4()), request.memory_bytes // PAGE_SIZE, state)

    async def create_incoming(self, description: GuestDescription, incoming: Incoming) -> TinyGuest:
        return await self._start(incoming.place, description.uuid, description.pages, "incoming")

    async def _start(self, place: str, identity: str, pages: int, state: str) -> TinyGuest:
        self._directory.mkdir(parents=True, exist_ok=True)
        api_socket = self._directory / f"{place}.sock"
        api_socket.unlink(missing_ok=True)  # of a guest of this name that ended by itself
        api_socket.with_suffix(".uuid").write_text(identity, encoding="ascii")
        log_path = api_socket.with_suffix(".log")
        command = [sys.executable, str(_PROCESS), "--socket", str(api_socket), "--pages", str(pages), "--state", state]
        pid = spawn.start_process(command, log_path)
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(VmmError):
                return await self.attach(api_socket, _ANSWER_S)
            if spawn.reap(pid) or time.monotonic() > deadline:
                raise VmmError(f"the VMM of the guest at {place} does not answer: {spawn.last_lines(log_path)}")
            await asyncio.sleep(0.01)
