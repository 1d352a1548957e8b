"""Figures of a demonstration: moves of QEMU guests by the daemons, beside QEMU's own of the same guest.

promised     the limit
reported     the downtime, by who moved it
noticed      how long the guest's beats, heard from outside, were silent, and how much of that its clock stood
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table

from migrated.cli.style import duration
from migrated.record.parts import Part
from migrated.report.markup import Markup, el, join
from migrated.report.pieces import note, table
from scripts.basics import MIB
from scripts.qemu_rig.baseline import Baseline
from scripts.qemu_rig.gaps import Gap

_MS_NS: Final = 1_000_000
HEADS: Final = ("move", "promised", "reported", "its clock stood", "it was silent", "in all", "its memory moved at")
EXPLANATION: Final = (
    "Silent: from its last beat before the move to its first one after it, as heard from outside. Its clock stood "
    "while it was stopped (told with the time that a beat takes to be heard); for the rest it ran and was slow: where "
    "it arrives its code is translated anew, and it waits for a CPU."
)
_NOTHING: Final = "-"


@dataclass(frozen=True, slots=True)
class Move:
    """One move by the daemons: the completed record of it, and the silence that was heard from outside."""

    record: Mapping[str, Any]
    gap: Gap


@dataclass(frozen=True, slots=True)
class Failure:
    """A migration by QEMU itself that failed, or that the guest did not survive; the sentence says how."""

    limit_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """One guest, moved by the daemons and by QEMU.

    Attributes:
        guest: what it is called.
        moves: by what they are called, in their order.
    """

    guest: str
    moves: Mapping[str, Move]
    qemu: Baseline | Failure


def beyond_record_ns(downtime: Mapping[str, Any], stood_ns: int, beat_ns: int) -> int:
    """How far outside of the record's interval of the downtime the guest's clock says that it stood (ns); above 0 when
    the record is wrong.

    It may be two beats outside, as beats tell the clock no better. And it stands from a moment within the part
    ``stop``, not from its begin: when QEMU comes to carry the stop out.
    """
    stop_ns = sum(part["ns"] for part in downtime["parts"] if part["name"] == Part.STOP.label)
    least_ns: int = downtime["lower_ns"] - stop_ns
    most_ns: int = downtime["upper_ns"]
    return max(stood_ns - most_ns, least_ns - stood_ns) - 2 * beat_ns


def document(compared: Sequence[Comparison]) -> dict[str, Any]:
    """The last line of ``make demo-qemu``: the figures of the first guest, and those of each one under ``guests``."""
    guests = {one.guest: _figures(one) for one in compared}
    return {"demo": "ok", **guests[compared[0].guest], "guests": guests}


def _figures(one: Comparison) -> dict[str, Any]:
    return {
        "migrations": [dict(move.record) for move in one.moves.values()],
        "qemu": _own_figures(one.qemu),
        "observed_gap_ms": [move.gap.ns / _MS_NS for move in one.moves.values()],
        "clock_stood_ms": [move.gap.stood_ns / _MS_NS for move in one.moves.values()],
    }


def _own_figures(own: Baseline | Failure) -> dict[str, Any]:
    if isinstance(own, Failure):
        return {"reported_downtime_ms": None, "observed_gap_ms": None, "total_ms": None, "failed": own.reason}
    return {
        "reported_downtime_ms": own.reported_downtime_ms,
        "observed_gap_ms": own.observed_gap_ns / _MS_NS,
        "clock_stood_ms": own.stood_ns / _MS_NS,
        "total_ms": own.total_ms,
        "bad_pages": own.bad_pages,
    }


def text_table(compared: Sequence[Comparison]) -> Table:
    """The comparison on a terminal."""
    made = Table(*HEADS)
    for one in compared:
        for row in rows(one):
            made.add_row(*row)
        made.add_section()
    return made


def html(compared: Sequence[Comparison], setting: str) -> Markup:
    """The comparison as the body of a report's page. ``setting``: where and under which load it was measured."""
    return join(
        [
            el(
                "header",
                el("p", "migrated · Linux guests in stock QEMU", class_="kicker"),
                el("h1", "Moved by two daemons, and by QEMU itself"),
                el("p", setting, class_="sentence"),
            ),
            el(
                "section",
                table("Comparison", HEADS, [row for one in compared for row in rows(one)]),
                *map(note, remarks(compared)),
            ),
        ]
    )


def remarks(compared: Sequence[Comparison]) -> list[str]:
    """Return the lines beneath the table: the meaning of its columns, and how QEMU's own migrations failed."""
    failed = [(one.guest, one.qemu.reason) for one in compared if isinstance(one.qemu, Failure)]
    return [EXPLANATION, *(f"QEMU's own migration of {guest} failed. {reason}" for guest, reason in failed)]


def rows(one: Comparison) -> list[tuple[str, ...]]:
    """The rows of a guest: its moves, then QEMU's own migration. Columns: ``HEADS``."""
    return [*(_row(f"{one.guest}: {name}", move) for name, move in one.moves.items()), _own_row(one)]


def _row(name: str, move: Move) -> tuple[str, ...]:
    downtime, total_ns = move.record["downtime"], move.record["total_ns"]
    return (
        name,
        f"at most {duration(downtime['limit_ns'])}",
        duration(downtime["measured_ns"]),
        duration(move.gap.stood_ns),
        duration(move.gap.ns),
        duration(total_ns),
        f"{move.record['ram']['total_bytes'] / MIB / (total_ns / 1e9):.0f} MiB/s",
    )


def _own_row(one: Comparison) -> tuple[str, ...]:
    name, promised = f"{one.guest}: QEMU's own", f"nothing; aims at {duration(one.qemu.limit_ms * _MS_NS)}"
    if isinstance(one.qemu, Failure):
        return name, promised, "failed, see below", *[_NOTHING] * 4
    damage = f", and {one.qemu.bad_pages} damaged pages" if one.qemu.bad_pages else ""
    return (
        name,
        promised,
        duration(one.qemu.reported_downtime_ms * _MS_NS),
        duration(one.qemu.stood_ns),
        f"{duration(one.qemu.observed_gap_ns)}{damage}",
        duration(one.qemu.total_ms * _MS_NS),
        f"{one.qemu.ram_mib_per_s:.0f} MiB/s",
    )
