"""Measure the rig itself and QEMU's own migration on this machine: ``python -m scripts.qemu_rig --help``.

For each workload: how long a guest takes to boot, how many beats and written pages a second it manages under
emulation, and what QEMU's own migration of it reports and what the guest noticed. Table on standard error, one JSON
document on standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from scripts.basics import say
from scripts.qemu_rig.baseline import Baseline, booted, migrate_with_qemu
from scripts.qemu_rig.image import GuestImage, guest_image
from scripts.qemu_rig.kernel import MISSING, missing_packages
from scripts.qemu_rig.launcher import QemuSpec
from scripts.qemu_rig.workload import WORKLOADS, Workload
from scripts.rig.waiting import RigError

BEATS: Final = 2000
BEATS_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed of a guest on this machine: time from QEMU's start to its first beats (s), and beats and MiB a second."""

    boot_s: float
    beats_per_s: float
    written_mib_per_s: float


async def pace(workload: Workload, image: GuestImage, directory: Path) -> Pace:
    """Boot one guest and watch it for some thousand beats."""
    begin = time.monotonic()
    async with booted(QemuSpec(workload=workload), image, directory) as qemu:
        up = time.monotonic()
        before = await asyncio.to_thread(qemu.console.status)
        watched = time.monotonic()
        await asyncio.to_thread(qemu.console.wait_for_beats, BEATS, BEATS_TIMEOUT_S)
        seconds = time.monotonic() - watched
        after = await asyncio.to_thread(qemu.console.status)
    return Pace(up - begin, BEATS / seconds, (after["written"] - before["written"]) / 256 / seconds)


async def measure(names: list[str], repeats: int) -> dict[str, dict[str, object]]:
    """The named workloads, one after the other."""
    image = guest_image()
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="rig-") as directory:
        for name in names:
            workload = WORKLOADS[name]
            own = await pace(workload, image, Path(directory) / name)
            say(
                f"{name}: up after {own.boot_s:.1f} s, {own.beats_per_s:.0f} beats/s, {own.written_mib_per_s:.0f} MiB/s"
            )
            moves: list[Baseline] = []
            failures: list[str] = []
            for number in range(repeats):
                spec = QemuSpec(workload=workload)
                try:
                    moves.append(await migrate_with_qemu(spec, image, Path(directory) / f"{name}-{number}"))
                    say(f"  QEMU's own migration: {described(moves[-1])}")
                except RigError as error:  # a guest that did not survive it is a result too
                    failures.append(str(error))
                    say(f"  QEMU's own migration failed: {error}")
            if moves:
                say(f"  median gap {statistics.median(move.observed_gap_ns for move in moves) / 1e6:.0f} ms")
            found[name] = {"pace": asdict(own), "qemu": [asdict(move) for move in moves], "failures": failures}
    return found


def described(move: Baseline) -> str:
    """One migration in a line."""
    return (
        f"reported {move.reported_downtime_ms} ms, the guest noticed {move.observed_gap_ns / 1e6:.0f} ms, "
        f"in all {move.total_ms} ms, RAM at {move.ram_mib_per_s:.0f} MiB/s, bad pages {move.bad_pages}"
    )


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], help="which ones [all]")
    parser.add_argument("repeats", type=int, nargs="?", default=3, help="migrations for each workload [3]")
    options = parser.parse_args()
    if missing := missing_packages():
        say(f"Real guests need these packages of the distribution: {' '.join(missing)}.")
        return MISSING
    try:
        print(json.dumps(asyncio.run(measure(options.workloads, options.repeats))))
    except RigError as error:
        say(f"The measurement failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
