"""The drawings of a report: bars on a shared time axis (:func:`tracks`), plots over rounds (:func:`plot`), and the
downtime as one bar with its short parts enlarged (:func:`magnified`).

Text is never inside a drawing that scales, so that it stays readable at every width. Positions on a time axis are
computed by the style sheet from ``--from`` and ``--span``; the page's script zooms by changing these two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from migrated.report.fields import grouped, short
from migrated.report.markup import Markup, Node, el

TICKS: Final = (5, 3)
"""About how many ticks an axis has, if their labels fit, else."""
MAX_TICK_CHARACTERS: Final = 45
ENLARGE_BELOW: Final = 0.03
"""A part with a smaller share of the whole is worth enlarging."""
MAX_LENSES: Final = 2
MAX_DOTS: Final = 60
"""Points of a plot that still get a dot each."""
_UNITS: Final = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "µs"), (1, "ns"))


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time on a track; ``look`` is its class in the style sheet, ``what`` its tooltip."""

    begin_ns: int
    ns: int
    look: str
    what: str


@dataclass(frozen=True, slots=True)
class Track:
    """One row: its name, the cells with its figures, and its bars. A row without bars is a heading."""

    name: Node
    cells: tuple[Node, ...] = ()
    bars: tuple[Bar, ...] = ()
    look: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """A time axis from ``from_ns`` over ``span_ns``. ``marks`` are lines through all rows."""

    from_ns: int
    span_ns: int
    marks: tuple[Bar, ...] = field(default=())

    def ticks(self) -> tuple[int, list[tuple[int, str]]]:
        """The distance of the ticks, and each with its label; all in one unit. Fewer where the labels are long."""
        for count in TICKS:
            step_ns = nice_step(self.span_ns / count)
            factor, unit = next((f, u) for f, u in _UNITS if step_ns >= f)
            first = -(-self.from_ns // step_ns)
            instants = [index * step_ns for index in range(first, (self.from_ns + self.span_ns) // step_ns + 1)]
            labels = [f"{grouped(ns // factor)} {unit}" if ns else "0" for ns in instants]
            if sum(map(len, labels)) <= MAX_TICK_CHARACTERS:
                break
        return step_ns, list(zip(instants, labels, strict=True))


def nice_step(rough: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 ... that is not below ``rough``."""
    power = int(10 ** max(0, math.floor(math.log10(max(rough, 1)))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def tracks(label: str, heads: Sequence[str], rows: Sequence[Track], axis: Axis) -> Markup:
    """A table with one bar track per row.

    Args:
        label: the table's text alternative.
        heads: the column heads: of the name, then of each figure. The column of the bars comes last.
        rows: in order.
        axis: shared by all tracks.
    """
    step_ns, ticks = axis.ticks()
    labels = [el("span", text, class_=f"tick{_edge(ns, axis)}", style=f"--b:{ns}") for ns, text in ticks]
    cells = [
        el("th", head, role="columnheader", scope="col", class_="figure" if i else None) for i, head in enumerate(heads)
    ]
    cells.append(el("th", *labels, role="columnheader", class_="track axis", aria_label="Position on the time axis"))
    body = [el("tr", *cells, role="row", class_="axis-row"), *(_row(row, heads, axis) for row in rows)]
    span = max(1, axis.span_ns)
    style = f"--from:{axis.from_ns};--span:{span};--step:{step_ns};--shift:{_shift(axis.from_ns, span, step_ns):.6g}"
    return el(
        "div",
        el("table", *body, role="table", aria_label=label),
        el("button", "Show all", type="button", class_="reset", hidden=True),
        class_="tracks dense" if len(heads) > 5 else "tracks",
        style=style,
        data_from=axis.from_ns,
        data_span=span,
    )


def _edge(ns: int, axis: Axis) -> str:
    """A label near an end of the axis must not stick out."""
    share = (ns - axis.from_ns) / max(1, axis.span_ns)
    return " first" if share < 0.05 else " last" if share > 0.95 else ""


def _shift(from_ns: int, span_ns: int, step_ns: int) -> float:
    """The offset of the grid, as the share that ``background-position`` takes."""
    return -(from_ns % step_ns) / (span_ns - step_ns) if span_ns != step_ns else 0.0


def _row(row: Track, heads: Sequence[str], axis: Axis) -> Markup:
    name = el("th", row.name, role="rowheader", scope="row")
    if not row.cells and not row.bars:
        heading = el("th", row.name, role="rowheader", scope="rowgroup", colspan=len(heads) + 1)
        return el("tr", heading, role="row", class_="heading")
    figures = [
        el(
            "td",
            cell,
            role="cell",
            class_="figure",
            data_label=_label(head),
            data_unit="ms" if cell and _in_ms(head) else None,
        )
        for head, cell in zip(heads[1:], row.cells, strict=True)
    ]
    bars = [_bar(bar) for bar in (*row.bars, *axis.marks)]
    track = el("td", *bars, role="cell", class_="track")
    return el("tr", name, *figures, track, role="row", class_=row.look or None)


def _in_ms(head: str) -> bool:
    return head.split()[-1:] == ["ms"]


def _label(head: str) -> str:
    """A column's head where it stands beside the figure: the unit comes behind it."""
    return head.removesuffix("ms").strip() if _in_ms(head) else head


def _bar(bar: Bar) -> Markup:
    return el("i", class_=f"bar {bar.look}", style=f"--b:{bar.begin_ns};--n:{bar.ns}", title=bar.what)


# --- the downtime in one bar ------------------------------------------------------------------------------------------


def magnified(label: str, bars: Sequence[Bar], total_ns: int) -> Markup:
    """Draw consecutive bars as one, and beneath it those that are too short to see, enlarged.

    Args:
        label: the text alternative.
        bars: end to end, from 0.
        total_ns: the whole width.
    """
    total_ns = max(1, total_ns)
    whole = [_rect(bar, 0, total_ns) for bar in bars if bar.ns > 0]
    drawing = [_drawing(label, whole, "whole")]
    lenses = _lenses(bars, total_ns)
    if lenses:
        wedges, panels = [], []
        for index, lens in enumerate(lenses):
            begin_ns, end_ns = lens[0].begin_ns, lens[-1].begin_ns + lens[-1].ns
            left, right = 1000 * index / len(lenses), 1000 * (index + 1) / len(lenses)
            points = (
                f"{1000 * begin_ns / total_ns:.3f},0 {1000 * end_ns / total_ns:.3f},0 {right:.3f},100 {left:.3f},100"
            )
            wedges.append(el("polygon", points=points))
            names = ", ".join(bar.what for bar in lens)
            enlarged = _drawing(
                f"The same from {short(begin_ns)} on, enlarged",
                [_rect(bar, begin_ns, end_ns - begin_ns) for bar in lens],
                "lens",
            )
            times = grouped(round(total_ns / (end_ns - begin_ns)))
            what = f"{short(begin_ns)} to {short(end_ns)}, {times} times enlarged"
            panels.append(el("figure", enlarged, el("figcaption", what, el("span", f": {names}", class_="names"))))
        drawing.append(_drawing(None, wedges, "wedges", width=1000))
        drawing.append(el("div", *panels, class_="lenses"))
    return el("div", *drawing, class_="magnified")


def _lenses(bars: Sequence[Bar], total_ns: int) -> list[list[Bar]]:
    """Runs of two or more short bars, at most MAX_LENSES: the longest, in order."""
    runs: list[list[Bar]] = [[]]
    for bar in bars:
        if bar.ns / total_ns >= ENLARGE_BELOW:
            runs.append([])
        elif bar.ns > 0:
            runs[-1].append(bar)
    worth = sorted((run for run in runs if len(run) > 1), key=len, reverse=True)[:MAX_LENSES]
    return sorted(worth, key=lambda run: run[0].begin_ns)


def _rect(bar: Bar, from_ns: int, span_ns: int) -> Markup:
    left, width = 1000 * (bar.begin_ns - from_ns) / span_ns, 1000 * bar.ns / span_ns
    return el("rect", el("title", bar.what), class_=bar.look, x=f"{left:.4f}", y=0, width=f"{width:.4f}", height=100)


def _drawing(label: str | None, shapes: Sequence[Markup], look: str, width: int = 1000) -> Markup:
    return el(
        "svg",
        *shapes,
        class_=look,
        viewBox=f"0 0 {width} 100",
        preserveAspectRatio="none",
        role="img" if label else None,
        aria_label=label,
        aria_hidden=None if label else "true",
    )


# --- plots over rounds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot: its name, its class in the style sheet, and one value per round (None: no point)."""

    name: str
    look: str
    values: tuple[float | None, ...]


def plot(
    title: str,
    series: Sequence[Series],
    rounds: Sequence[int],
    form: Callable[[float], str],
    *,
    base: int,
    limit: tuple[str, float] | None = None,
) -> Markup:
    """Lines over rounds, all of one unit. The scale is logarithmic where the values span more than a factor of 30.

    Args:
        title: above the plot.
        series: the lines.
        rounds: the numbers of the rounds.
        form: how a value is written.
        base: of the logarithmic scale: 16 for bytes, 10 for times.
        limit: name and value of a level to draw, None for none.
    """
    values = [value for line in series for value in line.values if value is not None]
    scale = Scale.over([*values, *([limit[1]] if limit else [])], base)
    count = len(rounds)
    shapes: list[Markup] = [_level(scale.at(tick), "grid") for tick in scale.ticks]
    legend = [el("span", el("i", class_=f"key {line.look}"), line.name) for line in series]
    if limit:
        shapes.append(_level(scale.at(limit[1]), "limit"))
        legend.append(el("span", el("i", class_="key limit"), f"{limit[0]}: {form(limit[1])}"))
    for line in series:
        points = [(_x(i, count), scale.at(v)) for i, v in enumerate(line.values) if v is not None]
        if points:
            shapes.append(
                el("path", class_=f"line {line.look}", d="M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points))
            )
        if len(points) <= MAX_DOTS:
            shapes.extend(el("path", class_=f"dot {line.look}", d=f"M{x:.2f} {y:.2f}h0") for x, y in points)
    for index, number in enumerate(rounds):
        told = [f"{line.name} {form(v)}" for line in series if (v := line.values[index]) is not None]
        what = el("title", f"Round {number}: {', '.join(told)}")
        shapes.append(
            el(
                "rect",
                what,
                class_="hover",
                x=f"{1000 * index / count:.2f}",
                y=0,
                width=f"{1000 / count:.2f}",
                height=100,
            )
        )
    step = max(1, nice_step(count / 8))
    below = [
        el("span", str(number), style=f"left:{_x(i, count) / 10:.2f}%")
        for i, number in enumerate(rounds)
        if i % step == 0
    ]
    beside = [el("span", form(tick), style=f"top:{scale.at(tick):.2f}%") for tick in scale.ticks]
    spoken = (
        f"{title}, {', '.join(line.name for line in series)}, over {count} rounds; the table below has the figures."
    )
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", *legend, class_="legend")),
        el("div", *beside, class_="beside", aria_hidden="true"),
        _drawing(spoken, shapes, "canvas"),
        el("div", *below, class_="below", aria_hidden="true"),
        class_="plot",
    )


def _x(index: int, count: int) -> float:
    return 1000 * (index + 0.5) / count


def _level(y: float, look: str) -> Markup:
    return el("path", class_=look, d=f"M0 {y:.2f}H1000")


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to heights: 100 at the bottom, 0 at the top. ``ticks`` are worth a line."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], base: int) -> Scale:
        """A scale that holds all values. On a logarithmic one, 0 lies on the bottom line."""
        top = max([*values, 1.0])
        positive = [max(1.0, value) for value in values if value > 0]
        if positive and top / min(positive) > 30:
            least = math.floor(math.log(min(positive), base) + 1e-9) - (min(values) <= 0)
            most = math.ceil(math.log(top, base) - 1e-9)
            exponents = range(least, most + 1, 1 + (most - least) // 7)
            return cls(float(base) ** least, float(base) ** most, True, tuple(float(base) ** e for e in exponents))
        step = nice_step(top / 4) if base == 10 else _binary_step(top / 4)
        count = math.ceil(top / step)
        return cls(0, count * step, False, tuple(float(step * index) for index in range(count + 1)))

    def at(self, value: float) -> float:
        """The height of a value."""
        if self.logarithmic:
            value = max(value, self.low)
            return 100 - 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 - 100 * value / self.high


def _binary_step(rough: float) -> int:
    """As :func:`nice_step`, for bytes: 1, 2, 5 ... 500 KiB, MiB and so on."""
    unit = 1 << (10 * max(0, int(math.log2(max(rough, 1)) // 10)))
    return nice_step(rough / unit) * unit
