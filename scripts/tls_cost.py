"""What TLS costs: pairs of daemons with and without certificates move the same guest, interleaved.

    python -m scripts.tls_cost --size-mib 1024 --repeats 5 --switchovers 20

What happened goes to stderr; the last line on stdout is one JSON object: for ``plain`` and ``tls`` the medians of
throughput (GiB/s), CPU of the sending and of the receiving daemon (s per GiB, user and system) and downtime (ms) of an
idle guest, then ``throughput_ratio`` (TLS to plain) and ``downtime_added_ms``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from scripts.authority import Authority
from scripts.basics import GIB, MIB, say
from scripts.bench.cases import moving_s
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import RigError, until

GUEST: Final = "bulk"
SMALL: Final = "small"
SMALL_MIB: Final = 64
CHANNELS: Final = 2
DOWNTIME_LIMIT_MS: Final = 5_000
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, user and system (s)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def secured(pair: Pair, directory: Path) -> Pair:
    """The pair, whose hosts will start with certificates of one authority."""
    authority = Authority(directory)
    for host in pair.hosts:
        host.configure(tls=authority.host(f"{host.name}.example", host.address).section())
    return pair


class Side:
    """One of the two pairs, and what was measured with it.

    Args:
        pair: started.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.figures: dict[str, list[float]] = defaultdict(list)

    async def begin(self, size_mib: int) -> None:
        """Start the guests; the large one is full of content that does not compress, and stands still."""
        (self.pair.directory / "full.toml").write_text(
            '[guest]\nworkload = "idle"\ntouched = "100%"\n', encoding="utf-8"
        )
        await self.pair.a.create_guest(GUEST, size_mib, profile="full")
        await self.pair.a.create_guest(SMALL, SMALL_MIB, workload="idle")

        async def booted() -> bool:
            return not (await self.pair.a.guest(GUEST))["booting"]

        await until(f"guest {GUEST} has booted", booted, 120.0)

    async def bulk(self, size_mib: int) -> None:
        """Move the large guest once."""
        here = await self._host_of(GUEST)
        away = self.pair.other(here)
        before_s = {host.name: cpu_s(host.pid) for host in (here, away)}
        record = await self._moved(here, GUEST)
        gib = size_mib * MIB / GIB
        self.figures["gib_per_s"].append(gib / moving_s(record))
        self.figures["source_cpu_s_per_gib"].append((cpu_s(here.pid) - before_s[here.name]) / gib)
        self.figures["destination_cpu_s_per_gib"].append((cpu_s(away.pid) - before_s[away.name]) / gib)

    async def switchover(self) -> None:
        """Move the small guest once."""
        record = await self._moved(await self._host_of(SMALL), SMALL)
        self.figures["downtime_ms"].append(record["downtime"]["measured_ns"] / 1e6)

    def medians(self) -> dict[str, float]:
        """The figures."""
        return {name: statistics.median(samples) for name, samples in self.figures.items()}

    async def _host_of(self, guest: str) -> Host:
        return self.pair.a if guest in await self.pair.a.guests() else self.pair.b

    async def _moved(self, here: Host, guest: str) -> dict[str, Any]:
        record = await here.migrate(
            guest, self.pair.other(here), downtime_limit=DOWNTIME_LIMIT_MS, multifd_channels=CHANNELS
        )
        if record["outcome"] != "completed":
            raise RigError(f"a migration of {guest} is {record['outcome']}: {record['reason']}")
        return record


async def compare(plain: Pair, tls: Pair, size_mib: int, repeats: int, switchovers: int) -> dict[str, Any]:
    """Measure both pairs in turn, so that what disturbs the machine disturbs both."""
    sides = {"plain": Side(plain), "tls": Side(tls)}
    for side in sides.values():
        await side.begin(size_mib)
    for number in range(1, repeats + 1):
        for name, side in sides.items():
            await side.bulk(size_mib)
            say(f"{number}: {name} {side.figures['gib_per_s'][-1]:.2f} GiB/s")
    for _ in range(switchovers):
        for side in sides.values():
            await side.switchover()
    found = {name: side.medians() for name, side in sides.items()}
    return {
        **found,
        "throughput_ratio": found["tls"]["gib_per_s"] / found["plain"]["gib_per_s"],
        "downtime_added_ms": found["tls"]["downtime_ms"] - found["plain"]["downtime_ms"],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=1024, help="memory of the large guest (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="moves of it with each pair (default %(default)s)")
    parser.add_argument("--switchovers", type=int, default=20, help="of a small guest (default %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pki-") as directory:
        plain, tls = Pair(log={"level": "info"}), secured(Pair(log={"level": "info"}), Path(directory))
        for pair in (plain, tls):
            for host in pair.hosts:
                host.configure(vmm={"profiles": str(pair.directory)})  # daemons take profiles from there only
        with plain, tls:
            found = asyncio.run(compare(plain, tls, options.size_mib, options.repeats, options.switchovers))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
