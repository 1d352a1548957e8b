"""The downtime: predicted against actual, part by part, and at QEMU's checkpoints."""

from __future__ import annotations

from typing import Final

from migrated.record.model import Downtime
from migrated.record.parts import Component, predicted_names
from migrated.record.terms import MEANING_OF_CHECKPOINT, SIDES
from migrated.report.charts import Axis, Bar, Track, magnified, tracks
from migrated.report.fields import Fields, exact_ms, join_unit, short
from migrated.report.markup import Markup, Node, el, join
from migrated.report.pieces import (
    UNATTRIBUTED,
    Section,
    chip,
    facts_list,
    legend,
    note,
    section,
    share,
    zoom_hint,
)
from migrated.settings.parameters import limit_of

COUNTS: Final = {
    "source_reported_ns": "last told by the source",
    "destination_measured_ns": "destination’s count at its vote",
    "hold_ns": "held by the operator",
}
"""Members of the downtime that tell how it was counted, and their names on the page."""


def prediction(fields: Fields) -> Section | None:
    """The downtime against its prediction, its bound and its limit, in total and by component."""
    downtime = fields.record.downtime
    if not downtime:
        return None
    lower, upper, limit = downtime.lower_ns, downtime.upper_ns, downtime.limit_ns
    abort_limit = limit_of(fields.record.parameters)
    interval = Bar(lower, upper - lower, "interval", f"between {short(lower)} and {short(upper)}")
    rows = [Track("actual", (fields.ms("downtime.measured_ns"),), (*part_bars(downtime), interval))]
    for name, title, look in (("predicted_ns", "predicted", "predicted"), ("predicted_upper_ns", "its bound", "bound")):
        value: int | None = getattr(downtime, name)
        if value is not None:
            bar = Bar(0, value, look, f"{title} {short(value)}")
            rows.append(Track(title, (fields.ms(f"downtime.{name}"),), (bar,)))
    rows.append(Track("limit", (fields.ms("downtime.limit_ns"),), (Bar(0, limit, "allowed", short(limit)),)))
    if abort_limit > limit:
        bar = Bar(0, abort_limit, "allowed", short(abort_limit))
        rows.append(Track("limit and tolerance", (exact_ms(abort_limit),), (bar,)))
    end_ns = max(upper, abort_limit, downtime.predicted_ns or 0, downtime.predicted_upper_ns or 0)
    axis = Axis(0, max(1, round(end_ns * 1.04)), (Bar(limit, 0, "limit", f"limit {short(limit)}"),))
    counted = [
        (title, join_unit(fields.ms(f"downtime.{name}"), "ms"))
        for name, title in COUNTS.items()
        if getattr(downtime, name) is not None
    ]
    return section(
        "prediction",
        "Predicted against actual",
        tracks("The downtime, its prediction and its limit", ("", "ms"), rows, axis),
        legend(),
        facts_list([*counted, *_bound(fields)]),
        _components(fields, downtime),
    )


def _bound(fields: Fields) -> list[tuple[Node, Node]]:
    """The kind of attempt that the bound was learned from, the scale of the error, and how busy the source host was; a
    record of an older version says nothing, or 0 for the load."""
    return [
        ("bound learned for attempts of the kind", fields.show("downtime.predicted_regime")),
        ("usual error of such a prediction", join_unit(fields.ms("downtime.predicted_scale_ns"), "ms")),
        ("things took longer on the busy source host, times", fields.show("downtime.predicted_load")),
    ]


def _components(fields: Fields, downtime: Downtime) -> Markup | None:
    names = downtime.predicted_parts_ns
    if not names:
        return None
    completed = fields.record.outcome == "completed"
    actual = downtime.by_component()
    rows = []
    end_ns = 1
    for component in Component:
        # Memory and device saves run side by side, so the prediction for saves is the time that they add.
        parts = _parts_of(downtime, component)
        predicted = sum(names[name] for name in parts)
        shown = join([fields.ms(f"downtime.predicted_parts_ns.{name}") for name in parts], " + ")
        base = fields.ms(f"downtime.predicted_bases_ns.{component}") if component in downtime.predicted_bases_ns else ""
        bars = [Bar(0, predicted, "predicted", f"predicted {short(predicted)}")]
        if completed:
            bars.insert(0, Bar(0, actual[component], "took", f"took {short(actual[component])}"))
        title = component_title(downtime, component)
        cells = (base, shown, exact_ms(actual[component])) if completed else (base, shown)
        rows.append(Track(title, cells, tuple(bars)))
        end_ns = max(end_ns, predicted, actual[component] if completed else 0)
    heads = ("component", "measured before ms", "predicted ms", "actual ms")[: 4 if completed else 3]
    return join(
        [
            tracks("The prediction by component", heads, rows, Axis(0, round(end_ns * 1.04) + 1)),
            note(
                "Measured before: what this attempt had measured or tried when it predicted, before past migrations "
                "corrected it. Frames are predictions" + (", bars are what it took." if completed else ".")
            ),
        ]
    )


def _parts_of(downtime: Downtime, component: Component) -> list[str]:
    """The names under which a component's prediction stands in the record."""
    return [name for name in predicted_names(component) if name in downtime.predicted_parts_ns]


def component_title(downtime: Downtime, component: Component) -> str:
    """The name of a component on the page: those of its pieces in the prediction."""
    return " and ".join(_parts_of(downtime, component))


