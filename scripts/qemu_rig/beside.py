"""The same guests moved by us and by QEMU itself, minutes apart: throughput of memory, total time, and the gaps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.basics import say
from scripts.qemu_rig.baseline import DamagedGuestError, migrate_with_qemu, surviving
from scripts.qemu_rig.campaign import Campaign
from scripts.qemu_rig.campaign_figures import summary
from scripts.qemu_rig.image import GuestImage
from scripts.qemu_rig.launcher import QemuSpec
from scripts.qemu_rig.pair import QemuPair
from scripts.rig.waiting import RigError


@dataclass(slots=True)
class ByQemu:
    """QEMU's own migrations of one guest.

    Attributes:
        ram_mib_per_s, totals_ms: of all that completed.
        reported_ms, stood_ms, gaps_ms: of those that the guest survived; where it did not, of an equal guest that does.
        damaged: completed, and the guest did not survive it.
        failures: sentences on those that did not complete.
    """

    ram_mib_per_s: list[float] = field(default_factory=list)
    totals_ms: list[float] = field(default_factory=list)
    reported_ms: list[float] = field(default_factory=list)
    stood_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    damaged: int = 0
    failures: list[str] = field(default_factory=list)

    async def move(self, spec: QemuSpec, image: GuestImage, directory: Path, limit_ms: int) -> None:
        """One migration of a guest that is booted for it, and a second one where it did not survive."""
        try:
            try:
                own = await migrate_with_qemu(spec, image, directory / "first", limit_ms)
            except DamagedGuestError as error:
                self.damaged += 1
                self._note_speed(error.ram_mib_per_s, error.total_ms)
                say(f"QEMU's own: {error.ram_mib_per_s:.0f} MiB/s, and the guest did not survive: {error}")
                own = await migrate_with_qemu(surviving(spec), image, directory / "second", limit_ms)
            else:
                self._note_speed(own.ram_mib_per_s, own.total_ms)
        except RigError as error:
            self.failures.append(str(error))
            say(f"QEMU's own: {error}")
            return
        self.reported_ms.append(own.reported_downtime_ms)
        self.stood_ms.append(own.stood_ns / 1e6)
        self.gaps_ms.append(own.observed_gap_ns / 1e6)
        say(
            f"QEMU's own: {own.ram_mib_per_s:.0f} MiB/s, total {own.total_ms} ms, reported "
            f"{own.reported_downtime_ms} ms, clock stood {own.stood_ns / 1e6:.1f} ms"
        )

    def _note_speed(self, ram_mib_per_s: float, total_ms: int) -> None:
        self.ram_mib_per_s.append(ram_mib_per_s)
        self.totals_ms.append(total_ms)

    def document(self) -> dict[str, Any]:
        """Medians, None where there is nothing to take one of."""
        return {
            "ram_mib_per_s": _median(self.ram_mib_per_s),
            "total_ms": _median(self.totals_ms),
            "reported_downtime_ms": _median(self.reported_ms),
            "clock_stood_ms": _median(self.stood_ms),
            "gap_ms": _median(self.gaps_ms),
            "damaged": self.damaged,
            "failures": self.failures,
        }


async def side_by_side(
    specs: Mapping[str, QemuSpec], image: GuestImage, directory: Path, repeats: int, limit_ms: int
) -> dict[str, Any]:
    """Move each guest so often in both ways.

    Args:
        specs: the guests, by the names of their workloads.
        limit_ms: the downtime limit of both.

    Returns:
        By name: the figures of both ways, and how many times as fast ours moves memory, where both moved any.
    """
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        say(f"{name}:")
        ours, own = Campaign(name, repeats, limit_ms), ByQemu()
        await ours.run(QemuPair(spec, image, quick=False))
        for number in range(repeats):
            await own.move(spec, image, directory / f"{name}-{number}", limit_ms)
        found[name] = {"ours": summary([ours.figures]), "qemu": own.document()}
        if (speed := ours.figures.ram_mib_per_s) and own.ram_mib_per_s:
            found[name]["throughput_ratio"] = round(speed / statistics.median(own.ram_mib_per_s), 2)
    return found


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None
