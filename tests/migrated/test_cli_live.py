"""The live view: what it tells, that it fits every screen, and what `migratectl watch` leaves in a real terminal."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from migrated.cli.drawing import Piece, against_limit, area, bucketed, line_of
from migrated.cli.live import Screen, progress_view
from migrated.cli.trace import Look, Sample, Trace
from tests.tiny_vmm.hosts import TinyHosts

MS = 1_000_000
MIB = 1 << 20
MIGRATECTL = Path(sys.executable).parent / "migratectl"


def lines_of(renderable: RenderableType, width: int = 100, height: int = 30) -> list[str]:
    """What a terminal of that size shows, without colours."""
    file = io.StringIO()
    Console(file=file, width=width, height=height, markup=False, highlight=False, emoji=False).print(renderable)
    return file.getvalue().splitlines()


@pytest.fixture
def snapshot(progress_of: Callable[..., Any]) -> Callable[..., Look]:
    """One look at a migration, as the control socket tells it: fields of its progress by name, and its record."""
    parts = {"stop": 3 * MS, "memory": 290 * MS, "legs": 2 * MS, "device-loads": 110 * MS, "resume": 7 * MS}

    def make(record: dict[str, Any] | None = None, **changes: Any) -> Look:
        return Look.of(progress_of(**({"predicted_parts_ns": parts} | changes)).model_dump(mode="json"), record)

    return make


def test_it_tells_all_that_an_operator_asks(snapshot: Callable[..., Any]) -> None:
    shown = "\n".join(lines_of(progress_view(snapshot(destination="vm (run/b.sock)"))))
    for fact in (
        "g1 -> 127.0.0.1:4460",
        "active, round 4",
        "12MiB of 256MiB left",
        "412.0, bound 455.0 of 300ms",
        "stop 3.0",
        "memory 290.0",
        "device-loads 110.0",
        "not yet: predicted 412ms, bound 455ms, limit 300ms",
        "vm has 3 rounds in place, 286MiB received; loading devices there: 110.0ms expected",
        "m-0001",
        "bandwidth",
    ):
        assert fact in shown, fact


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "vm has no round in place yet; loading devices there: 110.0ms expected"),
        ({"rounds": 1, "received_bytes": 1 << 20}, "vm has 1 round in place, 1MiB received; loading devices there"),
        ({"rounds": 2, "vote": "ready", "counted_ns": 87 * MS}, "voted READY after 87.0ms by its own count"),
        ({"rounds": 2, "vote": "no"}, "2 rounds in place, 0B received; voted NO"),
    ],
)
def test_what_the_destination_said_is_shown_and_no_more(
    snapshot: Callable[..., Any], said: dict[str, Any], told: str
) -> None:
    told_by = snapshot(status="device", destination="vm (run/b.sock)", acknowledged=said)
    shown = "\n".join(lines_of(progress_view(told_by)))
    assert told in shown


@pytest.mark.parametrize("status", ["active", "device", "pre-switchover", "in-doubt", "failed"])
@pytest.mark.parametrize("rounds", [0, 6])
def test_it_needs_no_prediction_no_rounds_and_no_destination(
    snapshot: Callable[..., Any], status: str, rounds: int
) -> None:
    blank: dict[str, Any] = {
        "predicted_downtime_ns": None,
        "predicted_upper_ns": None,
        "predicted_parts_ns": {},
        "rounds": (),
    }
    early = snapshot(status=status, round=0, decision="", destination="", bandwidth_bytes_per_s=0.0, **blank)
    shown = "\n".join(lines_of(progress_view(early, rounds=rounds)))
    assert "not predicted yet; limit 300ms" in shown
    assert status in shown


def test_the_destinations_side_shows_what_it_receives(snapshot: Callable[..., Any]) -> None:
    shown = "\n".join(
        lines_of(progress_view(snapshot(role="destination", acknowledged=None, predicted_downtime_ns=None, rounds=())))
    )
    assert "g1 <- 127.0.0.1:4460" in shown
    assert "290MiB received" in shown
    assert "left" not in shown


def test_no_text_of_a_peer_reaches_the_terminal_as_control_sequences(
    snapshot: Callable[..., Any], record_of: Callable[..., Any]
) -> None:
    evil = "\x1b]0;owned\x07[bold]x[/bold]\n"
    texts = {"decision": evil, "destination": evil, "reason": evil, "peer": evil, "phase": evil}
    for size in ((100, 40), (100, 6), (30, 3)):
        for record in (None, record_of(reason=evil, destination_host=evil).document()):
            screen = Screen()
            screen.take([snapshot(record, **texts)])
            shown = "".join(lines_of(screen, *size))
            assert not re.search(r"[\x00-\x1f\x7f]", shown)
    assert "[bold]x[/bold]" in "".join(lines_of(progress_view(snapshot(**texts))))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("width", "height"), [(100, 30), (200, 60), (80, 24), (60, 12), (40, 5), (20, 2)])
def test_any_number_of_migrations_fits_any_screen(
    snapshot: Callable[..., Any], record_of: Callable[..., Any], count: int, width: int, height: int
) -> None:
    screen = Screen(hint="Ctrl-C")
    for step in range(1, 9):
        first = record_of(reason="It is so. " * 30).document() if step == 8 else None
        found = [
            snapshot(
                first if i == 0 else None,
                migration_id=f"m{i}",
                guest=f"g{i}",
                elapsed_ns=step * 300 * MS,
                decision="why " * 60,
            )
            for i in range(count)
        ]
        screen.take(found)
    shown = lines_of(screen, width, height)
    assert len(shown) <= height
    assert max(map(len, shown)) <= width
    # The first is told of at every size, and where some have no room, how many.
    assert "g0" in shown[0] or (height == 2 and f"{count} more" in shown[-1])
    if count > height:
        assert f"and {count - height + 2} more" in shown[-1]


def test_more_room_shows_more(snapshot: Callable[..., Any]) -> None:
    screen = Screen()
    for step in range(5):
        screen.take([snapshot(elapsed_ns=step * 300 * MS)])
    shown = {height: "\n".join(lines_of(screen, 100, height)) for height in (30, 13, 8, 3)}
    assert "predicted ms" in shown[30]
    assert "left to send" in shown[13]
    assert "predicted ms" not in shown[13]
    assert "not yet" in shown[8]
    assert "left to send" not in shown[8]
    assert shown[3].startswith("g1  active, 12MiB left, 412.0, bound 455.0 of 300ms")


def test_the_outcome_replaces_what_was_shown(snapshot: Callable[..., Any], record_of: Callable[..., Any]) -> None:
    screen = Screen()
    screen.take([snapshot()])
    screen.take([snapshot(record_of().document(), status="completed", downtime_ns=66 * MS)])
    shown = "\n".join(lines_of(screen))
    assert "completed after 1.0s" in shown
    assert "downtime 66ms (limit 300ms, predicted 60ms, bound 75ms)" in shown
    assert "last-pages-leg 45.0" in shown
    assert "migratectl show" in shown
    assert "not yet" not in shown


def test_an_aborted_attempt_tells_its_pause_and_why(
    snapshot: Callable[..., Any], record_of: Callable[..., Any]
) -> None:
    screen = Screen()
    aborted = record_of(outcome="aborted", reason="Too late.").document()
    screen.take([snapshot(aborted, status="failed")])
    shown = "\n".join(lines_of(screen))
    assert "g1: aborted after 960ms, pause 66ms (limit 300ms" in shown
    assert "Too late." in shown


# --- estimates and curves ---------------------------------------------------------------------------------------------


def trace_of(looks: list[Look]) -> Trace:
    trace = Trace(looks[0].progress)
    for look in looks:
        trace.take(look)
    return trace


def test_bandwidth_is_of_the_last_second_and_what_a_round_sent_is_not_left(snapshot: Callable[..., Any]) -> None:
    steps = [
        snapshot(rounds=(), elapsed_ns=k * 500 * MS, transferred_bytes=k * 50 * MIB, remaining_bytes=400 * MIB)
        for k in range(1, 7)
    ]
    trace = trace_of(steps)
    assert trace.last.bandwidth == pytest.approx(100 * MIB)
    assert trace.last.remaining_bytes == 150 * MIB, "250 MiB have gone since the round was first seen"
    trace.take(
        snapshot(rounds=(), round=4, elapsed_ns=3500 * MS, transferred_bytes=350 * MIB, remaining_bytes=90 * MIB)
    )
    assert trace.last.remaining_bytes == 90 * MIB


def test_the_time_to_go_counts_what_is_dirtied_meanwhile(snapshot: Callable[..., Any]) -> None:
    """100 MiB left at 100 MiB/s, half of it dirtied again: 1 + 1/2 + 1/4 s, then 12.5 MiB fit 125 ms of the limit."""
    parts = {"memory": 100 * MS, "stop": 5 * MS}
    changes = {
        "rounds": (), "remaining_bytes": 100 * MIB, "bandwidth_bytes_per_s": float(100 * MIB),
        "downtime_limit_ns": 135 * MS, "dirty_rate_pages_per_s": 50 * MIB / 4096,
        "predicted_parts_ns": parts, "predicted_downtime_ns": 105 * MS, "predicted_upper_ns": 105 * MS,
    }  # fmt: skip
    to_go_ns = trace_of([snapshot(**changes)]).to_go_ns()
    assert to_go_ns == pytest.approx(1875 * MS, rel=0.001)
    faster = changes | {"dirty_rate_pages_per_s": 200 * MIB / 4096}
    assert trace_of([snapshot(**faster)]).to_go_ns() is None
    assert "no end in sight" in "\n".join(lines_of(progress_view(snapshot(**faster))))


def test_rounds_before_the_first_look_are_in_the_curve(snapshot: Callable[..., Any]) -> None:
    trace = trace_of([snapshot()])
    rounds = snapshot().progress.rounds
    assert len(trace.samples) == 2 * len(rounds) + 1
    assert trace.samples[1].remaining_bytes == rounds[0].dirty_pages * 4096


def test_a_long_migration_keeps_a_bounded_number_of_samples(snapshot: Callable[..., Any]) -> None:
    look = snapshot()
    trace = Trace(look.progress)
    for step in range(10_000):
        progress = look.progress.model_copy(update={"elapsed_ns": step * MS})
        trace.take(dataclasses.replace(look, progress=progress))
    assert len(trace.samples) <= 2000
    assert trace.last.elapsed_ns == 9999 * MS


def test_curves() -> None:
    assert area([0.0, 0.5, 1.0], 2) == ["  █", " ██"]
    assert area([0.25, 0.0], 1) == ["▂ "]
    assert line_of([0, 4, 8], 8) == " ▅█"
    assert line_of([1, 2], 0) == "  "
    samples = [Sample(at * MS, 0, at, 0.0, 0.0) for at in (0, 10, 20, 30)]
    assert bucketed(samples, 3, lambda sample: sample.remaining_bytes) == [10, 20, 30]
    assert bucketed(samples, 0, lambda sample: sample.remaining_bytes) == []
    assert bucketed([], 3, lambda sample: sample.remaining_bytes) == []


def test_the_bar_shows_parts_bound_and_limit_in_proportion() -> None:
    parts = [Piece("stop", 10 * MS, "blue", "█"), Piece("memory", 30 * MS, "cyan", "▓")]
    assert against_limit(parts, 60 * MS, 100 * MS, 101).plain == "█" * 10 + "▓" * 30 + "·" * 20 + " " * 40 + "|"
    late = against_limit(parts, 80 * MS, 20 * MS, 51).plain
    assert late.index("|") == 20
    assert late.endswith("·")
    assert len(late) == 51
    assert len(against_limit([], 0, 0, 10).plain) == 10


# --- in a terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, command: list[str], columns: int, rows: int) -> None:
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
            os.execvpe(command[0], command, environment | {"TERM": "xterm-256color", "NO_COLOR": "1"})
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, done: Callable[[str], bool]) -> str:
        """What is written until it is enough, or the command has ended."""
        written, deadline = b"", time.monotonic() + 60
        while not done(written.decode(errors="ignore")):
            assert select.select([self._descriptor], [], [], max(0, deadline - time.monotonic()))[0], written
            try:
                piece = os.read(self._descriptor, 1 << 16)
            except OSError:  # nobody holds the other end any more
                break
            if not piece:
                break
            written += piece
        return written.decode(errors="ignore")

    def close(self) -> int:
        """Wait for the end. Returns the exit status."""
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(served: TinyHosts) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def watch(columns: int, rows: int) -> Terminal:
        opened.append(Terminal([str(MIGRATECTL), "--socket", str(served.socket), "watch"], columns, rows))
        return opened[-1]

    yield watch
    for one in opened:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        os.waitpid(one.pid, 0)


def shown(written: str) -> list[str]:
    """The lines of what was written, one look after the other, without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.replace("\x1b[H", "\n")).splitlines()


