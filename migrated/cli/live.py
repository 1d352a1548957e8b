"""Migrations while they run, drawn to fit the screen: as much of each as there is room for, and its outcome at the end.

snapshots (x-migrated-status) -> Trace (what was seen over time) -> Screen -> rich
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Final, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.text import Text

from migrated.cli.render import (
    OUTCOME_STYLES,
    SHADES,
    SIDE_COLORS,
    SPARKS,
    STATUS_STYLES,
    Json,
    clean,
    duration,
    outcome_line,
    rate,
)
from protocol.guest import PAGE_SIZE
from protocol.units import format_size

FINISHED: Final = ("completed", "cancelled", "failed")
LABEL: Final = 13
VALUE: Final = 28
"""Columns of the names on the left and of the figures on the right."""
SAMPLES_KEPT: Final = 2000
RATE_WINDOW_NS: Final = 1_000_000_000
HALVINGS: Final = 12
"""What the curve of what is left shows: a round often leaves a hundredth of memory."""
CHART_ROWS: Final = 3
WIDEST: Final = 2.5
"""A bound further out than so many limits is cut off."""
MOST_PARTS: Final = 8
NAMED_FROM_NS: Final = 50_000
SIDE_OF: Final = {"legs": "link", "device-loads": "destination", "resume": "destination"}
"""Whose time a predicted component is; the source's when not named."""


class Sample(NamedTuple):
    """One snapshot on the time axis of its migration. Rates are bytes per second."""

    elapsed_ns: int
    transferred_bytes: int
    remaining_bytes: int
    bandwidth: float
    dirtied: float


@dataclass(slots=True)
class Trace:
    """What was seen of one migration."""

    progress: Json
    record: Json | None = None
    """Its record, once it has ended."""
    samples: list[Sample] = field(default_factory=list)
    _round: int = -1
    _round_base_bytes: int = 0

    def take(self, progress: Json) -> None:
        """Add one snapshot; ``record`` in it is the record of one that has ended."""
        self.progress = progress
        self.record = progress.get("record", self.record)
        if not self.samples:
            self.samples = list(_of_rounds(progress))
        if self.record is not None or progress["status"] in ("setup", *FINISHED):
            return
        transferred = progress["transferred_bytes"]
        if progress["round"] != self._round:
            self._round, self._round_base_bytes = progress["round"], transferred
        remaining = progress["remaining_bytes"]
        if progress["round"]:
            # The daemon counts what a round has left dirty; what the next one has sent of it comes off here.
            remaining = max(0, remaining - (transferred - self._round_base_bytes))
        dirtied = progress["dirty_rate_pages_per_s"] * PAGE_SIZE
        elapsed_ns = progress["elapsed_ns"]
        sample = Sample(elapsed_ns, transferred, remaining, self._bandwidth(elapsed_ns, transferred), dirtied)
        self.samples.append(sample)
        if len(self.samples) > SAMPLES_KEPT:
            del self.samples[1::2]

    def _bandwidth(self, elapsed_ns: int, transferred_bytes: int) -> float:
        """Bytes per second over about the last second; over the rounds, when that is not known yet."""
        for sample in reversed(self.samples):
            if elapsed_ns - sample.elapsed_ns >= RATE_WINDOW_NS:
                return max(0, transferred_bytes - sample.transferred_bytes) / (elapsed_ns - sample.elapsed_ns) * 1e9
        began_ns = self.progress["setup_ns"]
        return float(self.progress["bandwidth_bytes_per_s"]) or transferred_bytes / max(1, elapsed_ns - began_ns) * 1e9

    @property
    def last(self) -> Sample:
        """The newest sample, or what the daemon says where none was taken."""
        if self.samples:
            return self.samples[-1]
        progress = self.progress
        return Sample(progress["elapsed_ns"], progress["transferred_bytes"], progress["remaining_bytes"], 0.0, 0.0)

    def to_go_ns(self) -> int | None:
        """About how long until the guest runs on the other side; None when nothing says that it will end.

        What is left is sent, and what is dirtied meanwhile, and so on, until the rest fits the limit: a geometric row.
        """
        progress, now = self.progress, self.last
        bandwidth = now.bandwidth
        if progress["status"] not in ("active", "device") or progress["role"] == "destination" or bandwidth <= 0:
            return None
        ratio = now.dirtied / bandwidth
        passes_ns = now.remaining_bytes / bandwidth * 1e9
        predicted, upper = progress["predicted_downtime_ns"], progress["predicted_upper_ns"]
        if progress["status"] == "device" or not progress["round"] or predicted is None:
            return round(passes_ns)
        fixed_ns = (upper or predicted) - progress["predicted_parts_ns"].get("memory", 0)
        fits_bytes = max(PAGE_SIZE, (progress["downtime_limit_ns"] - fixed_ns) / 1e9 * bandwidth)
        left, total_ns = float(now.remaining_bytes), 0.0
        while left > fits_bytes:
            if ratio >= 1:
                return None
            total_ns += left / bandwidth * 1e9
            left *= ratio
        return round(total_ns + left / bandwidth * 1e9)


