"""The figures of a demonstration, from records and what was heard from outside."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from scripts.basics import MIB
from scripts.qemu_rig.baseline import Baseline
from scripts.qemu_rig.figures import Move, beyond_record_ns, comparison, document
from scripts.qemu_rig.gaps import Gap

MS = 1_000_000
BASELINE = Baseline(
    limit_ms=300,
    reported_downtime_ms=120,
    observed_gap_ns=167_500_000,
    total_ms=900,
    transferred_bytes=200 * MIB,
    ram_bytes=256 * MIB,
    seconds=1.0,
    bad_pages=0,
    largest_gap_before_ns=3 * MS,
)


def move(gap_ms: int) -> Move:
    """A move of 14 to 16 ms."""
    downtime = {"measured_ns": 15 * MS, "lower_ns": 14 * MS, "upper_ns": 16 * MS, "limit_ns": 300 * MS}
    record = {"guest": "web", "downtime": downtime, "total_ns": 500 * MS, "ram": {"total_bytes": 256 * MIB}}
    return Move(record, Gap(1000 * MS, (1000 + gap_ms) * MS, 1 * MS))


def test_the_document_has_both_sides_of_the_comparison() -> None:
    """Milliseconds, and records as they are."""
    there, back = move(17), move(18)
    assert document([there, back], BASELINE) == {
        "demo": "ok",
        "migrations": [there.record, back.record],
        "qemu": {"reported_downtime_ms": 120, "observed_gap_ms": 167.5, "total_ms": 900},
        "observed_gap_ms": [17.0, 18.0],
    }


@pytest.mark.parametrize(("gap_ms", "beyond_ms"), [(18, 0), (17, -1), (30, 12)])
def test_a_silence_is_measured_against_the_record(gap_ms: int, beyond_ms: int) -> None:
    """The upper bound and a beat on either side are explained; more is not."""
    assert beyond_record_ns(move(gap_ms), MS) == beyond_ms * MS


def test_the_table_has_a_row_for_each_move_and_one_for_qemu() -> None:
    """With memory moved in the whole time."""
    text = io.StringIO()
    Console(file=text, width=150).print(comparison({"there": move(17), "back": move(18)}, BASELINE))
    rows = [line for line in text.getvalue().splitlines() if "MiB/s" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["there", "back", "QEMU's own"]
    assert ["512 MiB/s" in rows[0], "256 MiB/s" in rows[2]] == [True, True]
    assert ["15" in rows[0], "17" in rows[0], "120" in rows[2], "not enforced" in rows[2]] == [True] * 4
