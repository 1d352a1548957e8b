"""Properties of this host that a QEMU guest may need and another host may lack: versions of machines, and KVM."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import structlog

from migrated.vmm.seam import KVM

log = structlog.get_logger()

_DEVICE: Final = Path("/dev/kvm")
_ANSWER_S: Final = 10.0


def words(machines: Iterable[str], *, kvm: bool) -> frozenset[str]:
    """Return the same words for the needs of a guest and the properties of a host.

    Args:
        machines: types of machines with their versions, as QEMU names them.
        kvm: whether KVM is there, or in use.
    """
    return frozenset({f"qemu machine {machine}" for machine in machines} | ({KVM} if kvm else set()))


async def offers(command: Sequence[str]) -> frozenset[str]:
    """Return the machines that QEMU on this host can be, and KVM; no machines where it cannot be asked.

    Args:
        command: QEMU and its fixed arguments.
    """
    return words(machines=await _machines(command), kvm=os.access(_DEVICE, os.R_OK | os.W_OK))


async def _machines(command: Sequence[str]) -> list[str]:
    try:
        process = await asyncio.create_subprocess_exec(
            *command, "-machine", "help", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
    except OSError as error:
        log.warning("QEMU cannot be asked for its machines", command=command[0], reason=error.strerror)
        return []
    try:
        async with asyncio.timeout(_ANSWER_S):
            told, _ = await process.communicate()
    except TimeoutError:
        await _end(process)
        log.warning("QEMU does not say which machines it has", command=command[0])
        return []
    except asyncio.CancelledError:  # the daemon ends
        await _end(process)
        raise
    _heading, *lines = told.decode(errors="replace").splitlines() or [""]
    return [line.split()[0] for line in lines if line.split()]


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        process.kill()
    await process.wait()
