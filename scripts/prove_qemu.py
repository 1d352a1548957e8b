"""The safety argument over real Linux guests in stock QEMU, and how long their moves keep them waiting.

    python -m scripts.prove_qemu matrix [--local] [PATTERN ...]            every step of a move x every fault
    python -m scripts.prove_qemu soak --migrations 100 --seed 1            moves with random faults
    python -m scripts.prove_qemu aborts --aborts 50                        loads that hang: how soon the guest is back
    python -m scripts.prove_qemu moves --moves 100 --memory 1GiB           there and back, every figure of every move
    python -m scripts.prove_qemu moves --moves 25 --records FILE           the same in slices, added to a file
    python -m scripts.prove_qemu summary FILE                              what all runs of the file show
    python -m scripts.prove_qemu moves --in-place --moves 50               the same, another QEMU on the same host
    python -m scripts.prove_qemu kinds [KIND ...]                          one there and back of every kind of guest
    python -m scripts.prove_qemu beside --memory 1GiB                      the same guests moved by QEMU itself

What is right is told by the guest: it checks its own pages, and its beats and the log on its disk show where it ran.
Progress goes to stderr; the last line on stdout is one JSON object. Exit code 1 when anything was violated, 3 when
packages are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

from migrated.vmm.qemu.definition import MemoryKind
from protocol.messages import FrameType
from protocol.units import parse_duration_ns, parse_size
from scripts import prove_aborts, prove_matrix, soak
from scripts.basics import MIB, say
from scripts.qemu_rig.beside import side_by_side
from scripts.qemu_rig.campaign import WORKLOADS, Campaign
from scripts.qemu_rig.campaign_figures import read_runs, summaries, summary
from scripts.qemu_rig.image import GuestImage, guest_image
from scripts.qemu_rig.kernel import missing_packages
from scripts.qemu_rig.launcher import Disk, Machine, QemuSpec
from scripts.qemu_rig.pair import GUEST, QemuPair
from scripts.qemu_rig.workload import Workload
from scripts.rig.faults import AtFrame, Stall
from scripts.rig.matrix import ALL_CELLS, LOCAL_CELLS, action_of, run_matrix

MISSING: Final = 3
QEMU_CELLS: Final = tuple(cell for cell in ALL_CELLS if not cell.step.name.startswith("time-"))
"""QEMU carries the guest's clocks in its device state: nothing is asked about them on the way."""
BACKINGS: Final[tuple[MemoryKind, ...]] = get_args(MemoryKind)
QEMU_LOCAL_CELLS: Final = tuple(cell for cell in LOCAL_CELLS if not cell.step.name.startswith("time-"))
_MEMORY_MIB: Final = 128
_WORKLOAD: Final = Workload.hot_cold(16, 5)
_LOG_MS: Final = 20
_STALL_S: Final = 2.0
_NS_PER_MS: Final = 1_000_000

Counts = dict[str, Any]


def small_guest(directory: Path) -> QemuSpec:
    """A guest that boots soon, writes all the while, and logs on a disk that both hosts open."""
    disk = Disk(directory / "disk", "none", log_ms=_LOG_MS)
    return replace(QemuSpec(memory_mib=_MEMORY_MIB, workload=_WORKLOAD), disk=disk)


def prove_qemu_matrix(options: argparse.Namespace, image: GuestImage, directory: Path) -> tuple[Counts, bool]:
    """Run the cells, one after the other."""
    cells = prove_matrix.chosen(options.patterns, QEMU_LOCAL_CELLS if options.local else QEMU_CELLS)
    spec = replace(small_guest(directory), backing="memfd") if options.local else small_guest(directory)
    judged = asyncio.run(run_matrix(cells, 1, say, lambda: QemuPair(spec, image, local=options.local)))
    violations = sum(len(one.violations) for one in judged)
    return {"cells": len(judged), "violations": violations}, not violations


def prove_qemu_soak(options: argparse.Namespace, image: GuestImage, directory: Path) -> tuple[Counts, bool]:
    """Run the soak."""
    pair = QemuPair(small_guest(directory), image)
    done = asyncio.run(soak.run(options.migrations, options.seed, pair, QEMU_CELLS))
    return {**done.document(), "outcomes": done.outcomes}, not done.violations