def test_watch_follows_the_size_of_its_terminal_and_leaves_the_outcome(
    served: TinyHosts, silent_uri: str, terminal: Callable[..., Terminal]
) -> None:
    """Waiting, a migration on the second screen, a narrower window, the end: the outcome stands on the first screen."""
    opened = terminal(100, 30)

    def ctl(*arguments: str) -> None:
        command = [str(MIGRATECTL), "--socket", str(served.socket), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)

    assert "No migration is running" in opened.until(lambda text: "running" in text)
    ctl("migrate", "g1", silent_uri, "--no-wait")
    (progress,) = served.a.operations.progress("g1")
    wide = opened.until(lambda text: progress.migration_id in text)
    assert max(map(len, shown(wide))) <= 100
    opened.resize(60, 20)
    narrow = opened.until(lambda text: len(re.findall("negotiating", text)) > 3)
    last = shown(narrow[narrow.rindex("\x1b[H") :])
    assert max(map(len, last)) <= 60
    ctl("cancel", "g1")
    rest = opened.until(lambda _: False)
    left = shown(rest.rpartition("\x1b[?1049l")[2])
    assert "cancelled" in left[0]
    assert any("cancelled by the operator" in line for line in left)
    assert "\x1b[?25h" in rest, "the cursor is back"
    assert opened.close() == 0
