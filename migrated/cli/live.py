"""Migrations while they run, drawn to fit the screen: as much of each as there is room for, and its outcome at the end.

looks (x-migrated-status) -> Trace (snapshots over time) -> Screen -> rich
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.text import Text

from migrated.cli.drawing import (
    CHART_ROWS,
    HALVINGS,
    Piece,
    against_limit,
    area,
    beside,
    bucketed,
    drawn_width,
    duration_s,
    labelled,
    legend,
    line_of,
    logarithmic,
    ms,
    pieces_of,
    worded,
)
from migrated.cli.render import outcome_line
from migrated.cli.style import STATUS_STYLES, clean, duration, outcome_style, rate
from migrated.cli.trace import Look, Trace
from migrated.observe.progress import Progress
from migrated.record.model import DowntimePart, Record, RoundRow
from migrated.record.parts import SIDE_OF_PREDICTED, PredictedPart
from protocol.guest import PAGE_SIZE
from protocol.units import format_size


class Screen:
    """All migrations that are watched, as one renderable that fits the screen.

    Args:
        short: never more than the short form of each.
        hint: the last line, where there is room.
    """

    def __init__(self, *, short: bool = False, hint: str = "") -> None:
        self._levels = LEVELS[2:] if short else LEVELS
        self._hint = hint
        self._traces: dict[str, Trace] = {}

    def take(self, found: Sequence[Look]) -> None:
        """One snapshot of every migration in view."""
        kept = {}
        for look in found:
            migration_id = look.progress.migration_id
            trace = self._traces.get(migration_id) or Trace(look.progress)
            trace.take(look)
            kept[migration_id] = trace
        self._traces = kept

    def without_hint(self) -> Screen:
        """The same without the hint, to be left on the terminal at the end."""
        self._hint = ""
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One row is left for the cursor: a full last row would scroll.
        height = options.height or console.height - 1
        yield Group(*self._fitting(options.max_width, height))

    def _fitting(self, width: int, height: int) -> list[RenderableType]:
        traces = list(self._traces.values())
        if not traces:
            return [Text("No migration is running; waiting for one (Ctrl-C ends).", style="dim")]
        for level in self._levels:
            views = [level(trace, width) for trace in traces]
            spare = height - sum(view.height for view in views)
            if spare >= 0:
                shown: list[RenderableType] = []
                for view in views:
                    rows = min(len(view.rounds), spare // len(views) - 1) if view.rounds else 0
                    shown.append(view.panel(rows))
                    spare -= rows + 1 if rows > 0 else 0
                return [*shown, Text(self._hint, style="dim")] if self._hint and spare > 0 else shown
        lines: list[RenderableType] = [_one_line(trace, width) for trace in traces]
        if len(lines) > height:
            more = len(lines) - height + 1
            lines = [*lines[: max(0, height - 1)], Text(f"and {more} more", style="dim")]
        return lines


@dataclass(frozen=True, slots=True)
class View:
    """One migration: lines within a frame; ``rounds`` is the table of which as much is shown as fits, newest last."""

    title: Text
    lines: Sequence[Text]
    subtitle: str = ""
    head: Text = field(default_factory=Text)
    rounds: Sequence[Text] = ()

    @property
    def height(self) -> int:
        """Rows of the screen without the table."""
        return len(self.lines) + 2

    def panel(self, rows: int) -> Panel:
        """The frame with the ``rows`` newest rows of the table."""
        table = [self.head, *self.rounds[-rows:]] if rows > 0 else []
        return Panel(
            Group(*self.lines, *table),
            title=self.title,
            title_align="left",
            subtitle=self.subtitle or None,
            subtitle_align="right",
            box=box.ROUNDED,
            border_style="dim",
            padding=(0, 1),
        )


def progress_view(look: Look, *, rounds: int = 6) -> RenderableType:
    """One look at a migration, with its ``rounds`` newest rounds (0 for the short form)."""
    trace = Trace(look.progress)
    trace.take(look)
    return _Still(trace, rounds)


@dataclass(frozen=True, slots=True)
class _Still:
    trace: Trace
    rounds: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view = (full if self.rounds else short)(self.trace, options.max_width)
        yield view.panel(min(self.rounds, len(view.rounds)))


def full(trace: Trace, width: int) -> View:
    """The long view, with the table of rounds."""
    view = curves(trace, width)
    if trace.record is not None or not trace.progress.rounds:
        return view
    head, rows = _rounds(trace.progress, width - 4)
    return View(view.title, view.lines, view.subtitle, head, rows)


def curves(trace: Trace, width: int) -> View:
    """The middle view: all but the table of rounds."""
    inner, progress = width - 4, trace.progress
    identity = clean(progress.migration_id)
    if trace.record is not None:
        return View(_title(trace), _outcome(trace.record, inner), identity)
    lines = [_memory(trace, inner)]
    if len(trace.samples) > 1:
        lines += _charts(trace, inner)
    lines.append(_downtime(progress, inner))
    lines += legend(_predicted_parts(progress), inner)
    lines += worded("decision", progress.decision, inner, most=3)
    lines += worded("destination", _destination(progress), inner, most=1)
    if progress.throttle_percent:
        lines.append(labelled("throttle", f"the vCPUs run {progress.throttle_percent} % less"))
    lines += worded("reason", progress.reason or "", inner, most=3, style="yellow")
    return View(_title(trace), lines, identity)


def short(trace: Trace, width: int) -> View:
    """Memory left, predicted downtime, and why the guest is not stopped yet."""
    inner, progress = width - 4, trace.progress
    if trace.record is not None:
        return View(_title(trace), _outcome(trace.record, inner)[:2])
    lines = [_memory(trace, inner), _downtime(progress, inner)]
    lines += worded("decision", progress.reason or progress.decision, inner, most=1)
    return View(_title(trace), lines)


LEVELS: Final[tuple[Callable[[Trace, int], View], ...]] = (full, curves, short)


def _one_line(trace: Trace, width: int) -> Text:
    progress, record = trace.progress, trace.record
    line = Text(clean(progress.guest), style="bold", no_wrap=True, overflow="ellipsis").append("  ")
    if record is not None:
        line = _ended(line, record)
    else:
        line.append(progress.status, style=STATUS_STYLES.get(progress.status, "cyan"))
        line.append(f", {format_size(trace.last.remaining_bytes)} left", style="not bold")
        if progress.predicted_downtime_ns is not None:
            line.append(f", {_of_limit(progress, progress.predicted_downtime_ns)}", style="not bold")
    line.truncate(width, overflow="ellipsis")
    return line


def _ended(title: Text, record: Record) -> Text:
    style = outcome_style(record.outcome)
    return title.append(clean(record.outcome), style=style).append(f" after {duration_s(record.total_ns)}")


def _title(trace: Trace) -> Text:
    progress, record = trace.progress, trace.record
    arrow = "->" if progress.role == "source" else "<-"
    peer = progress.peer.removeprefix("tcp:")
    title = Text(clean(f"{progress.guest} {arrow} {peer}"), style="bold").append("  ")
    if record is not None:
        return _ended(title, record)
    title.append(progress.status, style=STATUS_STYLES.get(progress.status, "cyan"))
    if progress.status == "active":
        round_number = progress.round + (progress.role == "source")
        title.append(f", round {round_number}")
    elif progress.phase:
        title.append(f", {clean(progress.phase)}")
    title.append(f"  {duration_s(progress.elapsed_ns)}")
    to_go_ns = trace.to_go_ns()
    if to_go_ns is not None:
        kind = "about" if progress.round else "at least"
        title.append(f" of {kind} {duration_s(progress.elapsed_ns + to_go_ns)}")
    elif progress.status == "active" and progress.round and progress.role == "source":
        title.append(", no end in sight", style="yellow")
    return title


def _memory(trace: Trace, inner: int) -> Text:
    progress, room = trace.progress, drawn_width(inner)
    total = max(1, progress.total_bytes)
    if progress.role == "destination":
        return labelled("memory", f"{format_size(progress.transferred_bytes)} received")
    left = trace.last.remaining_bytes
    done = max(0.0, 1 - left / total)
    bar = Text("━" * round(done * room), style="cyan").append("─" * (room - round(done * room)), style="dim")
    left_of = f"{format_size(left)} of {format_size(total)} left"
    return beside("memory", bar, left_of, inner)


def _charts(trace: Trace, inner: int) -> list[Text]:
    """Curves of the memory left (logarithmic, since it shrinks by factors), of bandwidth and of dirty rate."""
    room, now, samples = drawn_width(inner), trace.last, trace.samples
    if trace.progress.role == "destination":
        moved = bucketed(samples, room, lambda sample: sample.bandwidth)
        line = Text(line_of(moved, max(moved, default=0)), style="green")
        return [beside("received", line, f"at {rate(now.bandwidth)}", inner)]
    left = bucketed(samples, room, lambda sample: sample.remaining_bytes)
    moved = bucketed(samples, room, lambda sample: sample.bandwidth)
    dirty = bucketed(samples, room, lambda sample: sample.dirtied)
    most, top = max(left, default=0), max([*moved, *dirty], default=0)
    lines = []
    for row, drawn in enumerate(area([logarithmic(value, most) for value in left], CHART_ROWS)):
        level = format_size(int(most / 2 ** (row * HALVINGS // CHART_ROWS)))
        lines.append(beside("" if row else "left to send", Text(drawn, style="cyan"), f"‾ {level}", inner))
    sent = f"{format_size(trace.progress.transferred_bytes)} at {rate(now.bandwidth)}"
    dirtied = f"at {rate(now.dirtied)}" if trace.progress.round else "known after the first round"
    lines.append(beside("sent", Text(line_of(moved, top), style="green"), sent, inner))
    lines.append(beside("dirtied", Text(line_of(dirty, top), style="magenta"), dirtied, inner))
    return lines


def _predicted_parts(progress: Progress) -> list[Piece]:
    parts = progress.predicted_parts_ns.items()
    return pieces_of(DowntimePart(name=name, side=SIDE_OF_PREDICTED.get(name, "source"), ns=ns) for name, ns in parts)


def _of_limit(progress: Progress, predicted_ns: int) -> str:
    text = ms(predicted_ns)
    if progress.predicted_upper_ns is not None:
        text += f", bound {ms(progress.predicted_upper_ns)}"
    return f"{text} of {duration(progress.downtime_limit_ns)}"


def _downtime(progress: Progress, inner: int) -> Text:
    """The predicted downtime as a bar against its limit."""
    limit_ns = progress.downtime_limit_ns
    if progress.downtime_ns is not None:
        return labelled("downtime", Text(f"{duration(progress.downtime_ns)} of {duration(limit_ns)}", style="bold"))
    if progress.predicted_downtime_ns is None:
        if progress.role == "destination":
            return labelled("downtime", f"the source gives up after {duration(limit_ns)}")
        return labelled("downtime", f"not predicted yet; limit {duration(limit_ns)}")
    upper_ns = progress.predicted_upper_ns or progress.predicted_downtime_ns
    bar = against_limit(_predicted_parts(progress), upper_ns, limit_ns, drawn_width(inner))
    return beside("downtime", bar, _of_limit(progress, progress.predicted_downtime_ns), inner)


def _destination(progress: Progress) -> str:
    """A sentence on the figures that the destination has told, and on how long loading should take there."""
    host, said = str(progress.destination), progress.acknowledged
    if not host or said is None:
        return host
    told = f"{host.partition(' (')[0]} has "
    if said.rounds:
        rounds = f"{said.rounds} round{'s' if said.rounds != 1 else ''}"
        told += f"{rounds} in place, {format_size(said.received_bytes)} received"
    else:
        told += "no round in place yet"
    if said.vote is not None:
        counted = "" if said.counted_ns is None else f" after {ms(said.counted_ns)}ms by its own count"
        return f"{told}; voted {said.vote.upper()}{counted}"
    loads_ns = progress.predicted_parts_ns.get(PredictedPart.DEVICE_LOADS.label)
    return f"{told}; loading devices there: {ms(loads_ns)}ms expected" if loads_ns else told


def _rounds(progress: Progress, inner: int) -> tuple[Text, list[Text]]:
    """The head and the rows of the table of rounds; columns that have no room are left out."""
    limit_ns = progress.downtime_limit_ns
    columns: list[tuple[str, int, Callable[[RoundRow], str]]] = [
        ("round", 5, lambda row: str(row.round)),
        ("left", 11, lambda row: format_size(row.dirty_pages * PAGE_SIZE)),
        ("predicted ms", 14, lambda row: "-" if (p := row.predicted_downtime_ns) is None else ms(p)),
        ("time", 11, lambda row: duration(row.ns)),
        ("sent", 12, lambda row: format_size(row.bytes)),
        ("bandwidth", 15, lambda row: rate(row.bandwidth_bytes_per_s)),
        ("dirtied", 15, lambda row: rate(row.dirty_rate_pages_per_s * PAGE_SIZE)),
        ("throttle", 10, lambda row: f"{row.throttle_percent} %"),
    ]
    if not any(row.throttle_percent for row in progress.rounds):
        del columns[-1]
    while sum(size for _, size, _ in columns) > inner and len(columns) > 1:
        del columns[-1]
    head = Text("".join(name.rjust(size) for name, size, _ in columns), style="dim", no_wrap=True, overflow="crop")
    rows = []
    for row in progress.rounds:
        line = Text(no_wrap=True, overflow="crop")
        for name, size, form in columns:
            fits = name.startswith("predicted") and (row.predicted_downtime_ns or limit_ns) < limit_ns
            line.append(form(row).rjust(size), style="green" if fits else "")
        rows.append(line)
    return head, rows


def _outcome(record: Record, inner: int) -> list[Text]:
    """The end: outcome, downtime against its limit by part, bytes moved, and the destination's own count."""
    style = outcome_style(record.outcome)
    lines = [Text(outcome_line(record), style=style, no_wrap=True, overflow="ellipsis")]
    downtime, ram = record.downtime, record.ram
    if downtime:
        pieces = pieces_of(downtime.parts)
        shown = f"{ms(downtime.measured_ns)} of {duration(downtime.limit_ns)}"
        bar = against_limit(pieces, downtime.measured_ns, downtime.limit_ns, drawn_width(inner))
        lines.append(beside("downtime", bar, shown, inner))
        lines += legend(pieces, inner)
    if record.reason:
        lines[1:1] = worded("reason", record.reason, inner, most=3, style="yellow")
    if ram.transferred_bytes:
        rounds = len(record.rounds)
        moved = f"{format_size(ram.transferred_bytes)} in {rounds} round{'s' if rounds != 1 else ''}"
        if ram.downtime_bytes:
            moved += f", {format_size(ram.downtime_bytes)} of it while the guest stood still"
        lines.append(labelled("moved", moved))
    lines += worded("destination", _told(record), inner, most=1)
    lines.append(labelled("record", clean(f"migratectl show {record.migration_id}")))
    return lines


def _told(record: Record) -> str:
    downtime = record.downtime
    told = []
    if downtime is not None and downtime.destination_measured_ns is not None:
        told.append(f"counted {ms(downtime.destination_measured_ns)}ms at its vote")
    source, destination = record.digest.source, record.digest.destination
    if source is not None and destination is not None:
        told.append(f"memory is {'equal' if source == destination else 'different'} on both sides by its digest")
    return f"{record.destination_host.partition(' (')[0]}: {'; '.join(told)}" if told else ""
