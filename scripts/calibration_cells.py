"""The cells of the prediction campaign: settings in each of which the bound must hold, and not only on average.

A cell is a guest, a link, a number of channels, what else the host does, and whether the daemons are new. Its attempts
are migrations to and fro, each after a moment of running. In a cell with ``fresh`` daemons each daemon makes one move:
the first that it ever made. Constants are chosen on ``CELLS``; ``CHECKS`` are others, on which nothing is chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from scripts.basics import MIB, ROOT
from scripts.calibration_figures import by_cell
from scripts.calibration_records import Outcome, Part, RecordsFile, load_now
from scripts.qemu_rig.image import guest_image
from scripts.qemu_rig.kernel import missing_packages
from scripts.qemu_rig.launcher import QemuSpec
from scripts.qemu_rig.pair import GUEST, QemuPair
from scripts.qemu_rig.workload import Workload
from scripts.rig.host import Host
from scripts.rig.network import Network
from scripts.rig.pair import Pair

FORCED_SHARE: Final = 0.25
WARM_UP_S: Final = 0.5
_WAYS: Final = 2
"""There and back: with new daemons each of the two is a first move of its daemon."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting.

    Attributes:
        rate: of the kernel-shaped link between two network namespaces (``1gbit``); None for loopback.
        cap_mib: what the daemon paces itself to (MiB/s), 0 for nothing.
        neighbours: guests on the same host that run beside the one that is migrated.
        fresh: new daemons for every two attempts, there and back.
        limit_ms: downtime limit.
        share: of the attempts of the other cells; a large guest takes long.
        goals: values of ``downtime_goal``, attempt after attempt.
        qemu: a Linux guest in stock QEMU instead of a simulated one; it fills half of its memory.
    """

    name: str
    memory_mib: int
    workload: str
    dirty_mib: float
    profile: str | None = None
    rate: str | None = None
    cap_mib: int = 0
    channels: int = 2
    neighbours: int = 0
    fresh: bool = False
    limit_ms: float = 300.0
    share: float = 1.0
    goals: tuple[str, ...] = ("least",)
    qemu: bool = False

    def why_not(self) -> str | None:
        """Why its attempts cannot be made on this machine, None when they can."""
        if self.qemu:
            missing = missing_packages()
            return f"it needs these packages of the distribution: {', '.join(missing)}" if missing else None
        return Network.why_not() if self.rate is not None else None


BOTH_GOALS: Final = ("least", "first-fit")
DEMO: Final = "make-demo"
"""The cell that is ``scripts.demo`` itself."""

CELLS: Final = (
    Cell("demo-guest-fresh", 256, "hot-cold", 50, "demo", fresh=True),
    Cell("demo-guest", 256, "hot-cold", 50, "demo"),
    Cell("demo-guest-1gbit-fresh", 256, "hot-cold", 50, "demo", rate="1gbit", fresh=True),
    Cell("idle-64", 64, "idle", 0),
    Cell("idle-64-fresh", 64, "idle", 0, fresh=True),
    Cell("sequential-256-4-channels", 256, "sequential", 30, channels=4),
    Cell("random-512-1-channel", 512, "random", 60, channels=1),
    Cell("random-384-fresh", 384, "random", 60, fresh=True),
    Cell("hot-cold-512-neighbours", 512, "hot-cold", 40, neighbours=2),
    Cell("phased-256", 256, "phased", 50, "cloud-hypervisor-small"),
    Cell("devices-256", 256, "idle", 0, "propolis-lab", limit_ms=900),
    Cell("devices-256-fresh", 256, "idle", 0, "propolis-lab", limit_ms=900, fresh=True),
    Cell("vf-128", 128, "random", 10, "qemu-33g-one-vf", limit_ms=900),
    Cell("busy-profile-256", 256, "random", 20, "busy", limit_ms=900),
    Cell("random-256-paced-100", 256, "random", 10, cap_mib=100),
    Cell("random-384-paced-150", 384, "random", 30, cap_mib=150, goals=BOTH_GOALS),
    Cell("random-512-1gbit", 512, "random", 20, rate="1gbit", goals=BOTH_GOALS),
    Cell("hot-cold-512-paced-200", 512, "hot-cold", 60, cap_mib=200, goals=BOTH_GOALS),
    Cell("random-512-5gbit", 512, "random", 60, rate="5gbit"),
    Cell("random-1024", 1024, "random", 20),
    Cell("hot-cold-4096", 4096, "hot-cold", 100, share=0.5),
)
CHECKS: Final = (
    Cell(DEMO, 256, "hot-cold", 100, "demo", fresh=True),
    Cell("check-random-1024", 1024, "random", 5),
    Cell("check-random-512-1-channel", 512, "random", 150, channels=1),
    Cell("check-neighbours", 512, "hot-cold", 60, neighbours=2),
    Cell("check-1gbit", 384, "random", 15, rate="1gbit"),
    Cell("check-5gbit", 512, "random", 40, rate="5gbit"),
    Cell("check-devices-600-ms", 1024, "random", 5, "propolis-lab", limit_ms=600, fresh=True),
    Cell("check-qemu-256-fresh", 256, "hot-cold", 20, limit_ms=100, fresh=True, qemu=True),
    Cell("check-qemu-1024", 1024, "hot-cold", 20, limit_ms=100, qemu=True),
)


@contextlib.contextmanager
def hosts(cell: Cell) -> Iterator[Pair]:
    """Two new daemons on the cell's link."""
    with contextlib.ExitStack() as stack:
        if cell.qemu:
            memory_mib, rate_mib = cell.memory_mib, int(cell.dirty_mib)
            spec = QemuSpec(memory_mib, Workload.hot_cold(memory_mib // 2, rate_mib))
            yield stack.enter_context(QemuPair(spec, guest_image(), quick=False))
        elif cell.rate is None:
            yield stack.enter_context(Pair())
        else:
            # Nobody else is in these namespaces, so nobody can listen.
            network = stack.enter_context(Network(cell.rate))
            yield stack.enter_context(Pair(network=network, tls={"insecure": True}))


@contextlib.asynccontextmanager
async def guest(cell: Cell, pair: Pair, seed: int) -> AsyncIterator[str]:
    """The cell's guest and its neighbours, on host a; gone at the end, wherever they are."""
    if isinstance(pair, QemuPair):
        await pair.new_guest(pair.a, GUEST)
        yield GUEST
        await pair.remove_guests()
        return
    arguments: dict[str, Any] = {"workload": cell.workload, "seed": seed}
    if cell.dirty_mib:
        arguments["dirty_rate_bytes_per_s"] = int(cell.dirty_mib * MIB)
    if cell.profile is not None:
        arguments["profile"] = str(ROOT / "configs" / "guests" / f"{cell.profile}.toml")
    for number in range(cell.neighbours):
        await pair.a.create_guest(
            f"neighbour-{number}", 64, workload="random", dirty_rate_bytes_per_s=100 * MIB, seed=seed + number + 1
        )
    await pair.a.create_guest("subject", cell.memory_mib, **arguments)
    try:
        yield "subject"
    finally:
        for host in (pair.a, pair.b):
            for name, row in (await host.guests()).items():
                if row["state"] != "retired":
                    await host.command("x-migrated-guest-destroy", {"guest": name})


async def move(cell: Cell, source: Host, target: Host, name: str, goal: str, *, forced: bool) -> dict[str, Any]:
    """Migrate the guest to the other host. Returns the record.

    Args:
        goal: ``downtime_goal``.
        forced: stop the guest after a moment although the bound may not fit, and enforce nothing.
    """
    parameters: dict[str, Any] = {
        "downtime_limit": cell.limit_ms,
        "downtime_goal": goal,
        "max_bandwidth": cell.cap_mib * MIB,
        "multifd_channels": cell.channels,
        "timeout_s": 2.0 if forced else 30.0,
    }
    if forced:
        parameters |= {"on_timeout": "force", "switchover_abort": False}
    return await source.migrate(name, target, **parameters)


async def attempts(cell: Cell, part: Part, first: int, count: int, seed: int) -> AsyncIterator[Outcome]:
    """Make attempts of a cell: those with the numbers ``first`` to ``count``.

    Args:
        seed: of the guest's memory, and of which attempts are forced.
    """
    draw = random.Random(f"{seed} {cell.name} {first}")
    number = first
    while number < count:
        with hosts(cell) as pair:
            async with guest(cell, pair, draw.randrange(1 << 30)) as name:
                source, met, began = pair.a, set[Host](), number
                for _ in range(_WAYS if cell.fresh else count - first):
                    forced = draw.random() < FORCED_SHARE
                    await asyncio.sleep(WARM_UP_S)
                    load = load_now()
                    goal = cell.goals[number % len(cell.goals)]
                    record = await move(cell, source, pair.other(source), name, goal, forced=forced)
                    first, first_ever = number == began, source not in met
                    yield Outcome(
                        part, cell.name, seed, name, first, first_ever, forced, cell.limit_ms, load, record
                    )  # fmt: skip
                    number += 1
                    met.add(source)
                    if record["outcome"] == "completed":
                        source = pair.other(source)


async def demos(cell: Cell, part: Part, first: int, count: int, seed: int) -> AsyncIterator[Outcome]:
    """``scripts.demo`` as a user runs it, two moves each time: the first that its daemons ever made. It tries again
    where a limit was not kept, and tells of the attempts that completed."""
    for _ in range(first, count, _WAYS):
        load = load_now()
        with tempfile.TemporaryDirectory(prefix="demo-") as directory:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "scripts.demo", "--output", directory,
                cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                output, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.terminate()
                    await process.wait()
        document = json.loads(output.splitlines()[-1])
        for record in document.get("migrations", ()):
            yield Outcome(part, cell.name, seed, "web", True, True, False, cell.limit_ms, load, record)


async def run_cells(
    count: int, seed: int, wanted: frozenset[str], file: RecordsFile, say: Callable[[str], None]
) -> None:
    """Make the attempts that are missing in the file, cell by cell. One that cannot be made here is named and left out.

    Args:
        count: attempts in each cell.
        wanted: names of cells; empty for all.
    """
    parts: tuple[tuple[Part, tuple[Cell, ...]], ...] = (("cell", CELLS), ("check", CHECKS))
    for part, cell in ((part, cell) for part, cells in parts for cell in cells):
        if wanted and cell.name not in wanted:
            continue
        if (reason := cell.why_not()) is not None:
            say(f"cell left out: {cell.name}: {reason}")
            continue
        make = demos if cell.name == DEMO else attempts
        async for outcome in make(cell, part, file.done(seed)[cell.name], max(1, round(count * cell.share)), seed):
            file.add(outcome)
        row = by_cell(o for o in file.outcomes if o.cell == cell.name).get(cell.name, "no switchover")
        say(f"cell {cell.name}: {row}")
