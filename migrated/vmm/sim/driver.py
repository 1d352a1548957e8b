"""Finding, starting and attaching simulated guests.

In ``[vmm] directory`` lie, for each guest, its API socket PLACE.sock, its log PLACE.log and the run log PLACE.runlog,
in which its VMM writes a line before its vCPUs run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgpack

from migrated.base.errors import VmmError
from migrated.settings.config import ClockConfig, Config
from migrated.vmm import spawn
from migrated.vmm.seam import Driver, GuestRequest, Incoming
from migrated.vmm.sim.calls import QUICK_S, Calls
from migrated.vmm.sim.guest import GONE_S, SimGuest
from protocol.guest import GuestDescription

_LOOK_AGAIN_S: Final = 0.01


class SimDriver(Driver):
    """The simulated VMM. Options of a guest are options of ``vmm-sim``; ``profile`` may be the name of one in
    ``[vmm] profiles``."""

    name = "sim"
    takes_memory = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._directory = config.vmm.directory
        self._arguments: list[str] = []
        # The VMM runs on the same host: where the host's clocks are shifted, the VMM's are too.
        clock = config.clock
        if clock != ClockConfig():
            self._arguments += [
                "--hrtime-offset-ns", str(clock.hrtime_offset_ns),
                "--wall-offset-ns", str(clock.wall_offset_ns),
                "--clock-drift-ppm", str(clock.drift_ppm),
            ]  # fmt: skip
        if config.lock.directory is not None:
            self._arguments += ["--lock-directory", str(config.lock.directory)]

    def places(self) -> Sequence[Path]:
        return sorted(self._directory.glob("*.sock"))

    async def attach(self, api_socket: Path, timeout_s: float | None = QUICK_S) -> SimGuest:
        calls = await Calls.connect(api_socket, timeout_s)
        return SimGuest(calls, api_socket, locked=self.config.lock.directory is not None)

    async def create(self, request: GuestRequest) -> SimGuest:
        arguments = ["--memory", str(request.memory_bytes)]
        for key, value in request.options.items():
            # In one word, so that no value is taken for another option.
            arguments.append(f"--{key}={self._profile_path(value) if key == 'profile' else value}")
        if request.paused:
            arguments.append("--paused")
        return await self._start(self.config.vmm.command, request.name, request.name, arguments)

    async def create_incoming(self, description: GuestDescription, incoming: Incoming) -> SimGuest:
        if len(incoming.memory) > 1:
            raise VmmError(f"guest {description.name!r} has its memory in one file, and {len(incoming.memory)} came")
        if incoming.replacement.definition is not None:
            raise VmmError(f"guest {description.name!r} is no QEMU guest and has no definition: leave it out")
        path = self._directory / f"{incoming.place}.incoming"
        path.write_bytes(msgpack.packb(description.model_dump(), use_bin_type=True))
        arguments = ["--incoming-description", str(path)]
        for fd in incoming.memory:
            arguments += ["--memory-fd", str(fd)]
        command = incoming.replacement.command or self.config.vmm.command
        try:
            return await self._start(command, incoming.place, description.name, arguments, incoming.memory)
        finally:
            path.unlink(missing_ok=True)

    def ran(self, place: str, epoch: int) -> bool | None:
        try:
            lines = (self._directory / f"{place}.runlog").read_bytes().splitlines()
        except FileNotFoundError:
            return None
        for line in lines:
            with contextlib.suppress(ValueError, KeyError):
                entry = json.loads(line)
                if entry["event"] == "run" and entry["epoch"] == epoch:
                    return True
        return False

    def _profile_path(self, profile: str) -> Path:
        profiles = self.config.vmm.profiles.resolve()
        known = {path.stem: path for path in profiles.glob("*.toml")}
        path = Path(profile)
        # By name or by a path into the directory; what lies elsewhere is not even looked for.
        inside = len(path.parts) == 1 or path.parent == profiles
        found = known.get(path.name.removesuffix(".toml")) if inside else None
        if found is None:
            names = ", ".join(sorted(known)) or "none"
            raise VmmError(f"there is no guest profile {profile!r} in [vmm] profiles; profiles there: {names}")
        return found

    async def _start(
        self, program: tuple[str, ...], place: str, name: str, arguments: list[str], inherited: Sequence[int] = ()
    ) -> SimGuest:
        """Start a guest process and connect to it."""
        api_socket = self._directory / f"{place}.sock"
        log_path = api_socket.with_suffix(".log")
        command = [*program, *self._arguments, "--name", name, "--api-socket", str(api_socket), *arguments]
        pid = spawn.start_process(command, log_path, inherited)
        timeout_s = self.config.vmm.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            if api_socket.exists():
                with contextlib.suppress(VmmError):
                    return await self.attach(api_socket)
            if spawn.reap(pid):
                raise VmmError(f"the VMM ended at once: {spawn.last_lines(log_path) or 'it said nothing'}")
            if time.monotonic() > deadline:
                await spawn.make_sure_gone(pid, GONE_S)
                raise VmmError(f"the VMM did not answer within {timeout_s:g} s; its log is {log_path}")
            await asyncio.sleep(_LOOK_AGAIN_S)
