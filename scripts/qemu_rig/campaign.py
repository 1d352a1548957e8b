"""Many moves of one guest there and back, and every figure of each: what the record says, and what the guest noticed.

beats on the source ...|                                   silent: last beat there to first beat here
                       |  ... beats on the destination     then: "check", and every page is looked at
record                 [lower, upper]                      the guest's clock stood for so long, but for two beats

For the rest of its silence the guest ran: an emulated one's code is translated anew, and it may wait for a CPU.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from scripts.basics import MIB, say
from scripts.qemu_rig.campaign_figures import MoveFigures, RunFigures
from scripts.qemu_rig.console import Beat
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


class Campaign:
    """So many moves of one guest, each under the same limit.

    Args:
        guest: what kind of guest it is, in words.
        moves: how many.
        downtime_limit_ms: of each.
        in_place: the guest stays on its host and gets another QEMU each time; memory is handed over from the second
            one on, and from the first where it is in a file.
        records: the file that the run is added to, if any.

    Attributes:
        figures: what came of it so far.
    """

    def __init__(
        self, guest: str, moves: int, downtime_limit_ms: float, *, in_place: bool = False, records: Path | None = None
    ) -> None:
        self._moves = moves
        self._in_place = in_place
        self._records = records
        self.figures = RunFigures(guest, downtime_limit_ms, load=os.getloadavg()[0])

    async def run(self, pair: QemuPair) -> None:
        """Start the hosts and the guest, move it, and close everything."""
        try:
            await asyncio.to_thread(pair.start)
            await pair.new_guest(pair.a, GUEST)
            source: Host = pair.a
            for number in range(self._moves):
                if await self._move(pair, source, number) and not self._in_place:
                    source = pair.other(source)
            self.figures.violations += pair.double_runs() + await pair.leftovers()
            self.figures.finished = True
        finally:
            await asyncio.to_thread(pair.close)
            if self._records is not None:
                self.figures.append_to(self._records)
        for violation in self.figures.violations:
            say(f"VIOLATION: {violation}")

    async def _move(self, pair: QemuPair, source: Host, number: int) -> bool:
        """One move. Returns whether the guest is at the other host now."""
        before = await pair.console(source)
        await asyncio.to_thread(before.wait_for_beats, _WARM_BEATS, _WARM_S)
        target = source if self._in_place else pair.other(source)
        self.figures.attempts += 1
        limit_ms = self.figures.downtime_limit_ms
        if self._in_place:
            record = await source.replace(GUEST, downtime_limit=limit_ms)
        else:
            record = await source.migrate(GUEST, target, downtime_limit=limit_ms)
        completed = bool(record["outcome"] == "completed")
        found = [] if completed else [f"it is {record['outcome']}: {record['reason']}"]
        at = target if completed else source
        verdict = await at.verify(GUEST)
        if not verdict["ok"]:
            found.append(str(verdict["message"]))
        if completed:
            after = (await pair.console(target)).beats()
            found += self._judge(record, before.beats(), after, pair.spec.workload.beat_us * 1000, number)
        self.figures.violations += [f"move {number}: {one}" for one in found]
        return completed

    def _judge(
        self, record: dict[str, Any], before: Sequence[Beat], after: Sequence[Beat], beat_ns: int, number: int
    ) -> list[str]:
        """Take down the figures of a completed move. Returns what is wrong with them."""
        figures = figures_of(record, before, after, beat_ns)
        self.figures.moves.append(figures)
        say(f"{len(self.figures.moves):4} {figures.line()}")
        downtime, digest, shared = record["downtime"], record["digest"], record["ram"]["shared"]
        found = []
        if figures.late:
            found.append(f"downtime {figures.downtime_ms:.3f} ms is beyond the limit")
        if self._in_place and number and not shared:
            found.append("memory that is in a file was copied")
        if not shared and (not digest["source"] or digest["source"] != digest["destination"]):
            found.append(f"digests differ or lack: {digest}")
        # The silence tells less: who listens here has no precedence, and may hear the last beat before it late.
        if figures.beyond_ms > 0:
            found.append(
                f"the guest's clock stood for {figures.stood_ms:.3f} ms; the record says "
                f"{downtime['lower_ns'] / _NS_PER_MS:.3f} to {downtime['upper_ns'] / _NS_PER_MS:.3f} ms"
            )
        return found


def figures_of(record: Mapping[str, Any], before: Sequence[Beat], after: Sequence[Beat], beat_ns: int) -> MoveFigures:
    """The figures of a completed move.

    Args:
        record: the document of it.
        before, after: the guest's beats at the source and at the destination.
        beat_ns: their period.

    Raises:
        RigError: the beats tell of no gap.
    """
    downtime, bound_ns = record["downtime"], record["downtime"]["predicted_upper_ns"]
    stood_ns = clock_stood_ns(before, after)
    moving_s = (record["total_ns"] - record["setup_ns"]) / 1e9
    return MoveFigures(
        downtime_ms=downtime["measured_ns"] / _NS_PER_MS,
        bound_ms=None if bound_ns is None else bound_ns / _NS_PER_MS,
        late=bool(downtime["limit_violated"]),
        stood_ms=stood_ns / _NS_PER_MS,
        beyond_ms=beyond_record_ns(downtime, stood_ns, beat_ns) / _NS_PER_MS,
        gap_ms=handover_gap(before, after).ns / _NS_PER_MS,
        total_ms=record["total_ns"] / _NS_PER_MS,
        ram_mib_per_s=record["ram"]["total_bytes"] / MIB / moving_s,
        parts_ms={part["name"]: part["ns"] / _NS_PER_MS for part in downtime["parts"]},
        predicted_parts_ms={name: ns / _NS_PER_MS for name, ns in downtime["predicted_parts_ns"].items()},
        scale_ms=downtime["predicted_scale_ns"] / _NS_PER_MS,
    )