def _of_rounds(progress: Json) -> Iterable[Sample]:
    """The rounds that were over before the first snapshot."""
    at_ns = progress["setup_ns"]
    sent = 0
    for row in progress["rounds"]:
        bandwidth, dirtied = row["bandwidth_bytes_per_s"], row["dirty_rate_pages_per_s"] * PAGE_SIZE
        yield Sample(at_ns, sent, row["bytes"], bandwidth, dirtied)
        at_ns += row["ns"]
        sent += row["bytes"]
        yield Sample(at_ns, sent, row["dirty_pages"] * PAGE_SIZE, bandwidth, dirtied)


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

    def take(self, found: Sequence[Json]) -> None:
        """One snapshot of every migration in view."""
        kept = {}
        for progress in found:
            trace = self._traces.get(progress["migration_id"]) or Trace(progress)
            trace.take(progress)
            kept[progress["migration_id"]] = trace
        self._traces = kept

    def without_hint(self) -> Screen:
        """The same to be left behind: no hint, and whatever fits."""
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


def progress_view(progress: Json, *, rounds: int = 6) -> RenderableType:
    """One look at a migration, with its ``rounds`` newest rounds (0 for the short form)."""
    trace = Trace(progress)
    trace.take(progress)
    return _Still(trace, rounds)


@dataclass(frozen=True, slots=True)
class _Still:
    trace: Trace
    rounds: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view = (full if self.rounds else short)(self.trace, options.max_width)
        yield view.panel(min(self.rounds, len(view.rounds)))


# --- one migration at three sizes -------------------------------------------------------------------------------------


def full(trace: Trace, width: int) -> View:
    """Everything, with the table of rounds."""
    view = curves(trace, width)
    if trace.record is not None or not trace.progress["rounds"]:
        return view
    head, rows = _rounds(trace.progress, width - 4)
    return View(view.title, view.lines, view.subtitle, head, rows)


def curves(trace: Trace, width: int) -> View:
    """Everything but the table of rounds."""
    inner, progress = width - 4, trace.progress
    identity = clean(progress["migration_id"])
    if trace.record is not None:
        return View(_title(trace), _outcome(trace.record, inner), identity)
    lines = [_memory(trace, inner)]
    if len(trace.samples) > 1:
        lines += _charts(trace, inner)
    lines.append(_downtime(progress, inner))
    lines += _legend(_predicted_parts(progress), inner)
    lines += _worded("decision", progress["decision"], inner, most=3)
    lines += _worded("destination", _destination(progress), inner, most=1)
    if progress["throttle_percent"]:
        lines.append(_line("throttle", f"the vCPUs run {progress['throttle_percent']} % less"))
    lines += _worded("reason", progress["reason"] or "", inner, most=3, style="yellow")
    return View(_title(trace), lines, identity)


def short(trace: Trace, width: int) -> View:
    """What is left, what it would cost, and why not yet."""
    inner, progress = width - 4, trace.progress
    if trace.record is not None:
        return View(_title(trace), _outcome(trace.record, inner)[:2])
    lines = [_memory(trace, inner), _downtime(progress, inner)]
    lines += _worded("decision", progress["reason"] or progress["decision"], inner, most=1)
    return View(_title(trace), lines)


