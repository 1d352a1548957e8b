"""The figures of a demonstration, from records and what was heard from outside."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from migrated.report import write_page
from scripts.basics import MIB
from scripts.qemu_rig.baseline import Baseline
from scripts.qemu_rig.figures import (
    HEADS,
    Comparison,
    Failure,
    Move,
    beyond_record_ns,
    document,
    html,
    remarks,
    rows,
    text_table,
)
from scripts.qemu_rig.gaps import Gap

MS = 1_000_000
BASELINE = Baseline(
    limit_ms=300,
    reported_downtime_ms=120,
    observed_gap_ns=167_500_000,
    stood_ns=150 * MS,
    total_ms=900,
    transferred_bytes=200 * MIB,
    ram_bytes=256 * MIB,
    seconds=1.0,
    bad_pages=0,
    largest_gap_before_ns=3 * MS,
)
FAILURE = Failure(300, "The guest <web> panicked.")


def move(gap_ms: int) -> Move:
    """A move of 14 to 16 ms; the guest's clock went on by 1 ms in the silence."""
    downtime = {"measured_ns": 15 * MS, "lower_ns": 14 * MS, "upper_ns": 16 * MS, "limit_ns": 300 * MS}
    record = {"guest": "web", "downtime": downtime, "total_ns": 500 * MS, "ram": {"total_bytes": 256 * MIB}}
    return Move(record, Gap(1000 * MS, (1000 + gap_ms) * MS, 1 * MS))


IDLE = Comparison("idle", {"there": move(17), "back": move(18)}, BASELINE)
BUSY = Comparison("busy", {"there": move(27), "back": move(28)}, FAILURE)


def test_the_document_has_the_first_guest_and_all_of_them() -> None:
    """Milliseconds, and records as they are."""
    made = document([IDLE, BUSY])
    guests = made.pop("guests")
    assert list(guests) == ["idle", "busy"]
    assert made == {"demo": "ok", **guests["idle"]}
    assert made["migrations"] == [moved.record for moved in IDLE.moves.values()]
    assert (made["observed_gap_ms"], made["clock_stood_ms"]) == ([17.0, 18.0], [16.0, 17.0])
    assert made["qemu"] == {
        "reported_downtime_ms": 120,
        "observed_gap_ms": 167.5,
        "clock_stood_ms": 150.0,
        "total_ms": 900,
        "bad_pages": 0,
    }


def test_a_failure_of_qemu_is_told_and_has_no_figures() -> None:
    """In the document, in the row and beneath the table."""
    own = document([BUSY])["qemu"]
    assert own.pop("failed") == FAILURE.reason
    assert set(own.values()) == {None}
    *_, row = rows(BUSY)
    assert row[:3] == ("busy: QEMU's own", "nothing; aims at 300ms", "failed, see below")
    assert FAILURE.reason in remarks([IDLE, BUSY])[-1]
    assert all("failed" not in remark for remark in remarks([IDLE]))


@pytest.mark.parametrize(("stood_ms", "beyond_ms"), [(18, 0), (17, -1), (30, 12), (11, -1), (10, 0), (4, 6)])
def test_how_long_the_guests_clock_stood_is_measured_against_the_record(stood_ms: int, beyond_ms: int) -> None:
    """From the lower bound less the part ``stop`` to the upper bound, and two beats on either side; not more."""
    downtime = {"lower_ns": 14 * MS, "upper_ns": 16 * MS, "parts": [{"name": "stop", "ns": 2 * MS}]}
    assert beyond_record_ns(downtime, stood_ms * MS, MS) == beyond_ms * MS


def test_the_rows_say_what_was_promised_reported_and_noticed() -> None:
    """One for each move, one for QEMU's own; memory moved in the whole time."""
    assert rows(IDLE) == [
        ("idle: there", "at most 300ms", "15ms", "16ms", "17ms", "500ms", "512 MiB/s"),
        ("idle: back", "at most 300ms", "15ms", "17ms", "18ms", "500ms", "512 MiB/s"),
        ("idle: QEMU's own", "nothing; aims at 300ms", "120ms", "150ms", "167.5ms", "900ms", "256 MiB/s"),
    ]


def test_pages_that_qemu_damaged_are_in_its_row() -> None:
    damaged = replace(IDLE, qemu=replace(BASELINE, bad_pages=7))
    assert "167.5ms, and 7 damaged pages" in rows(damaged)[-1]


def test_terminal_and_page_show_the_same_table(tmp_path: Path) -> None:
    """The page shows what QEMU's failures said, escaped."""
    terminal = io.StringIO()
    Console(file=terminal, width=150).print(text_table([IDLE, BUSY]))
    lines = terminal.getvalue().splitlines()
    told = [tuple(cell.strip() for cell in line.split("│")[1:-1]) for line in lines if line.startswith("│")]
    assert told == [*rows(IDLE), *rows(BUSY)]
    page = tmp_path / "page.html"
    write_page("Compared", html([IDLE, BUSY], "2 CPUs."), page)
    text = page.read_text(encoding="utf-8")
    assert all(cell.replace("'", "&#x27;") in text for row in (HEADS, *told) for cell in row)
    assert "The guest &lt;web&gt; panicked." in text