def overruns(downtime: Downtime) -> dict[Component, int]:
    """Actual less predicted duration of each component (ns)."""
    actual, predicted = downtime.by_component(), downtime.predicted_parts_ns
    return {
        component: actual[component] - sum(predicted[name] for name in parts)
        for component in Component
        if (parts := _parts_of(downtime, component))
    }


def part_bars(downtime: Downtime) -> list[Bar]:
    """The bars of a downtime's parts end to end, and of the unattributed rest."""
    bars: list[Bar] = []
    begin_ns, shaded, before = 0, False, None
    for part in downtime.parts:
        # Neighbours of one side differ in shade, so that they can be told apart.
        shaded = part.side == before and not shaded
        before = part.side
        what = f"{part.name}: {short(part.ns)}"
        bars.append(Bar(begin_ns, part.ns, part.side + (" other" if shaded else ""), what))
        begin_ns += part.ns
    rest = downtime.unattributed_ns
    if rest > 0:
        bars.append(Bar(begin_ns, rest, UNATTRIBUTED, f"{UNATTRIBUTED}: {short(rest)}"))
    return bars


def breakdown(fields: Fields) -> Section | None:
    """Every part of the downtime to the nanosecond, and the short ones enlarged."""
    downtime = fields.record.downtime
    if not downtime:
        return None
    measured = downtime.measured_ns
    bars = part_bars(downtime)
    rows = []
    for index, (part, bar) in enumerate(zip(downtime.parts, bars, strict=False)):
        path = f"downtime.parts.{index}"
        side = chip(part.side, fields.show(f"{path}.side"))
        cells = (side, fields.ms(f"{path}.ns"), share(bar.ns, measured))
        rows.append(Track(fields.show(f"{path}.name"), cells, (bar,)))
    unattributed = ("", fields.ms("downtime.unattributed_ns"), share(downtime.unattributed_ns, measured))
    rows.append(Track(UNATTRIBUTED, unattributed, tuple(bars[len(downtime.parts) :]), "rest-row"))
    total = ("", fields.ms("downtime.measured_ns"), share(measured, measured))
    what = fields.record.stop_name
    rows.append(Track(what, total, (Bar(0, measured, "whole", f"{what}: {short(measured)}"),), "sum-row"))
    marks = tuple(
        Bar(point.ns, 0, f"instant {point.side}", f"{point.name}: {short(point.ns)}")
        for point in fields.record.checkpoints
    )
    end_ns = max([measured, *(mark.begin_ns for mark in marks)])
    sums = {side: sum(part.ns for part in downtime.parts if part.side == side) for side in SIDES}
    by_side = [el("span", chip(side, side), " ", exact_ms(ns), " ms") for side, ns in sums.items()]
    return section(
        "downtime",
        f"The {what}, part by part",
        el("p", *by_side, class_="by-side"),
        magnified(f"The {what} of {short(measured)}", bars, measured),
        tracks(
            "Parts of the downtime",
            ("part", "side", "ms", "share"),
            rows,
            Axis(0, max(1, round(end_ns * 1.005)), marks),
        ),
        note(
            "Parts and the unattributed rest sum to the whole, to the nanosecond. Bars stand end to end; gaps "
            "between the parts are gathered in the rest. Thin lines are QEMU’s checkpoints."
        ),
        _guest_gap(fields),
        zoom_hint(),
    )


def _guest_gap(fields: Fields) -> str | None:
    """The blackout as the guest observed it: the gap between two of its own heartbeats."""
    gap = fields.record.guest_gap
    if gap is None:
        return None
    seen = f"The guest itself missed {short(gap.guest_ns)} between two heartbeats"
    return el(
        "p", seen, " (", fields.ms("guest_gap.guest_ns"), " ms on its own TSC, ", fields.ms("guest_gap.host_ns"),
        " ms on the host’s clock).", class_="gap",
    )  # fmt: skip


def checkpoints(fields: Fields) -> Section | None:
    """QEMU's checkpoints in the order of time."""
    found = sorted(enumerate(fields.record.checkpoints), key=lambda row: row[1].ns)
    if not found:
        return None
    rows = []
    before_ns = 0
    for index, point in found:
        path = f"checkpoints.{index}"
        what = f"{point.name}: {short(point.ns)}"
        bars = (
            Bar(before_ns, point.ns - before_ns, "since", what),
            Bar(point.ns, 0, f"instant point {point.side}", what),
        )
        side = chip(point.side, fields.show(f"{path}.side"))
        cells = (side, fields.ms(f"{path}.ns"), exact_ms(point.ns - before_ns))
        meaning = el("small", MEANING_OF_CHECKPOINT.get(point.name, ""), class_="meaning")
        rows.append(Track(join([fields.show(f"{path}.name"), meaning]), cells, bars))
        before_ns = point.ns
    return section(
        "checkpoints",
        "QEMU’s checkpoints",
        tracks(
            "QEMU's checkpoints",
            ("checkpoint", "side", "at ms", "since last ms"),
            rows,
            Axis(0, max(1, round(before_ns * 1.01))),
        ),
        note(
            "Since the stop was requested. The destination counts with the upper bound of every transit, so its "
            "checkpoints may lie behind the source’s src-downtime-end by that much."
        ),
    )