LEVELS: Final[tuple[Callable[[Trace, int], View], ...]] = (full, curves, short)


def _one_line(trace: Trace, width: int) -> Text:
    progress, record = trace.progress, trace.record
    line = Text(clean(progress["guest"]), style="bold", no_wrap=True, overflow="ellipsis").append("  ")
    if record is not None:
        line = _ended(line, record)
    else:
        line.append(progress["status"], style=STATUS_STYLES.get(progress["status"], "cyan"))
        line.append(f", {format_size(trace.last.remaining_bytes)} left", style="not bold")
        if progress["predicted_downtime_ns"] is not None:
            line.append(f", {_of_limit(progress)}", style="not bold")
    line.truncate(width, overflow="ellipsis")
    return line


def _ended(title: Text, record: Json) -> Text:
    style = OUTCOME_STYLES.get(record["outcome"], "bold red")
    return title.append(clean(record["outcome"]), style=style).append(f" after {duration_s(record['total_ns'])}")


def _title(trace: Trace) -> Text:
    progress, record = trace.progress, trace.record
    arrow = "->" if progress["role"] == "source" else "<-"
    peer = progress["peer"].removeprefix("tcp:")
    title = Text(clean(f"{progress['guest']} {arrow} {peer}"), style="bold").append("  ")
    if record is not None:
        return _ended(title, record)
    title.append(progress["status"], style=STATUS_STYLES.get(progress["status"], "cyan"))
    if progress["status"] == "active":
        round_number = progress["round"] + (progress["role"] == "source")
        title.append(f", round {round_number}")
    elif progress["phase"]:
        title.append(f", {clean(progress['phase'])}")
    title.append(f"  {duration_s(progress['elapsed_ns'])}")
    to_go_ns = trace.to_go_ns()
    if to_go_ns is not None:
        kind = "about" if progress["round"] else "at least"
        title.append(f" of {kind} {duration_s(progress['elapsed_ns'] + to_go_ns)}")
    elif progress["status"] == "active" and progress["round"] and progress["role"] == "source":
        title.append(", no end in sight", style="yellow")
    return title


def duration_s(ns: int) -> str:
    """A duration that is read while it runs: ``4.3s``, ``2m05s``."""
    tenths = round(ns / 1e8)
    return f"{tenths / 10:.1f}s" if tenths < 600 else f"{tenths // 600}m{tenths // 10 % 60:02}s"


def ms(ns: int) -> str:
    """Milliseconds, in a form that keeps its width from one look to the next."""
    return f"{ns / 1e6:.1f}"


def _line(label: str, *pieces: str | Text) -> Text:
    line = Text(label.ljust(LABEL), style="dim", no_wrap=True, overflow="ellipsis", end="")
    line = Text.assemble(line, no_wrap=True, overflow="ellipsis")
    for piece in pieces:
        line.append(piece)
    return line


def _beside(label: str, drawing: Text, value: str, inner: int) -> Text:
    """A drawing with its figure at the right edge; the figure counts where there is no room for both."""
    room = _drawn(inner)
    if room <= 0:
        return _line(label, value)
    drawing.pad_right(room - drawing.cell_len)
    return _line(label, drawing, "  ", value)


def _drawn(inner: int) -> int:
    """Columns for a drawing."""
    return max(0, inner - LABEL - VALUE - 2)


def _worded(label: str, sentence: str, inner: int, *, most: int, style: str = "") -> list[Text]:
    """A sentence over at most so many lines."""
    if not sentence:
        return []
    room = max(10, inner - LABEL)
    words = clean(sentence).split(" ")
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_line(label if i == 0 else "", Text(line, style=style)) for i, line in enumerate(lines)]