async def measure_aborts(aborts: int, pair: QemuPair) -> prove_aborts.Measured:
    """Force aborts: by turns QEMU is stopped as the state comes, and the way to it holds the state."""
    try:
        await asyncio.to_thread(pair.start)
        await pair.new_guest(pair.a, GUEST)
        frame = AtFrame(FrameType.DEVICE_STATE)
        stopped = action_of("stop-destination-vmm", pair.a, pair.b, GUEST)
        return await prove_aborts.force(
            pair, GUEST, aborts, {"QEMU stopped": (frame, stopped), "state held up": (frame, Stall(_STALL_S))}
        )
    finally:
        await asyncio.to_thread(pair.close)


def prove_qemu_aborts(options: argparse.Namespace, image: GuestImage, directory: Path) -> tuple[Counts, bool]:
    """Force the aborts."""
    measured = asyncio.run(measure_aborts(options.aborts, QemuPair(small_guest(directory), image)))
    return prove_aborts.judge(prove_aborts.together(measured, options.records))


def prove_moves(options: argparse.Namespace, image: GuestImage, directory: Path) -> tuple[Counts, bool]:
    """Move a guest there and back."""
    memory_mib = options.memory // MIB
    spec = QemuSpec(memory_mib=memory_mib, workload=WORKLOADS[options.workload](memory_mib), backing=options.backing)
    guest = f"{options.workload} {memory_mib} MiB {options.backing}{' in place' if options.in_place else ''}"
    campaign = Campaign(
        guest, options.moves, options.downtime_limit / _NS_PER_MS, in_place=options.in_place, records=options.records
    )
    asyncio.run(campaign.run(QemuPair(spec, image, quick=False)))
    return {"guest": guest, **summary([campaign.figures])}, not campaign.figures.violations


def sum_up(path: Path) -> tuple[Counts, bool]:
    """Put the runs of a file together."""
    found = summaries(read_runs(path))
    return {"guests": found}, not any(one["violations"] for one in found.values())


def _kinds(directory: Path) -> dict[str, QemuSpec]:
    """Guests of every kind that it can matter to, by name: where memory is, the machine, its devices."""
    plain = QemuSpec(workload=Workload.hot_cold(64, 20))
    disk = Disk(directory / "disk", "none", log_ms=_LOG_MS, read_mib=8)
    kinds = {
        f"{machine}-{backing}": replace(plain, machine=machine, backing=backing)
        for machine in get_args(Machine)
        for backing in BACKINGS
    }
    kinds |= {f"numa-{backing}": replace(plain, numa=True, backing=backing) for backing in BACKINGS}
    return kinds | {
        "without-virtio": replace(plain, network=False, rng=False),
        "disk-none": replace(plain, disk=disk),
        "disk-writeback": replace(plain, disk=replace(disk, cache="writeback")),
        "video-256MiB": replace(plain, video_mib=256),
        "two-vcpus": replace(plain, cpus=2),
        "around-the-pci-hole": replace(plain, memory_mib=4096),
        "around-the-pci-hole-file": replace(plain, memory_mib=4096, backing="file"),
    }


def _known_kind(name: str) -> str:
    """The name of a kind of guest, from the command line."""
    if name not in (known := _kinds(Path())):
        raise argparse.ArgumentTypeError(f"{name} is no kind of guest; those are {', '.join(known)}")
    return name


def prove_kinds(options: argparse.Namespace, image: GuestImage, directory: Path) -> tuple[Counts, bool]:
    """Move a guest of each kind there and back."""
    kinds = {name: spec for name, spec in _kinds(directory).items() if name in (options.kinds or (name,))}
    done: Counts = {}
    for name, spec in kinds.items():
        say(f"{name}:")
        campaign = Campaign(name, 2, options.downtime_limit / _NS_PER_MS, records=options.records)
        asyncio.run(campaign.run(QemuPair(spec, image, quick=False)))
        done[name] = summary([campaign.figures])
    violations = sum(one["violations"] for one in done.values())
    return {"kinds": done, "violations": violations}, not violations


