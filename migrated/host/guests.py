"""The operator's commands on the guests of this host: create, list, show, pause, resume, destroy, verify."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import structlog

from migrated.base.errors import MigrationError, VmmError
from migrated.control.operations import AdoptSpec, GuestSpec, OperationError
from migrated.environment import Environment
from migrated.guests.registry import ANSWER_S, UNRESPONSIVE, Guest, SilentGuest, UnknownGuestError
from migrated.host.commands import asked
from migrated.host.recovery import Recovery
from migrated.vmm.seam import GuestRequest

log = structlog.get_logger()

_QEMU: Final = "qemu"
"""The driver of guests that are defined or adopted."""


class GuestCommands:
    """The guests of this host, as an operator handles them.

    Args:
        env: the daemon.
        recovery: knows which open attempt waits for a guest that does not answer.
    """

    def __init__(self, env: Environment, recovery: Recovery) -> None:
        self._env = env
        self._guests = env.guests
        self._recovery = recovery

    async def create(self, spec: GuestSpec) -> dict[str, Any]:
        """Start a guest and wait until its VMM answers."""
        own = {
            "profile": spec.profile,
            "workload": spec.workload,
            "dirty-rate": spec.dirty_rate_bytes_per_s,
            "seed": spec.seed,
            "definition": spec.definition,
            **spec.options,
        }
        request = GuestRequest(spec.name, spec.memory_bytes or 0, spec.paused, _given(own))
        return await self._start(request, _QEMU if spec.definition is not None else None)

    async def adopt(self, spec: AdoptSpec) -> dict[str, Any]:
        """Take over a QEMU that somebody else started."""
        own = {"qmp": spec.qmp, "incoming": spec.incoming, "run_log": spec.run_log, "guest_agent": spec.guest_agent}
        return await self._start(GuestRequest(spec.name, 0, options=_given(own)), _QEMU)

    async def _start(self, request: GuestRequest, driver: str | None) -> dict[str, Any]:
        try:
            guest = await self._guests.create(request, driver)
        except MigrationError as error:
            raise OperationError(str(error)) from error
        log.info("guest created", guest=guest.name, pid=guest.vmm.pid)
        return await self._shown(guest)

    async def check(self, name: str) -> list[dict[str, Any]]:
        """Let the guest's driver check whether a migration could keep its promise. Returns a row for each check: name,
        verdict (ok, warning, refused) and sentence."""
        return list((await asked(self.get(name).vmm.own_operation("check", {})))["rows"])

    def names(self) -> list[str]:
        """Names of the guests that a command may mean; retired ones only when there is no other."""
        here = {guest.name for guest in self._guests.all() if guest.overlay != "retired"}
        here |= {silent.name for silent in self._guests.silent.values()}
        return sorted(here) or self._guests.names()

    async def show_all(self) -> list[dict[str, Any]]:
        """All guests; one that does not answer does not hold up the others."""
        shown = await asyncio.gather(*(self._shown(guest, detail=False) for guest in self._guests.all()))
        return [*shown, *(self._silent(silent) for silent in self._guests.silent.values())]

    async def show(self, name: str) -> dict[str, Any]:
        """Return one guest with all figures of its VMM."""
        if (silent := self._guests.find_silent(name)) is not None:
            return self._silent(silent)
        return await self._shown(self.get(name))

    async def pause(self, name: str) -> dict[str, Any]:
        """Stop the vCPUs of a guest that is not being migrated."""
        guest = self.idle(name)
        await asked(guest.vmm.pause())
        self._env.publish("STOP", {"guest": name})
        return await self._shown(guest)

    async def resume(self, name: str) -> dict[str, Any]:
        """Let the vCPUs of a guest run that is not being migrated."""
        guest = self.idle(name)
        status = await asked(guest.vmm.status())
        await asked(guest.vmm.resume(status.epoch))
        self._env.publish("RESUME", {"guest": name})
        return await self._shown(guest)

    async def destroy(self, name: str) -> dict[str, Any]:
        """End a guest that is not being migrated."""
        await asked(self._guests.destroy(self.idle(name)))
        return {"name": name, "state": "destroyed"}

    async def verify(self, name: str) -> dict[str, Any]:
        """Check every byte of a guest's memory."""
        return await asked(self.get(name).vmm.own_operation("verify", {}))

    def get(self, name: str) -> Guest:
        """One guest that answers.

        Raises:
            OperationError: there is none of this name, or it is unresponsive.
        """
        if (silent := self._guests.find_silent(name)) is not None:
            raise OperationError(f"guest {name!r} is unresponsive: {silent.reason}", "DeviceNotActive")
        try:
            return self._guests.get(name)
        except UnknownGuestError as error:
            raise OperationError(str(error), "DeviceNotFound") from error

    def idle(self, name: str) -> Guest:
        """Return a guest that no migration has reserved: only such a guest may an operator stop, run or end.

        Raises:
            OperationError: there is none of this name, or it is being migrated.
        """
        guest = self.get(name)
        if guest.migration_id is not None or guest.overlay is not None:
            raise OperationError(
                f"guest {name!r} is {guest.overlay or 'being migrated'} (migration {guest.migration_id}); wait for its "
                "end, cancel it, or resolve it if it is in doubt"
            )
        return guest

    async def _shown(self, guest: Guest, detail: bool = True) -> dict[str, Any]:
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await guest.vmm.status()
        except (VmmError, TimeoutError) as error:
            reason = str(error) or f"its VMM (pid {guest.vmm.pid}) has not answered within {ANSWER_S:g} s"
            return guest.summary(UNRESPONSIVE) | {"reason": reason}
        summary = guest.summary(status.state)
        return {**_plain(status.detail), **summary} if detail else summary

    def _silent(self, silent: SilentGuest) -> dict[str, Any]:
        return silent.summary(self._recovery.postponed_of(silent.api_socket.stem))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _plain(value: Any) -> Any:
    """A VMM's figures as JSON values: bytes become hexadecimal text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
