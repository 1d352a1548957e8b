"""Finding, starting and attaching QEMU guests.

In ``[vmm] directory``/qemu lie, for each guest, its QMP socket or a link to it, the record of it, and its logs
(``places``). A guest is either started here, from a definition of this host's own, or adopted: somebody else started it
and gave it a monitor for us.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from migrated.base.errors import RefusedError, VmmError, VmmGoneError
from migrated.settings.config import Config
from migrated.vmm import spawn
from migrated.vmm.qemu import places
from migrated.vmm.qemu.blueprint import Blueprint, unfit
from migrated.vmm.qemu.costs import SwitchoverCosts
from migrated.vmm.qemu.definition import CommandLine, load_definition
from migrated.vmm.qemu.guest import QemuGuest
from migrated.vmm.qemu.offers import offers
from migrated.vmm.qemu.places import Place
from migrated.vmm.qemu.qmp import QUICK_S
from migrated.vmm.seam import Driver, GuestRequest, Incoming
from protocol.guest import NAME_PATTERN, GuestDescription
from protocol.wrong_values import fault

_LOOK_AGAIN_S: Final = 0.01
_ENDING_S: Final = 1.0
"""For this long a QEMU whose monitor could not be used may turn out to be one that is just ending."""
_GONE_S: Final = 10.0
_DEFAULT_BINARY: Final = "qemu-system-x86_64"


class _Options(BaseModel):
    """Options of a guest of this driver: ``definition`` names one of this host's, ``qmp`` adopts a running
    QEMU; ``incoming`` says that it waits for a migration, ``run_log`` where it logs its run state, ``guest_agent`` the
    socket of the agent that sets its clock when it has moved here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    definition: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    qmp: Path | None = None
    incoming: bool = False
    run_log: Path | None = None
    guest_agent: Path | None = None


