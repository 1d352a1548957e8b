"""QEMU's own migration of a guest, between two stock QEMUs over loopback: what the project is compared with.

QEMU a   b b b b b|          stop    QEMU reports its downtime; the guest's beats say how long nothing ran
QEMU b            |   b b b  run
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from scripts.basics import MIB
from scripts.qemu_rig.gaps import handover_gap, largest_gap, merged, said_twice
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import BOOT_TIMEOUT_S, Qemu, QemuSpec, running_qemu
from scripts.rig.waiting import RigError, until

DEFAULT_LIMIT_MS: Final = 300
"""QEMU's own default of downtime-limit."""
UNLIMITED: Final = 1 << 40
"""A bandwidth that nothing reaches. QEMU's default of 128 MiB/s would limit the blackout too."""
MIGRATION_TIMEOUT_S: Final = 120.0
_WARM_BEATS: Final = 200
_EXTRA_KIB: Final = 8


@dataclass(frozen=True, slots=True)
class Baseline:
    """One migration by QEMU.

    Attributes:
        limit_ms: the downtime that QEMU was asked to aim at.
        reported_downtime_ms: what QEMU says.
        observed_gap_ns: from the guest's last beat on the source to its first one on the destination.
        stood_ns: how much of it the guest's own clock stood.
        total_ms: what QEMU says, from the command to the end.
        transferred_bytes: of RAM.
        seconds: from the command to ``completed`` on both sides, by our clock.
        bad_pages: what the guest found wrong afterwards.
        largest_gap_before_ns: the longest silence while the source still ran, which is what this machine does anyhow.
    """

    limit_ms: int
    reported_downtime_ms: int
    observed_gap_ns: int
    stood_ns: int
    total_ms: int
    transferred_bytes: int
    ram_bytes: int
    seconds: float
    bad_pages: int
    largest_gap_before_ns: int

    @property
    def ram_mib_per_s(self) -> float:
        """How fast the guest's memory as a whole got over."""
        return self.ram_bytes / MIB / self.seconds


class DamagedGuestError(RigError):
    """QEMU completed the migration, and the guest did not survive it.

    Attributes:
        ram_mib_per_s: how fast its memory got over all the same.
        reported_downtime_ms, total_ms: what QEMU says.
    """

    def __init__(self, why: str, result: Mapping[str, Any], seconds: float) -> None:
        super().__init__(why)
        self.ram_mib_per_s = int(result["ram"]["total"]) / MIB / seconds
        self.reported_downtime_ms = int(result["downtime"])
        self.total_ms = int(result["total-time"])


@contextlib.asynccontextmanager
async def booted(
    spec: QemuSpec, image: GuestImage, directory: Path, incarnation: int = 0, *, extra: Sequence[str] = ()
) -> AsyncIterator[Qemu]:
    """A QEMU whose guest is up and beats; arguments as of ``running_qemu``."""
    async with running_qemu(spec, image, directory, incarnation, extra=extra) as qemu:
        await asyncio.to_thread(qemu.console.wait_for, "READY", BOOT_TIMEOUT_S)
        await asyncio.to_thread(qemu.console.wait_for_beats, _WARM_BEATS, BOOT_TIMEOUT_S)
        yield qemu


def surviving(spec: QemuSpec) -> QemuSpec:
    """An equal guest with a little more memory, which survives QEMU's own migration.

    QEMU before 9.0 may lose what an emulated guest writes during its own migration: where it reads its dirty log by the
    word, the next write to a page is not noted. A block of memory that is no multiple of 256 KiB is read page by page,
    which takes longer and loses nothing.
    """
    return replace(spec, extra_kib=_EXTRA_KIB)


async def migrate_with_qemu(
    spec: QemuSpec,
    image: GuestImage,
    directory: Path,
    downtime_limit_ms: int = DEFAULT_LIMIT_MS,
    max_bandwidth: int = UNLIMITED,
) -> Baseline:
    """Boot a guest, have QEMU migrate it over loopback, let it check itself, end everything.

    Raises:
        DamagedGuestError: the guest did not survive it; one of ``surviving`` does.
        RigError: the migration failed or did not converge in time.
    """
    async with (
        booted(spec, image, directory / "source") as source,
        running_qemu(spec, image, directory / "destination", 1, incoming=True) as destination,
    ):
        for side in (source, destination):
            await side.execute(
                "migrate-set-parameters", {"downtime-limit": downtime_limit_ms, "max-bandwidth": max_bandwidth}
            )
        uri = await _listening(destination)
        begin_ns = time.monotonic_ns()
        await source.execute("migrate", {"uri": uri})
        result = await _completed(source)
        await _completed(destination)
        end_ns = time.monotonic_ns()
        try:
            await asyncio.to_thread(destination.console.wait_for_beats, _WARM_BEATS, BOOT_TIMEOUT_S)
            before, after = source.console.beats(), destination.console.beats()
            if twice := said_twice(before, after):
                raise RigError(f"The guest ran twice during QEMU's migration: it said beat {twice[0]} on both sides.")
            gap = handover_gap(before, after)
            during = largest_gap(merged(before), begin_ns, gap.begin_ns)
            bad_pages = await asyncio.to_thread(destination.console.check)
        except RigError as error:
            raise DamagedGuestError(str(error), result, (end_ns - begin_ns) / 1e9) from error
        return Baseline(
            limit_ms=downtime_limit_ms,
            reported_downtime_ms=int(result["downtime"]),
            observed_gap_ns=gap.ns,
            stood_ns=gap.stood_ns,
            total_ms=int(result["total-time"]),
            transferred_bytes=int(result["ram"]["transferred"]),
            ram_bytes=int(result["ram"]["total"]),
            seconds=(end_ns - begin_ns) / 1e9,
            bad_pages=bad_pages,
            largest_gap_before_ns=during.ns,
        )


async def _listening(destination: Qemu) -> str:
    """Have it listen on a port of its own choice."""
    await destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    answer = await destination.execute("query-migrate")
    address = answer["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


async def _completed(side: Qemu) -> dict[str, Any]:
    async def answer() -> dict[str, Any] | None:
        answer: dict[str, Any] = await side.execute("query-migrate")
        if answer.get("status") in ("failed", "cancelled"):
            reason = answer.get("error-desc", "it gives no reason")
            raise RigError(f"QEMU's own migration {answer['status']}: {reason}.")
        return answer if answer.get("status") == "completed" else None

    return await until(
        "QEMU's own migration did not end (does the guest write faster than it sends?)", answer, MIGRATION_TIMEOUT_S
    )
