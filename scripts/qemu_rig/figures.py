"""What a demonstration of QEMU guests tells: moves by the daemons beside QEMU's own of the same guest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table

from migrated.cli.style import duration
from scripts.basics import MIB
from scripts.qemu_rig.baseline import Baseline
from scripts.qemu_rig.gaps import Gap

_MS_NS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Move:
    """One move by the daemons: the completed record of it, and the silence that was heard from outside."""

    record: Mapping[str, Any]
    gap: Gap


def beyond_record_ns(move: Move, beat_ns: int) -> int:
    """By how much the guest was silent for longer than its record explains: more than the upper bound of the downtime
    and two beats, the one before the stop and the one after it. Not above 0 when the record is right and the host is
    quiet."""
    upper_ns: int = move.record["downtime"]["upper_ns"]
    return move.gap.ns - upper_ns - 2 * beat_ns


def document(moves: Sequence[Move], baseline: Baseline) -> dict[str, Any]:
    """The last line of ``make demo-qemu``."""
    return {
        "demo": "ok",
        "migrations": [dict(move.record) for move in moves],
        "qemu": {
            "reported_downtime_ms": baseline.reported_downtime_ms,
            "observed_gap_ms": baseline.observed_gap_ns / _MS_NS,
            "total_ms": baseline.total_ms,
        },
        "observed_gap_ms": [move.gap.ns / _MS_NS for move in moves],
    }


def comparison(moves: Mapping[str, Move], baseline: Baseline) -> Table:
    """A table for people; ``moves`` by what they are called."""
    table = Table("move", "limit", "reported downtime", "guest was silent for", "total", "memory moved at")
    for name, move in moves.items():
        downtime, total_ns = move.record["downtime"], move.record["total_ns"]
        table.add_row(
            name,
            duration(downtime["limit_ns"]),
            duration(downtime["measured_ns"]),
            duration(move.gap.ns),
            duration(total_ns),
            f"{move.record['ram']['total_bytes'] / MIB / (total_ns / 1e9):.0f} MiB/s",
        )
    table.add_row(
        "QEMU's own",
        f"{duration(baseline.limit_ms * _MS_NS)}, not enforced",
        duration(baseline.reported_downtime_ms * _MS_NS),
        duration(baseline.observed_gap_ns),
        duration(baseline.total_ms * _MS_NS),
        f"{baseline.ram_mib_per_s:.0f} MiB/s",
    )
    return table