def prove_beside(options: argparse.Namespace, image: GuestImage, directory: Path) -> tuple[Counts, bool]:
    """Move guests in both ways. Nothing is violated by being slower: that is for the reader to judge."""
    memory_mib = options.memory // MIB
    specs = {
        name: QemuSpec(memory_mib=memory_mib, workload=WORKLOADS[name](memory_mib), backing=options.backing)
        for name in options.workloads
    }
    limit_ms = options.downtime_limit // _NS_PER_MS
    found = asyncio.run(side_by_side(specs, image, directory, options.repeats, limit_ms))
    return {"memory_mib": memory_mib, "guests": found}, not any(one["ours"]["violations"] for one in found.values())


def command_line() -> argparse.ArgumentParser:
    """What this program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, dest="part")
    matrix = parts.add_parser("matrix", help="every step x every fault")
    matrix.add_argument("patterns", nargs="*", metavar="PATTERN", help="part of a cell's name, for example commit/cut")
    matrix.add_argument("--local", action="store_true", help="over unix sockets: memory is handed over, not copied")
    matrix.set_defaults(prove=prove_qemu_matrix)
    moves_and_faults = parts.add_parser("soak", help="moves back and forth with random faults")
    soak.add_arguments(moves_and_faults)
    moves_and_faults.set_defaults(prove=prove_qemu_soak, migrations=100)
    aborts = parts.add_parser("aborts", help="how precisely an abort gives the guest back")
    aborts.add_argument("--aborts", type=int, default=50, help="how many (default %(default)s)")
    prove_aborts.add_records_argument(aborts)
    aborts.set_defaults(prove=prove_qemu_aborts)
    moves = parts.add_parser("moves", help="there and back without faults, every figure of every move")
    moves.add_argument("--moves", type=int, default=100, help="how many (default %(default)s)")
    moves.add_argument("--in-place", action="store_true", help="another QEMU on the same host, each time")
    moves.add_argument("--workload", choices=WORKLOADS, default="hot-cold", help="(default %(default)s)")
    moves.set_defaults(prove=prove_moves)
    kinds = parts.add_parser("kinds", help="one there and back of every kind of guest")
    kinds.add_argument("kinds", nargs="*", metavar="KIND", type=_known_kind, help="all, unless named")
    kinds.add_argument(
        "--downtime-limit", type=parse_duration_ns, default="300ms", help="of every move (default %(default)s)"
    )
    kinds.set_defaults(prove=prove_kinds)
    for part in (moves, kinds):
        part.add_argument("--records", type=Path, metavar="FILE", help="add the run's figures to this file")
    summed_up = parts.add_parser("summary", help="what all runs of a file show, each kind of guest for itself")
    summed_up.add_argument("file", type=Path, metavar="FILE", help="of --records")
    beside = parts.add_parser("beside", help="the same guests moved by QEMU itself")
    beside.add_argument("--repeats", type=int, default=4, help="moves in each way (default %(default)s)")
    beside.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], help="(default all)")
    beside.set_defaults(prove=prove_beside)
    for part, limit in ((moves, "100ms"), (beside, "300ms")):
        part.add_argument("--memory", type=parse_size, default="1GiB", help="of the guest (default %(default)s)")
        part.add_argument("--backing", choices=BACKINGS, default="private", help="of its memory (default %(default)s)")
        part.add_argument(
            "--downtime-limit", type=parse_duration_ns, default=limit, help="of every move (default %(default)s)"
        )
    return parser


def main() -> int:
    """Run one part."""
    options = command_line().parse_args()
    if options.part == "summary":
        return tell(*sum_up(options.file))
    if missing := missing_packages():
        say(f"Real guests need these packages of the distribution: {' '.join(missing)}.")
        return MISSING
    # Daemons and guests must not outlive a run that is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    prove: Callable[[argparse.Namespace, GuestImage, Path], tuple[Counts, bool]] = options.prove
    with tempfile.TemporaryDirectory(prefix="qp-") as directory:
        done = prove(options, guest_image(), Path(directory))
    load = [round(average, 2) for average in os.getloadavg()]
    return tell({**done[0], "load": load}, done[1])


def tell(counts: Counts, held: bool) -> int:
    """Print the document of a run. Returns the exit code."""
    print(json.dumps(counts))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
