"""The cells of the prediction campaign: settings in each of which the bound must hold, and not only on average.

A cell is a guest, a link, a number of channels, what else the host does, and whether the daemons are new. Its attempts
are migrations to and fro, each after a moment of running. In a cell with ``fresh`` daemons every attempt is the first
that they ever see.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from scripts.basics import MIB, ROOT
from scripts.rig.host import Host
from scripts.rig.network import Network
from scripts.rig.pair import Pair

FORCED_SHARE: Final = 0.25
WARM_UP_S: Final = 0.5


@dataclass(slots=True)
class Outcome:
    """One attempt of the campaign.

    Attributes:
        first: whether it was the first of its guest.
        forced: whether the guest was stopped in any case, which samples what a refusal would have hidden.
    """

    cell: str
    subject: str
    first: bool
    forced: bool
    limit_ms: float
    record: dict[str, Any]

    @property
    def actual_ns(self) -> int | None:
        """The downtime where the switchover was seen through."""
        downtime = self.record["downtime"]
        return int(downtime["measured_ns"]) if downtime is not None and self.record["outcome"] == "completed" else None


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting.

    Attributes:
        rate: of the kernel-shaped link between two network namespaces (``1gbit``); None for loopback.
        cap_mib: what the daemon paces itself to (MiB/s), 0 for nothing.
        neighbours: guests on the same host that run beside the one that is migrated.
        fresh: new daemons for every attempt.
        limit_ms: downtime limit.
        share: of the attempts of the other cells; a large guest takes long.
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


CELLS: Final = (
    Cell("demo guest, fresh daemons", 256, "hot-cold", 50, "demo", fresh=True),
    Cell("demo guest", 256, "hot-cold", 50, "demo"),
    Cell("demo guest, first-ever, 1 Gbit/s", 256, "hot-cold", 50, "demo", rate="1gbit", fresh=True),
    Cell("64 MiB idle", 64, "idle", 0),
    Cell("64 MiB idle, fresh daemons", 64, "idle", 0, fresh=True),
    Cell("256 MiB sequential, 4 channels", 256, "sequential", 30, channels=4),
    Cell("512 MiB random, 1 channel", 512, "random", 60, channels=1),
    Cell("512 MiB hot-cold, two busy neighbours", 512, "hot-cold", 40, neighbours=2),
    Cell("256 MiB phased", 256, "phased", 50, "cloud-hypervisor-small"),
    Cell("256 MiB devices only", 256, "idle", 0, "propolis-lab", limit_ms=900),
    Cell("256 MiB devices only, fresh daemons", 256, "idle", 0, "propolis-lab", limit_ms=900, fresh=True),
    Cell("128 MiB with a VF", 128, "random", 10, "qemu-33g-one-vf", limit_ms=900),
    Cell("256 MiB busy profile", 256, "random", 20, "busy", limit_ms=900),
    Cell("256 MiB random, paced to 100 MiB/s", 256, "random", 10, cap_mib=100),
    Cell("512 MiB random, 1 Gbit/s", 512, "random", 20, rate="1gbit", share=0.7),
    Cell("512 MiB random, 5 Gbit/s", 512, "random", 60, rate="5gbit"),
    Cell("1 GiB random", 1024, "random", 5, share=0.7),
    Cell("4 GiB hot-cold", 4096, "hot-cold", 100, share=0.5),
)
"""QEMU guests join them once a guest image can be had without building one."""


@contextlib.contextmanager
def hosts(cell: Cell) -> Iterator[Pair]:
    """Two new daemons on the cell's link."""
    with contextlib.ExitStack() as stack:
        if cell.rate is None:
            yield stack.enter_context(Pair())
        else:
            # Nobody else is in these namespaces, so nobody can listen.
            network = stack.enter_context(Network(cell.rate))
            yield stack.enter_context(Pair(network=network, tls={"insecure": True}))


@contextlib.asynccontextmanager
async def guest(cell: Cell, pair: Pair, seed: int) -> AsyncIterator[str]:
    """The cell's guest and its neighbours, on host a; gone at the end, wherever they are."""
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


async def move(cell: Cell, pair: Pair, source: Host, name: str, *, forced: bool) -> dict[str, Any]:
    """Migrate the guest to the other host. Returns the record.

    Args:
        forced: stop the guest after a moment although the bound may not fit, and enforce nothing.
    """
    parameters: dict[str, Any] = {
        "downtime_limit": cell.limit_ms,
        "max_bandwidth": cell.cap_mib * MIB,
        "multifd_channels": cell.channels,
        "timeout_s": 2.0 if forced else 30.0,
    }
    if forced:
        parameters |= {"on_timeout": "force", "switchover_abort": False}
    return await source.migrate(name, pair.other(source), **parameters)


async def attempts(cell: Cell, count: int, seed: int) -> list[Outcome]:
    """The attempts of a cell.

    Args:
        seed: of the guest's memory, and of which attempts are forced.
    """
    draw = random.Random(f"{seed} {cell.name}")
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        with hosts(cell) as pair:
            async with guest(cell, pair, draw.randrange(1 << 30)) as name:
                source = pair.a
                for number in range(1 if cell.fresh else count):
                    forced = draw.random() < FORCED_SHARE
                    await asyncio.sleep(WARM_UP_S)
                    record = await move(cell, pair, source, name, forced=forced)
                    outcomes.append(Outcome(cell.name, name, number == 0, forced, cell.limit_ms, record))
                    if record["outcome"] == "completed":
                        source = pair.other(source)
    return outcomes


async def all_attempts(count: int, seed: int, wanted: str, say: Callable[[str], None]) -> list[Outcome]:
    """The attempts of every cell whose name holds ``wanted``; one that cannot be made here is named and left out.

    Args:
        count: attempts in each, 0 for none.
    """
    outcomes: list[Outcome] = []
    for cell in CELLS if count else ():
        if wanted not in cell.name:
            continue
        if cell.rate is not None and (reason := Network.why_not()) is not None:
            say(f"cell left out: {cell.name}: {reason}")
            continue
        found = await attempts(cell, max(1, round(count * cell.share)), seed)
        outcomes += found
        say(f"cell {cell.name}: {figures(found).get(cell.name, 'no switchover')}")
    return outcomes


def figures(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float | int]]:
    """How the bound held in every cell that saw a switchover."""
    by_cell: dict[str, list[tuple[int, int, int]]] = {}
    for outcome in outcomes:
        actual_ns = outcome.actual_ns
        if actual_ns is not None:
            downtime = outcome.record["downtime"]
            figures_ns = (downtime["predicted_ns"], downtime["predicted_upper_ns"], actual_ns)
            by_cell.setdefault(outcome.cell, []).append(figures_ns)
    return {
        cell: {
            "switchovers": len(rows),
            "held": sum(actual <= upper for _, upper, actual in rows),
            "median_error_pct": round(
                median(100 * abs(predicted - actual) / actual for predicted, _, actual in rows), 2
            ),
            "median_error_ms": round(median(abs(predicted - actual) / 1e6 for predicted, _, actual in rows), 3),
            "bound_over_truth": round(median(upper / actual for _, upper, actual in rows), 3),
        }
        for cell, rows in by_cell.items()
    }
