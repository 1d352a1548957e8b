"""The driver for ``vmm_sim``: one process per guest, reached over its API socket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgpack
from pydantic import ValidationError

from migrated.errors import VmmError, VmmGoneError, VmmSilentError
from migrated.vmm import spawn
from migrated.vmm.base import DeviceKind, DeviceState, DirtyTracking, DryRun, SavedDevice, TimeImport, Vmm, VmmStatus
from migrated.vmm.dirty_log import ByteMapLog, DirtyLog, PagemapScanLog, Span
from migrated.vmm.memory import GuestMemory
from protocol.guest import PAGE_SIZE, GuestDescription
from protocol.guest_time import VmTimeData
from protocol.messages import DeviceCost
from vmm_sim.client import Reply, VmmClient
from vmm_sim.client import VmmError as ClientError
from vmm_sim.client import VmmGone as ClientGone

_QUICK_S = 5.0
_PAUSE_S = 30.0
_DEVICE_S = 120.0
_VERIFY_S = 600.0
_GONE_S = 10.0


class SimVmm(Vmm):
    """A connected vmm_sim guest. Build it with ``attach`` or ``start``."""

    def __init__(self, client: VmmClient, name: str, pid: int, api_socket: Path) -> None:
        self.name = name
        self.pid = pid
        self.api_socket = api_socket
        self._client = client

    @classmethod
    async def attach(cls, api_socket: Path, timeout_s: float | None = _QUICK_S) -> SimVmm:
        """Connect to a running guest; ``timeout_s`` bounds the wait for its answer.

        Raises:
            VmmGoneError: nobody listens on the socket: the guest's process has ended.
            VmmSilentError: its process is there and does not answer.
            VmmError: it cannot be reached, or does not understand.
        """
        try:
            client = await VmmClient.connect(str(api_socket), timeout=timeout_s)
        except ClientGone as error:
            if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
                raise VmmGoneError(f"no VMM listens on {api_socket}") from error
            if isinstance(error.__cause__, TimeoutError):
                raise VmmSilentError(f"the VMM on {api_socket} takes no connection", 0) from error
            raise VmmError(f"the VMM on {api_socket} cannot be reached: {error}") from error
        pid = client.peer_pid
        try:
            reply = await client.call("status", timeout=timeout_s)
            return cls(client, reply.meta["name"], reply.meta["pid"], api_socket)
        except BaseException as error:
            await client.close()
            if isinstance(error, TimeoutError):
                raise VmmSilentError(f"the VMM on {api_socket} (pid {pid}) does not answer", pid) from error
            if isinstance(error, ClientGone):
                raise VmmSilentError(f"the VMM on {api_socket} (pid {pid}) hung up: {error}", pid) from error
            if isinstance(error, ClientError):
                raise VmmError(f"the VMM on {api_socket} (pid {pid}) refused its status: {error}") from error
            raise

    @classmethod
    async def start(cls, command: list[str], api_socket: Path, timeout_s: float) -> SimVmm:
        """Start a guest process and connect to it.

        Raises:
            VmmError: it cannot be started, ends at once, or does not answer in time; the sentence carries its words.
        """
        log_path = api_socket.with_suffix(".log")
        pid = spawn.start_process(command, log_path)
        deadline = time.monotonic() + timeout_s
        while True:
            if api_socket.exists():
                with contextlib.suppress(VmmError):
                    return await cls.attach(api_socket)
            if spawn.reap(pid):
                raise VmmError(f"the VMM ended at once: {spawn.last_lines(log_path) or 'it said nothing'}")
            if time.monotonic() > deadline:
                await spawn.make_sure_gone(pid, _GONE_S)
                raise VmmError(f"the VMM did not answer within {timeout_s:g} s; its log is {log_path}")
            await asyncio.sleep(0.01)

    async def _call(self, op: str, timeout_s: float, payload: Any = b"", **arguments: Any) -> Reply:
        try:
            return await self._client.call(op, payload=payload, timeout=timeout_s, **arguments)
        except ClientGone as error:
            raise VmmGoneError(f"the VMM of guest {self.name} (pid {self.pid}) is gone: {error}") from error
        except ClientError as error:
            raise VmmError(f"the VMM of guest {self.name} refused {op}: {error}") from error
        except TimeoutError as error:
            raise VmmSilentError(
                f"the VMM of guest {self.name} (pid {self.pid}) did not answer {op} within {timeout_s:g} s", self.pid
            ) from error

    async def describe(self) -> GuestDescription:
        reply = await self._call("describe", _QUICK_S)
        try:
            return GuestDescription.model_validate(reply.meta["description"])
        except ValidationError as error:
            raise VmmError(f"the VMM of guest {self.name} describes it in a way we cannot use: {error}") from error

    async def status(self) -> VmmStatus:
        meta = (await self._call("status", _QUICK_S)).meta
        return VmmStatus(state=meta["state"], pid=meta["pid"], epoch=meta["epoch"], detail=dict(meta))

    async def memory(self) -> GuestMemory:
        reply = await self._call("memory", _QUICK_S)
        return GuestMemory(reply.fds[0], reply.meta["bytes"] // PAGE_SIZE)

    async def start_dirty_log(self, mode: DirtyTracking) -> DirtyLog:
        reply = await self._call("dirty-log-start", _QUICK_S, mode=mode, present_only=True)
        pages = reply.meta["bytes"] // PAGE_SIZE
        if reply.meta["mode"] == "pagemap-scan":
            present_only = bool(reply.meta.get("present_only", False))
            return PagemapScanLog(reply.fds[0], [Span(reply.meta["address"], pages, 0)], present_only)
        return ByteMapLog(reply.fds[0], pages)

    async def stop_dirty_log(self) -> None:
        await self._call("dirty-log-stop", _QUICK_S)

    async def pause(self) -> int:
        return int((await self._call("pause", _PAUSE_S)).meta["ns"])

    async def resume(self, epoch: int) -> int:
        return int((await self._call("resume", _PAUSE_S, epoch=epoch)).meta["running_at_ns"])

    async def take_lock(self) -> None:
        await self._call("lock", _QUICK_S)

    async def release_lock(self) -> None:
        await self._call("unlock", _QUICK_S)

    async def interrupt(self) -> None:
        await self._call("interrupt", _QUICK_S)

    async def export_time(self) -> VmTimeData:
        reply = await self._call("time-export", _QUICK_S)
        return VmTimeData.model_validate(reply.meta["time"])

    async def import_time(self, time: VmTimeData, error_ns: int) -> TimeImport:
        reply = await self._call("time-import", _QUICK_S, time=time.model_dump(), error_ns=error_ns)
        return TimeImport(vmm_ns=reply.meta["vmm_ns"], vmm_ticks=reply.meta["vmm_ticks"])

    async def save_device(self, name: str, kind: DeviceKind, round_number: int | None) -> SavedDevice:
        reply = await self._call("device-save", _DEVICE_S, name=name, kind=kind, round=round_number)
        return SavedDevice(state=reply.payload, ns=reply.meta["ns"])

    async def save_devices(self, devices: Sequence[tuple[str, DeviceKind]]) -> list[SavedDevice]:
        wanted = [(name, kind, 0) for name, kind in devices]
        reply = await self._call("devices-save", _DEVICE_S, devices=wanted)
        view, offset, saved = memoryview(reply.payload), 0, []
        for meta in reply.meta["saved"]:
            saved.append(SavedDevice(state=view[offset : offset + meta["bytes"]], ns=meta["ns"]))
            offset += meta["bytes"]
        return saved

    async def load_devices(self, states: Sequence[DeviceState]) -> list[int]:
        described = [(state.name, state.kind, len(state.data)) for state in states]
        payload = b"".join(state.data for state in states)
        reply = await self._call("devices-load", _DEVICE_S, payload, devices=described)
        return [int(meta["ns"]) for meta in reply.meta["loaded"]]

    async def load_device(self, name: str, kind: DeviceKind, state: bytes | bytearray | memoryview, final: bool) -> int:
        reply = await self._call("device-load", _DEVICE_S, state, name=name, kind=kind, final=final)
        return int(reply.meta["ns"])

    async def dry_run(self, side: Literal["save", "load"]) -> DryRun:
        meta = (await self._call("dry-run", _QUICK_S, side=side)).meta
        devices = tuple(DeviceCost(name=row["name"], kind=row["kind"], ns=row["ns"]) for row in meta["devices"])
        return DryRun(devices=devices, pause_ns=meta["pause_ns"], resume_ns=meta["resume_ns"])

    async def throttle(self, percent: int) -> None:
        await self._call("throttle", _QUICK_S, percent=percent)

    async def verify(self) -> dict[str, Any]:
        meta = dict((await self._call("verify", _VERIFY_S)).meta)
        return {key: value for key, value in meta.items() if key != "id"}

    async def set_dirty_rate(self, bytes_per_s: int) -> None:
        await self._call("set-rate", _QUICK_S, dirty_rate=bytes_per_s)

    async def destroy(self) -> None:
        with contextlib.suppress(VmmError):
            await self._call("destroy", _QUICK_S)
        await self.close()
        if not await spawn.make_sure_gone(self.pid, _GONE_S):
            raise VmmError(f"the VMM of guest {self.name} (pid {self.pid}) does not end; end it by hand")
        with contextlib.suppress(FileNotFoundError):
            self.api_socket.unlink()

    async def close(self) -> None:
        await self._client.close()


def incoming_command(vmm_command: list[str], description: GuestDescription, api_socket: Path) -> list[str]:
    """The command line of an empty guest that equals ``description``; the description goes into a file beside it."""
    path = api_socket.with_suffix(".incoming")
    path.write_bytes(msgpack.packb(description.model_dump(), use_bin_type=True))
    return [
        *vmm_command, "--name", description.name, "--api-socket", str(api_socket), "--incoming-description", str(path)
    ]  # fmt: skip