def _memory(trace: Trace, inner: int) -> Text:
    progress, room = trace.progress, _drawn(inner)
    total = max(1, progress["total_bytes"])
    if progress["role"] == "destination":
        return _line("memory", f"{format_size(progress['transferred_bytes'])} received")
    left = trace.last.remaining_bytes
    done = max(0.0, 1 - left / total)
    bar = Text("━" * round(done * room), style="cyan").append("─" * (room - round(done * room)), style="dim")
    left_of = f"{format_size(left)} of {format_size(total)} left"
    return _beside("memory", bar, left_of, inner)


def _charts(trace: Trace, inner: int) -> list[Text]:
    """What is left, on a logarithmic scale since it shrinks by factors, and what was sent against what was dirtied."""
    room, now, samples = _drawn(inner), trace.last, trace.samples
    if trace.progress["role"] == "destination":
        moved = bucketed(samples, room, lambda sample: sample.bandwidth)
        line = Text(line_of(moved, max(moved, default=0)), style="green")
        return [_beside("received", line, f"at {rate(now.bandwidth)}", inner)]
    left = bucketed(samples, room, lambda sample: sample.remaining_bytes)
    moved = bucketed(samples, room, lambda sample: sample.bandwidth)
    dirty = bucketed(samples, room, lambda sample: sample.dirtied)
    most, top = max(left, default=0), max([*moved, *dirty], default=0)
    lines = []
    for row, drawn in enumerate(area([_logarithmic(value, most) for value in left], CHART_ROWS)):
        level = format_size(int(most / 2 ** (row * HALVINGS // CHART_ROWS)))
        lines.append(_beside("" if row else "left to send", Text(drawn, style="cyan"), f"‾ {level}", inner))
    sent = f"{format_size(trace.progress['transferred_bytes'])} at {rate(now.bandwidth)}"
    dirtied = f"at {rate(now.dirtied)}" if trace.progress["round"] else "known after the first round"
    lines.append(_beside("sent", Text(line_of(moved, top), style="green"), sent, inner))
    lines.append(_beside("dirtied", Text(line_of(dirty, top), style="magenta"), dirtied, inner))
    return lines


def bucketed(samples: Sequence[Sample], width: int, value: Callable[[Sample], float]) -> list[float]:
    """One value for each column of the time axis: that of the newest sample by then; empty before there is any."""
    if not samples or width <= 0:
        return []
    begin_ns, end_ns = samples[0].elapsed_ns, samples[-1].elapsed_ns
    span_ns = max(1, end_ns - begin_ns)
    columns, index = [], 0
    for column in range(width):
        until_ns = begin_ns + span_ns * (column + 1) // width
        while index + 1 < len(samples) and samples[index + 1].elapsed_ns <= until_ns:
            index += 1
        columns.append(value(samples[index]))
    return columns


def _logarithmic(value: float, top: float) -> float:
    """A share of the height up to 1: each halving is one of HALVINGS steps down, to the least that is seen."""
    lowest = 1 / (CHART_ROWS * len(SPARKS))
    return lowest if value <= 0 or top <= 0 else max(lowest, 1 + math.log2(value / top) / HALVINGS)


def area(shares: Sequence[float], height: int) -> list[str]:
    """Shares of the height as a filled curve, ``height`` rows from the top."""
    rows = []
    for row in range(height - 1, -1, -1):
        eighths = [round(share * height * 8) - row * 8 for share in shares]
        rows.append("".join(" " if n <= 0 else SPARKS[min(n, 8) - 1] for n in eighths))
    return rows


def line_of(values: Sequence[float], top: float) -> str:
    """Values as bars of one row; ``top`` is the highest. Nothing where there is nothing."""
    return "".join(" " if min(value, top) <= 0 else SPARKS[min(7, int(value / top * 8))] for value in values)


# --- the downtime against its limit -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a downtime as it is drawn."""

    name: str
    ns: int
    color: str
    shade: str


def _pieces(parts: Iterable[tuple[str, str, int]]) -> list[Piece]:
    """Parts (name, side, ns) with what tells them apart: colour by side, and shade for those who see no colour."""
    colors = {side: cycle(choices) for side, choices in SIDE_COLORS.items()}
    shades = cycle(SHADES)
    return [Piece(name, ns, next(colors[side]), next(shades)) for name, side, ns in parts if ns > 0]


def _predicted_parts(progress: Json) -> list[Piece]:
    parts = progress["predicted_parts_ns"].items()
    return _pieces((name, SIDE_OF.get(name, "source"), ns) for name, ns in parts)


def against_limit(pieces: Sequence[Piece], upper_ns: int, limit_ns: int, width: int) -> Text:
    """Pieces end to end, dots up to the bound, and a line at the limit."""
    total_ns = sum(piece.ns for piece in pieces)
    end_ns = max(1, limit_ns, min(max(total_ns, upper_ns), round(limit_ns * WIDEST)) if limit_ns else total_ns)
    scale = max(1, width - 1) / end_ns
    cells: list[tuple[str, str]] = []
    reached_ns = 0
    for piece in pieces:
        reached_ns += piece.ns
        cells += [(piece.shade, piece.color)] * (min(width - 1, round(reached_ns * scale)) - len(cells))
    bound = min(width - 1, round(max(total_ns, upper_ns) * scale))
    cells += [("·", "yellow")] * (bound - len(cells))
    cells += [(" ", "")] * (width - len(cells))
    if limit_ns:
        over = max(total_ns, upper_ns) > limit_ns
        cells.insert(round(limit_ns * scale), ("|", "bold red" if over else "bold green"))
    bar = Text()
    for cell, style in cells[:width]:
        bar.append(cell, style=style)
    return bar


def _of_limit(progress: Json) -> str:
    text = ms(progress["predicted_downtime_ns"])
    if progress["predicted_upper_ns"] is not None:
        text += f", bound {ms(progress['predicted_upper_ns'])}"
    return f"{text} of {duration(progress['downtime_limit_ns'])}"


def _downtime(progress: Json, inner: int) -> Text:
    """The predicted downtime as a bar against its limit."""
    limit_ns = progress["downtime_limit_ns"]
    if progress["downtime_ns"] is not None:
        return _line("downtime", Text(f"{duration(progress['downtime_ns'])} of {duration(limit_ns)}", style="bold"))
    if progress["predicted_downtime_ns"] is None:
        if progress["role"] == "destination":
            return _line("downtime", f"the source gives up after {duration(limit_ns)}")
        return _line("downtime", f"not predicted yet; limit {duration(limit_ns)}")
    upper_ns = progress["predicted_upper_ns"] or progress["predicted_downtime_ns"]
    bar = against_limit(_predicted_parts(progress), upper_ns, limit_ns, _drawn(inner))
    return _beside("downtime", bar, _of_limit(progress), inner)


def _legend(pieces: Sequence[Piece], inner: int) -> list[Text]:
    """The names of the pieces, the largest where not all have room, with milliseconds."""
    room = max(20, inner - LABEL)
    largest = sorted(pieces, key=lambda piece: -piece.ns)[:MOST_PARTS]
    named = [piece for piece in pieces if piece in largest and piece.ns >= NAMED_FROM_NS]
    entries = [Text.assemble((p.shade, p.color), f" {clean(p.name)} {ms(p.ns)}") for p in named]
    rest_ns = sum(piece.ns for piece in pieces) - sum(piece.ns for piece in named)
    if rest_ns >= NAMED_FROM_NS:
        entries.append(Text.assemble((f"others {ms(rest_ns)}", "dim")))
    lines: list[Text] = []
    for entry in entries:
        if lines and lines[-1].cell_len + 2 + entry.cell_len <= room:
            lines[-1].append("  ").append(entry)
        else:
            lines.append(entry)
    return [_line("of which ms" if i == 0 else "", line) for i, line in enumerate(lines)]


def _destination(progress: Json) -> str:
    """What the destination itself has told so far, and what loading is expected to cost it."""
    host, said = str(progress["destination"]), progress["acknowledged"]
    if not host or said is None:
        return host
    told = f"{host.partition(' (')[0]} has "
    if said["rounds"]:
        rounds = f"{said['rounds']} round{'s' if said['rounds'] != 1 else ''}"
        told += f"{rounds} in place, {format_size(said['received_bytes'])} received"
    else:
        told += "no round in place yet"
    if said["vote"] is not None:
        counted = "" if said["counted_ns"] is None else f" after {ms(said['counted_ns'])}ms by its own count"
        return f"{told}; voted {said['vote'].upper()}{counted}"
    loads_ns = progress["predicted_parts_ns"].get("device-loads")
    return f"{told}; loading devices there: {ms(loads_ns)}ms expected" if loads_ns else told


# --- rounds, and the end ----------------------------------------------------------------------------------------------


def _rounds(progress: Json, inner: int) -> tuple[Text, list[Text]]:
    """The head and the rows of the table of rounds; columns that have no room are left out."""
    limit_ns = progress["downtime_limit_ns"]
    columns: list[tuple[str, int, Callable[[Json], str]]] = [
        ("round", 5, lambda row: str(row["round"])),
        ("left", 11, lambda row: format_size(row["dirty_pages"] * PAGE_SIZE)),
        ("predicted ms", 14, lambda row: "-" if (p := row["predicted_downtime_ns"]) is None else ms(p)),
        ("time", 11, lambda row: duration(row["ns"])),
        ("sent", 12, lambda row: format_size(row["bytes"])),
        ("bandwidth", 15, lambda row: rate(row["bandwidth_bytes_per_s"])),
        ("dirtied", 15, lambda row: rate(row["dirty_rate_pages_per_s"] * PAGE_SIZE)),
        ("throttle", 10, lambda row: f"{row['throttle_percent']} %"),
    ]
    if not any(row["throttle_percent"] for row in progress["rounds"]):
        del columns[-1]
    while sum(size for _, size, _ in columns) > inner and len(columns) > 1:
        del columns[-1]
    head = Text("".join(name.rjust(size) for name, size, _ in columns), style="dim", no_wrap=True, overflow="crop")
    rows = []
    for row in progress["rounds"]:
        line = Text(no_wrap=True, overflow="crop")
        for name, size, form in columns:
            fits = name.startswith("predicted") and (row["predicted_downtime_ns"] or limit_ns) < limit_ns
            line.append(form(row).rjust(size), style="green" if fits else "")
        rows.append(line)
    return head, rows


def _outcome(record: Json, inner: int) -> list[Text]:
    """How it ended: the sentence, the downtime against its limit by part, what moved, what the destination counted."""
    style = OUTCOME_STYLES.get(record["outcome"], "bold red")
    lines = [Text(outcome_line(record), style=style, no_wrap=True, overflow="ellipsis")]
    downtime, ram = record["downtime"], record["ram"]
    if downtime:
        pieces = _pieces((part["name"], part["side"], part["ns"]) for part in downtime["parts"])
        shown = f"{ms(downtime['measured_ns'])} of {duration(downtime['limit_ns'])}"
        bar = against_limit(pieces, downtime["measured_ns"], downtime["limit_ns"], _drawn(inner))
        lines.append(_beside("downtime", bar, shown, inner))
        lines += _legend(pieces, inner)
    if record["reason"]:
        lines[1:1] = _worded("reason", record["reason"], inner, most=3, style="yellow")
    if ram["transferred_bytes"]:
        rounds = len(record["rounds"])
        moved = f"{format_size(ram['transferred_bytes'])} in {rounds} round{'s' if rounds != 1 else ''}"
        if ram["downtime_bytes"]:
            moved += f", {format_size(ram['downtime_bytes'])} of it while the guest stood still"
        lines.append(_line("moved", moved))
    lines += _worded("destination", _told(record), inner, most=1)
    lines.append(_line("record", clean(f"migratectl show {record['migration_id']}")))
    return lines


def _told(record: Json) -> str:
    downtime: dict[str, Any] = record["downtime"] or {}
    told = []
    if downtime.get("destination_measured_ns") is not None:
        told.append(f"counted {ms(downtime['destination_measured_ns'])}ms at its vote")
    source, destination = record["digest"]["source"], record["digest"]["destination"]
    if source is not None and destination is not None:
        told.append(f"memory is {'equal' if source == destination else 'different'} on both sides by its digest")
    return f"{record['destination_host'].partition(' (')[0]}: {'; '.join(told)}" if told else ""
