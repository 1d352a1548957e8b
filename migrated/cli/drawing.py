"""Lines within a frame on a terminal, and the drawings in them: curves, and a downtime as a bar against its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Final

from rich.text import Text

from migrated.cli.style import SHADES, clean, colored
from migrated.cli.trace import Sample
from migrated.record.model import DowntimePart

SPARKS: Final = "▁▂▃▄▅▆▇█"
LABEL: Final = 13
VALUE: Final = 28
"""Columns of the names on the left and of the figures on the right."""
HALVINGS: Final = 12
"""Range of the curve of memory left, in halvings: a round often leaves a hundredth."""
CHART_ROWS: Final = 3
WIDEST: Final = 2.5
"""A bound beyond this many times the limit is cut off."""
MOST_PARTS: Final = 8
NAMED_FROM_NS: Final = 50_000


def duration_s(ns: int) -> str:
    """A duration that is read while it runs: ``4.3s``, ``2m05s``."""
    tenths = round(ns / 1e8)
    return f"{tenths / 10:.1f}s" if tenths < 600 else f"{tenths // 600}m{tenths // 10 % 60:02}s"


def ms(ns: int) -> str:
    """Milliseconds, in a form that keeps its width from one look to the next."""
    return f"{ns / 1e6:.1f}"


def labelled(label: str, *pieces: str | Text) -> Text:
    line = Text(label.ljust(LABEL), style="dim", no_wrap=True, overflow="ellipsis", end="")
    line = Text.assemble(line, no_wrap=True, overflow="ellipsis")
    for piece in pieces:
        line.append(piece)
    return line


def beside(label: str, drawing: Text, value: str, inner: int) -> Text:
    """A drawing with its figure at the right edge; only the figure where there is no room for both."""
    room = drawn_width(inner)
    if room <= 0:
        return labelled(label, value)
    drawing.pad_right(room - drawing.cell_len)
    return labelled(label, drawing, "  ", value)


def drawn_width(inner: int) -> int:
    """Columns for a drawing."""
    return max(0, inner - LABEL - VALUE - 2)


def worded(label: str, sentence: str, inner: int, *, most: int, style: str = "") -> list[Text]:
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
    return [labelled(label if i == 0 else "", Text(line, style=style)) for i, line in enumerate(lines)]


def bucketed(samples: Sequence[Sample], width: int, value: Callable[[Sample], float]) -> list[float]:
    """One value for each column of the time axis: the newest sample's at that time; empty when there is no sample."""
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


def logarithmic(value: float, top: float) -> float:
    """Return a share of the height up to 1: each halving of the value is one of HALVINGS steps down."""
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


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a downtime as it is drawn."""

    name: str
    ns: int
    color: str
    shade: str


def pieces_of(parts: Iterable[DowntimePart]) -> list[Piece]:
    """Parts with what tells them apart: colour by side, and shade for those who see no colour."""
    lasting = colored(part for part in parts if part.ns > 0)
    return [Piece(part.name, part.ns, color, shade) for (part, color), shade in zip(lasting, cycle(SHADES))]


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


def legend(pieces: Sequence[Piece], inner: int) -> list[Text]:
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
    return [labelled("of which ms" if i == 0 else "", line) for i, line in enumerate(lines)]
