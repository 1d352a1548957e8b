"""Many moves of one guest there and back, and every figure of each: what the record says, and what the guest noticed.

beats on the source ...|                                   silent: last beat there to first beat here
                       |  ... beats on the destination     then: "check", and every page is looked at
record                 [lower, upper]                      the guest's clock stood for so long, but for two beats

For the rest of its silence the guest ran: an emulated one's code is translated anew, and it may wait for a CPU.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.basics import MIB, say
from scripts.qemu_rig.figures import beyond_record_ns
from scripts.qemu_rig.gaps import clock_stood_ns, handover_gap
from scripts.qemu_rig.pair import GUEST, QemuPair
from scripts.qemu_rig.workload import Workload, usable_mib
from scripts.rig.host import Host

WORKLOADS: Final[Mapping[str, Callable[[int], Workload]]] = {
    "idle": lambda memory_mib: Workload.idle(usable_mib(memory_mib)),
    "hot-cold": lambda memory_mib: Workload.hot_cold(usable_mib(memory_mib)),
    "heavy": lambda memory_mib: Workload.heavy(usable_mib(memory_mib)),
}
"""Workloads by name, each a function of the guest's memory (MiB)."""
_WARM_BEATS: Final = 100
_WARM_S: Final = 60.0
_NS_PER_MS: Final = 1_000_000


@dataclass(slots=True)
class Campaign:
    """So many moves, each under the same limit, and what came of them.

    Attributes:
        moves: how many.
        downtime_limit_ms: of each.
        in_place: the guest stays on its host and gets another QEMU each time; memory is handed over from the second
            one on, and from the first where it is in a file.
        downtimes_ms: of the moves that completed, as their records say.
        gaps_ms: how long the guest was heard by nobody.
        totals_ms: from the command to the end.
        ram_mib_per_s: the guest's memory as a whole, over the time from the first round to the end.
        late: moves whose record says that the limit was violated.
        stood_ms: by how much the guest's clock fell behind: how long it was stopped, as it sees it itself.
        beyond_ms: how far that lies outside of the record's interval and two beats; not above 0 when right.
        violations: what must not be, as sentences.
    """

    moves: int
    downtime_limit_ms: float
    in_place: bool = False
    downtimes_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    stood_ms: list[float] = field(default_factory=list)
    totals_ms: list[float] = field(default_factory=list)
    ram_mib_per_s: list[float] = field(default_factory=list)
    late: int = 0
    beyond_ms: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    async def run(self, pair: QemuPair) -> None:
        """Start the hosts and the guest, move it, and close everything."""
        try:
            await asyncio.to_thread(pair.start)
            await pair.new_guest(pair.a, GUEST)
            source: Host = pair.a
            for number in range(self.moves):
                if await self._move(pair, source, number) and not self.in_place:
                    source = pair.other(source)
            self.violations += pair.double_runs() + await pair.leftovers()
        finally:
            await asyncio.to_thread(pair.close)
        for violation in self.violations:
            say(f"VIOLATION: {violation}")

    async def _move(self, pair: QemuPair, source: Host, number: int) -> bool:
        """One move. Returns whether the guest is at the other host now."""
        before = await pair.console(source)
        await asyncio.to_thread(before.wait_for_beats, _WARM_BEATS, _WARM_S)
        target = source if self.in_place else pair.other(source)
        if self.in_place:
            record = await source.replace(GUEST, downtime_limit=self.downtime_limit_ms)
        else:
            record = await source.migrate(GUEST, target, downtime_limit=self.downtime_limit_ms)
        completed = bool(record["outcome"] == "completed")
        found = [] if completed else [f"it is {record['outcome']}: {record['reason']}"]
        at = target if completed else source
        verdict = await at.verify(GUEST)
        if not verdict["ok"]:
            found.append(str(verdict["message"]))
        if completed:
            found += await self._figures(pair, record, before.beats(), target, number)
        self.violations += [f"move {number}: {one}" for one in found]
        return completed

    async def _figures(
        self, pair: QemuPair, record: dict[str, Any], before: Any, target: Host, number: int
    ) -> list[str]:
        """Take down the figures of a completed move. Returns what is wrong with them."""
        after, downtime, digest = (await pair.console(target)).beats(), record["downtime"], record["digest"]
        gap, stood_ns = handover_gap(before, after), clock_stood_ns(before, after)
        beyond_ns = beyond_record_ns(downtime, stood_ns, pair.spec.workload.beat_us * 1000)
        self.downtimes_ms.append(downtime["measured_ns"] / _NS_PER_MS)
        self.gaps_ms.append(gap.ns / _NS_PER_MS)
        self.stood_ms.append(stood_ns / _NS_PER_MS)
        self.totals_ms.append(record["total_ns"] / _NS_PER_MS)
        moving_s = (record["total_ns"] - record["setup_ns"]) / 1e9
        self.ram_mib_per_s.append(record["ram"]["total_bytes"] / MIB / moving_s)
        self.beyond_ms.append(beyond_ns / _NS_PER_MS)
        self.late += downtime["limit_violated"]
        say(
            f"{len(self.gaps_ms):4} downtime {self.downtimes_ms[-1]:7.2f} ms, "
            f"bound {(downtime['predicted_upper_ns'] or 0) / _NS_PER_MS:7.2f} ms, "
            f"guest's clock stood {self.stood_ms[-1]:7.2f} ms, silent {self.gaps_ms[-1]:7.2f} ms, "
            f"total {self.totals_ms[-1]:7.0f} ms"
        )
        found = []
        if downtime["limit_violated"]:
            found.append(f"downtime {self.downtimes_ms[-1]:.3f} ms is beyond the limit")
        if self.in_place and number and not record["ram"]["shared"]:
            found.append("memory that is in a file was copied")
        if not record["ram"]["shared"] and (not digest["source"] or digest["source"] != digest["destination"]):
            found.append(f"digests differ or lack: {digest}")
        if gap.ns < stood_ns or beyond_ns > 0:
            found.append(
                f"the guest's clock stood for {self.stood_ms[-1]:.3f} ms in a silence of {self.gaps_ms[-1]:.3f} ms; "
                f"the record says {downtime['lower_ns'] / _NS_PER_MS:.3f} to {downtime['upper_ns'] / _NS_PER_MS:.3f} ms"
            )
        return found

    def document(self) -> dict[str, Any]:
        """The figures of all moves."""
        return {
            "moves": self.moves,
            "completed": len(self.downtimes_ms),
            "late": self.late,
            "downtime_ms": _spread(self.downtimes_ms),
            "clock_stood_ms": _spread(self.stood_ms),
            "gap_ms": _spread(self.gaps_ms),
            "beyond_record_ms": _spread(self.beyond_ms),
            "total_ms": _spread(self.totals_ms),
            "ram_mib_per_s": round(statistics.median(self.ram_mib_per_s), 1) if self.ram_mib_per_s else None,
            "violations": len(self.violations),
        }


def _spread(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum; empty without values."""
    if not values:
        return {}
    ranked = sorted(values)
    chosen = {"p50": statistics.median(ranked), "p99": ranked[math.ceil(0.99 * len(ranked)) - 1], "max": ranked[-1]}
    return {name: round(value, 3) for name, value in chosen.items()}