class QemuDriver(Driver):
    """Stock QEMU, 7.2 or newer."""

    name = "qemu"
    takes_memory = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._directory = config.vmm.directory / "qemu"
        self._command = (config.qemu.binary or _DEFAULT_BINARY,)
        self._costs = SwitchoverCosts(config.state.directory / "qemu-costs.json")

    def places(self) -> Sequence[Path]:
        return sorted(self._directory.glob("*.sock"))

    async def offers(self) -> frozenset[str]:
        return await offers(self._command)

    def tidy(self, place: Path) -> None:
        places.forget(place)

    async def attach(self, api_socket: Path, timeout_s: float | None = QUICK_S) -> QemuGuest:
        return await QemuGuest.attach(
            api_socket,
            places.read_place(api_socket),
            self._costs,
            timeout_s=timeout_s,
            stop_timeout_s=self.config.limits.stop_timeout_s,
            lock_directory=self.config.lock.directory,
        )

    async def create(self, request: GuestRequest) -> QemuGuest:
        try:
            options = _Options.model_validate(dict(request.options))
        except ValidationError as error:
            found = "; ".join(f"{problem['loc'][0]} {fault(problem)}" for problem in error.errors(include_url=False))
            raise VmmError(f"QEMU guest {request.name!r} cannot be made so: {found}") from error
        self._directory.mkdir(parents=True, exist_ok=True)
        if options.qmp is not None:
            return await self._adopt(request.name, options.qmp, options)
        line = self._command_line(request.name, options.definition or request.name, Incoming(request.name))
        locks = self.config.lock.directory is not None
        command = line.running(paused=request.paused or locks)
        guest = await self._start(request.name, line, command, Incoming(request.name), False)
        if locks and not request.paused:
            try:
                await guest.resume(epoch=0)  # takes the lock before it runs
            except BaseException:
                await _end(guest)
                raise
        return guest

    async def create_incoming(self, description: GuestDescription, incoming: Incoming) -> QemuGuest:
        definition = incoming.replacement.definition or description.name
        try:
            Blueprint.unpack(description.vmm_config)  # nothing is started for what is no description of a machine
            line = self._command_line(description.name, definition, incoming)
        except VmmError as error:
            raise RefusedError(f"the destination cannot take guest {description.name!r}: {error}") from error
        guest = await self._start(description.name, line, line.incoming(), incoming, True)
        try:
            if incoming.memory:
                await guest.keep_memory_private()
            if found := unfit(description, await guest.describe()):
                raise RefusedError(
                    f"the destination's definition of guest {description.name!r} makes another machine: "
                    f"{'; '.join(found)}. Change {self.config.qemu.definitions / definition}.toml there"
                )
        except BaseException:
            await _end(guest)
            raise
        return guest

    def ran(self, place: str, epoch: int) -> bool | None:
        api_socket = self._directory / f"{place}.sock"
        try:
            known = places.read_place(api_socket)
        except VmmError:
            return None
        ran = known.published or places.ran_after(known.run_log, known.run_log_bytes)
        return None if ran is None else known.epoch == epoch and ran

    def _command_line(self, name: str, definition: str, incoming: Incoming) -> CommandLine:
        qemu = self.config.qemu
        return CommandLine(
            load_definition(qemu.definitions, definition),
            name,
            incoming.replacement.command or self._command,
            qemu.definitions,
            self._directory / f"{incoming.place}.sock",
            qemu.ram_directory,
            incoming.memory,
        )

    async def _adopt(self, name: str, qmp: Path, options: _Options) -> QemuGuest:
        """Take over a QEMU that somebody else started; it runs on undisturbed."""
        api_socket = self._directory / f"{name}.sock"
        self._make_free(api_socket)
        if options.run_log is not None and places.ran_after(options.run_log, 0) is None:
            raise VmmError(
                f"{options.run_log} cannot be read as the run log of guest {name!r}: name the file that its QEMU was "
                "given with -D"
            )
        place = Place(
            name=name,
            started_here=False,
            run_log=options.run_log,
            agent=options.guest_agent,
            incoming=options.incoming,
        )
        try:
            places.write_place(api_socket, place)
            api_socket.symlink_to(qmp.absolute())
            guest = await self.attach(api_socket)
            try:
                if guest.lock is not None and (await guest.status()).state == "running":
                    await guest.lock.take()
            except BaseException:
                await guest.close()
                raise
        except BaseException:
            places.forget(api_socket)
            raise
        return guest

    def _make_free(self, api_socket: Path) -> None:
        """See that no guest is at a place, and remove what an ended one left there.

        Raises:
            VmmError: a QEMU is there, of which this daemon may know nothing: it could not be used when it was found.
        """
        if places.somebody_listens(api_socket):
            raise VmmError(
                f"a QEMU listens on {api_socket} already: the guest is here, and if it is not listed this daemon could "
                "not use it, and its log says why"
            )
        places.forget(api_socket)

    async def _start(
        self, name: str, line: CommandLine, command: list[str], started: Incoming, incoming: bool
    ) -> QemuGuest:
        """Start QEMU and connect to it."""
        api_socket = self._directory / f"{started.place}.sock"
        log_path = api_socket.with_suffix(".log")
        place = Place(name=name, started_here=True, run_log=line.run_log, agent=line.clock_setter, incoming=incoming)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self.config.qemu.ram_directory.mkdir(parents=True, exist_ok=True)
            self._make_free(api_socket)
            line.run_log.unlink(missing_ok=True)
            places.write_place(api_socket, place)
        except OSError as error:
            raise VmmError(f"QEMU cannot be started: {error.filename}: {error.strerror}") from error
        try:
            pid = spawn.start_process(command, log_path, started.memory)
            try:
                return await self._started(pid, api_socket, log_path)
            except BaseException:
                await spawn.make_sure_gone(pid, _GONE_S)
                raise
        except BaseException:
            places.forget(api_socket)
            raise
        finally:
            # QEMU has them open: without a name they go when it goes, whatever happens to us.
            for path in line.ram_files():
                path.unlink(missing_ok=True)

    async def _started(self, pid: int, api_socket: Path, log_path: Path) -> QemuGuest:
        """Wait until a QEMU that has been started answers, and connect to it."""
        timeout_s = self.config.vmm.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            unusable: VmmError | None = None
            if api_socket.exists():
                try:
                    return await self.attach(api_socket)
                except VmmError as error:
                    unusable = error
            refused = unusable is not None and not isinstance(unusable, VmmGoneError)
            # A QEMU that ends closes its monitor first, and its own words say more than that it hung up.
            if await spawn.reap_within(pid, _ENDING_S if refused else 0.0):
                raise VmmError(f"QEMU ended at once: {spawn.last_lines(log_path) or 'it said nothing'}")
            if unusable is not None and refused:
                raise unusable
            if time.monotonic() > deadline:
                raise VmmError(f"QEMU did not answer within {timeout_s:g} s; its log is {log_path}")
            await asyncio.sleep(_LOOK_AGAIN_S)


async def _end(guest: QemuGuest) -> None:
    """End a guest that has just been started and cannot be used."""
    with contextlib.suppress(VmmError):
        await guest.destroy()
