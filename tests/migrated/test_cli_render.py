"""What people see, rendered to text."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType

from migrated.cli.lists import checks_table, event_line, facts_view, guests_table, history_table
from migrated.cli.render import downtime_bar, outcome_line, progress_line, record_view


def text_of(renderable: RenderableType, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_outcome_line(record_of: Callable[..., Any], downtime_of: Callable[..., Any]) -> None:
    assert outcome_line(record_of()) == (
        "g1: completed after 960ms, downtime 66ms (limit 300ms, predicted 60ms, bound 75ms)"
    )
    late = record_of(
        outcome="aborted",
        downtime=downtime_of(310_000_000, limit_violated=True, predicted_ns=None, predicted_upper_ns=None),
    )
    assert outcome_line(late) == "g1: aborted after 960ms, pause 310ms (limit 300ms), over the limit"
    assert outcome_line(record_of(outcome="refused", downtime=None)) == "g1: refused after 960ms"


def test_the_parts_of_a_downtime_and_the_rest_stand_in_the_record(record_of: Callable[..., Any]) -> None:
    shown = text_of(record_view(record_of()))
    rows = {line.split("  ")[0].strip(): line.split() for line in shown.splitlines() if line.strip()}
    assert "1.000" in rows["stop"]
    assert "45.000" in rows["last-pages-leg"]
    assert "19.000" in rows["device-loads"]
    assert "1.000" in rows["unattributed"]
    assert "66.000" in rows["total"]


def test_the_bar_has_a_piece_for_each_part_in_proportion(downtime_of: Callable[..., Any]) -> None:
    bar = downtime_bar(downtime_of(100_000_000), width=100)
    assert bar.plain == "█" + "▓" * 79 + "▒" * 19 + "░"
    lengths = [span.end - span.start for span in bar.spans]
    assert lengths == [1, 79, 19, 1]
    styles = [span.style for span in bar.spans]
    assert len(set(styles)) == 4


@pytest.mark.parametrize("measured_ns", [0, 1])
def test_a_bar_of_nothing(downtime_of: Callable[..., Any], measured_ns: int) -> None:
    downtime = downtime_of(measured_ns, parts=(), unattributed_ns=measured_ns)
    assert downtime_bar(downtime, width=10).plain == "░" * 10


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_record_with_nothing_in_it_and_a_narrow_screen(record_of: Callable[..., Any], width: int) -> None:
    bare = record_of(
        outcome="failed",
        reason="No route to host.",
        downtime=None,
        devices=(),
        checkpoints=(),
        rounds=(),
        phases=(),
        time=None,
    )
    for record in (bare, record_of()):
        shown = text_of(record_view(record), width)
        assert all(len(line) <= width for line in shown.splitlines())
    assert "No route to host." in text_of(record_view(bare))


def test_a_record_that_cannot_be_read_does_not_hide_the_others(record_of: Callable[..., Any]) -> None:
    later = record_of(migration_id="m-0002").document() | {"outcome": "teleported"}
    shown = text_of(history_table([record_of().document(), later]))
    assert "m-0001" in shown
    assert "1 more cannot be shown. The document is no record that this version of migrated can read (outcome:" in shown
    assert "use the version that wrote it" in shown


def test_a_plain_line_of_progress(progress_of: Callable[..., Any]) -> None:
    assert progress_line(progress_of()) == (
        "g1 active, round 3, 290MiB sent, 12MiB left, 1.4GiB/s, predicted 412ms (bound 455ms) of 300ms, "
        "not yet: predicted 412ms, bound 455ms, limit 300ms"
    )


def test_nothing_that_a_peer_says_reaches_the_terminal_as_control_sequences(
    record_of: Callable[..., Any],
) -> None:
    evil = "\x1b]0;owned\x07[bold]x[/bold]\n"
    shown = text_of(record_view(record_of(reason=evil, peer=evil, destination_host=evil)))
    shown += text_of(guests_table([{"name": evil, "state": "x", "memory_bytes": 1, "pid": None, "api_socket": evil}]))
    shown += text_of(facts_view({"a": {evil: evil}}))
    shown += event_line({"event": "X", "data": {"a": evil}, "timestamp": {"seconds": 86_399, "microseconds": 5}})
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold]x[/bold]" in shown, "markup is shown as it is"


def test_a_guest_that_does_not_answer_is_listed_with_the_reason() -> None:
    known = {"name": "g1", "state": "running", "memory_bytes": 1 << 20, "pid": 7, "api_socket": "/g1.sock"}
    silent = {**known, "name": "g2", "state": "unresponsive", "memory_bytes": None, "reason": "it does not answer"}
    shown = text_of(guests_table([known, silent]))
    assert "g2: it does not answer." in shown
    assert shown.count("it does not answer") == 1
    assert "unresponsive" in shown


def test_checks_name_what_is_refused_first() -> None:
    rows = [
        {"name": "kernel", "verdict": "ok", "sentence": "Linux tracks writes"},
        {"name": "balloon", "verdict": "warning", "sentence": "gives memory back"},
        {"name": "VFIO", "verdict": "refused", "sentence": "has /dev/vfio/7 open"},
    ]
    shown = text_of(checks_table(rows))
    assert shown.index("/dev/vfio/7") < shown.index("gives memory back") < shown.index("tracks writes")


def test_event_lines() -> None:
    event = {"event": "STOP", "data": {"guest": "g1"}, "timestamp": {"seconds": 86_400 + 3661, "microseconds": 42}}
    assert event_line(event) == "01:01:01.000042 STOP guest=g1"
    assert event_line({"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 0}}) == "00:00:00.000000 STOP"


def test_facts_carry_their_units() -> None:
    gaps = [{"gap_ns": 1}, {"gap_ns": 2}]
    facts = {"memory_bytes": 1 << 20, "heartbeat": {"last_gap_ns": 5_000_000, "gaps": gaps}, "ok": True, "x": None}
    shown = text_of(facts_view(facts))
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines() if line.strip())
    assert {name: value.strip() for name, value in rows.items()} == {
        "memory": "1MiB",
        "heartbeat.last_gap": "5ms",
        "heartbeat.gaps": "2 (--json has them all)",
        "ok": "yes",
        "x": "-",
    }
