"""The report on one attempt, section by section. Everything comes from the record; what is computed from it (shares,
positions, differences) is said in words or drawn, and never carries a ``data-field``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from typing import Any, Final

from migrated.parameters import MigrationParameters
from migrated.report.charts import Axis, Bar, Series, Track, magnified, plot, tracks
from migrated.report.fields import NOTHING, Fields, exact_ms, grouped, join_unit, percent, rate, short, size
from migrated.report.markup import Markup, Node, el, join

SIDES: Final = ("source", "link", "destination")
UNATTRIBUTED: Final = "unattributed"
OUTCOME_LOOKS: Final = {"completed": "good", "in-doubt": "bad"}
CHECKPOINTS: Final = {
    "src-downtime-start": "the stop is requested",
    "src-vm-stopped": "the vCPUs stand still",
    "src-iterable-saved": "last pages and iterable device states are sent",
    "src-non-iterable-saved": "all device states are sent",
    "dst-precopy-loadvm-completed": "everything is loaded",
    "dst-precopy-bh-vm-started": "the vCPUs run",
    "src-downtime-end": "the guest runs again",
}


def sections(fields: Fields) -> Iterator[Markup]:
    """The whole page on one attempt."""
    yield header(fields)
    yield from filter(None, (_prediction(fields), _timeline(fields), _downtime(fields), _rounds(fields)))
    yield from filter(None, (_devices(fields), _checkpoints(fields), _time(fields)))
    yield _memory(fields)
    yield _parameters(fields)
    yield from filter(None, (_log(fields), _further(fields)))
    yield _document(fields)


# --- the first look ---------------------------------------------------------------------------------------------------


def header(fields: Fields) -> Markup:
    """What happened, in a sentence and a handful of figures."""
    identity = [
        el("span", "migration ", fields.show("migration_id")),
        el("span", "epoch ", fields.show("epoch")),
        el("span", "began ", fields.show("started_at", fields["started_at"][:19].replace("T", " ")), " UTC"),
        el("span", fields.show("source_host"), " → ", fields.show("destination_host"), " at ", fields.show("peer")),
        el("span", "as recorded by the ", fields.show("role")),
    ]
    reason = fields["reason"]
    return el(
        "header",
        el("p", "migrated · record of one migration", class_="kicker"),
        el("h1", fields.show("guest"), " ", badge(fields)),
        el("p", sentence(fields.document), class_="sentence"),
        el("p", el("b", "Reason: "), fields.show("reason"), class_="reason") if reason else None,
        el("p", *identity, class_="identity"),
        _key_figures(fields),
    )


def badge(fields: Fields) -> Markup:
    """The outcome, coloured."""
    late = fields["downtime"] and fields["downtime.limit_violated"] and fields["outcome"] == "completed"
    look = "warn" if late else OUTCOME_LOOKS.get(fields["outcome"], "warn")
    return el("span", fields.show("outcome"), ", late" if late else None, class_=f"badge {look}")


def sentence(record: Any) -> str:
    """The outcome in words."""
    guest, there = record["guest"], record["destination_host"] or record["peer"]
    here, took, downtime = record["source_host"], short(record["total_ns"]), record["downtime"]
    match record["outcome"]:
        case "completed":
            text = f"{guest} moved from {here} to {there} in {took}"
            return f"{text} and stood still for {_against_limit(downtime)}." if downtime else f"{text}."
        case "in-doubt":
            return (
                f"{guest} was handed over to {there}, which has not answered since: it is kept stopped on {here} until "
                "the other host or an operator says which copy runs."
            )
        case outcome if downtime:
            text = "The switchover was given up" if outcome == "aborted" else f"The migration ended as {outcome}"
            return f"{text}: {guest} runs on where it was, on {here}, after a pause of {_against_limit(downtime)}."
        case "refused":
            return f"The migration was refused before the guest was stopped: {guest} ran on, on {here}."
        case outcome:
            return f"The migration was {outcome} after {took}, before the guest was stopped: {guest} ran on, on {here}."


def _against_limit(downtime: Any) -> str:
    measured, limit = downtime["measured_ns"], downtime["limit_ns"]
    if measured > limit:
        return f"{short(measured)}, {short(measured - limit)} more than the limit of {short(limit)}"
    return f"{short(measured)}, {percent(measured / limit)} of the {short(limit)} that it may" if limit else short(measured)


def _key_figures(fields: Fields) -> Markup:
    figures: list[tuple[str, Node, Node]] = []
    downtime = fields["downtime"]
    if downtime:
        what = "Downtime" if fields["outcome"] in ("completed", "in-doubt") else "Pause"
        bounds = join(["between ", fields.ms("downtime.lower_ns"), " and ", fields.ms("downtime.upper_ns"), " ms"])
        figures.append((what, fields.short("downtime.measured_ns"), bounds))
        used = percent(downtime["measured_ns"] / downtime["limit_ns"]) + " of it used" if downtime["limit_ns"] else None
        violated = fields.show("downtime.limit_violated", "exceeded" if downtime["limit_violated"] else "kept")
        figures.append(("Limit", fields.short("downtime.limit_ns"), join([violated, used], ", ")))
        figures.append(("Predicted", fields.short("downtime.predicted_ns"), _error(downtime)))
    figures.append(("Total time", fields.short("total_ns"), join([fields.short("setup_ns"), " of it set-up"])))
    moved = join(["of ", fields.size("ram.total_bytes"), "; ", fields.size("ram.downtime_bytes"), " while it stood still"])
    figures.append(("Moved", fields.size("ram.transferred_bytes"), moved))
    figures.append(("Rounds", grouped(len(fields["rounds"])), join([fields.count("ram.dirty_sync_count"), " dirty-log reads"])))
    if fields["digest.source"]:
        figures.append(("Memory digest", _digest_verdict(fields), fields.show("digest.algorithm")))
    cells = [el("div", el("dt", name), el("dd", value), el("dd", note, class_="note")) for name, value, note in figures]
    return el("dl", *cells, class_="figures")


def _error(downtime: Any) -> str | None:
    predicted, measured = downtime["predicted_ns"], downtime["measured_ns"]
    if predicted is None or not measured:
        return None
    off = percent(abs(predicted - measured) / measured)
    return f"{off} too {'high' if predicted > measured else 'low'}" if predicted != measured else "exact"


def _digest_verdict(fields: Fields) -> str:
    source, destination = fields["digest.source"], fields["digest.destination"]
    return "not compared" if destination is None else "equal" if source == destination else "different"


# --- time -------------------------------------------------------------------------------------------------------------


def _prediction(fields: Fields) -> Markup | None:
    if not fields["downtime"]:
        return None
    downtime = fields["downtime"]
    measured, upper, limit = downtime["measured_ns"], downtime["upper_ns"], downtime["limit_ns"]
    tolerance = round(fields["parameters.switchover_limit_ms"] * 1e6)
    predicted, bound = downtime["predicted_ns"], downtime["predicted_upper_ns"]
    interval = Bar(downtime["lower_ns"], upper - downtime["lower_ns"], "interval", f"between {short(downtime['lower_ns'])} and {short(upper)}")
    rows = [Track("actual", (fields.ms("downtime.measured_ns"),), (*part_bars(downtime), interval))]
    if predicted is not None:
        rows.append(Track("predicted", (fields.ms("downtime.predicted_ns"),), (Bar(0, predicted, "predicted", f"predicted {short(predicted)}"),)))
    if bound is not None:
        rows.append(Track("its bound", (fields.ms("downtime.predicted_upper_ns"),), (Bar(0, bound, "bound", f"bound {short(bound)}"),)))
    rows.append(Track("limit", (fields.ms("downtime.limit_ns"),), (Bar(0, limit, "allowed", f"limit {short(limit)}"),)))
    if tolerance:
        rows.append(Track("limit and tolerance", (exact_ms(limit + tolerance),), (Bar(0, limit + tolerance, "allowed", "what the destination aborts at"),)))
    counts = {
        "source_reported_ns": "last told by the source",
        "destination_measured_ns": "counted by the destination at its vote",
        "hold_ns": "held by the operator",
    }
    for name, title in counts.items():
        if downtime[name]:
            rows.append(Track(title, (fields.ms(f"downtime.{name}"),), (Bar(0, downtime[name], "bound", short(downtime[name])),)))
    end = max(measured, upper, limit + tolerance, predicted or 0, bound or 0, *(downtime[name] or 0 for name in counts))
    axis = Axis(0, round(end * 1.04) or 1, (Bar(limit, 0, "limit", f"limit {short(limit)}"),))
    note = "No bound was recorded with the prediction." if predicted is not None and bound is None else None
    return section(
        "prediction",
        "Predicted against actual",
        tracks("The downtime, its prediction and its limit", ("", "ms"), rows, axis),
        el("p", note, class_="note") if note else None,
        legend(),
    )


def part_bars(downtime: Any) -> list[Bar]:
    """The parts of a downtime end to end, and what they leave of it."""
    bars: list[Bar] = []
    begin_ns = 0
    for index, part in enumerate(downtime["parts"]):
        # Neighbours of one side differ in shade, so that they can be told apart.
        shade = " other" if index % 2 else ""
        bars.append(Bar(begin_ns, part["ns"], part["side"] + shade, f"{part['name']} ({part['side']}): {short(part['ns'])}"))
        begin_ns += part["ns"]
    rest = downtime["unattributed_ns"]
    if rest > 0:
        bars.append(Bar(begin_ns, rest, UNATTRIBUTED, f"{UNATTRIBUTED}: {short(rest)}"))
    return bars


def _timeline(fields: Fields) -> Markup | None:
    phases, total = fields.rows("phases"), fields["total_ns"]
    if not phases:
        return None
    rows: list[Track] = []
    stop_ns = next((fields[f"{path}.begin_ns"] for path in phases if fields[f"{path}.name"] == "Pause"), None)
    downtime = fields["downtime"] if stop_ns is not None else None
    rows.append(_guest_track(fields, stop_ns, downtime))
    rows.append(Track(join(["On the source, ", fields.show("source_host")])))
    for path in phases:
        begin_ns, end_ns = fields[f"{path}.begin_ns"], fields[f"{path}.end_ns"]
        name = fields[f"{path}.name"]
        cells = (fields.ms(f"{path}.begin_ns"), fields.ms(f"{path}.end_ns"), exact_ms(end_ns - begin_ns))
        bar = Bar(begin_ns, end_ns - begin_ns, "source", f"{name}: {short(end_ns - begin_ns)}")
        rows.append(Track(fields.show(f"{path}.name"), cells, (bar,)))
    log_bars = _log_bars(fields)
    none = (NOTHING, NOTHING, NOTHING)
    if log_bars["source"]:
        rows.append(Track("log lines", none, tuple(log_bars["source"]), "log-row"))
    there: list[Track] = []
    if downtime:
        for bar, part in zip(part_bars(downtime), downtime["parts"], strict=False):
            if part["side"] == "destination":
                begin_ns = stop_ns + bar.begin_ns
                cells = (exact_ms(begin_ns), exact_ms(begin_ns + bar.ns), exact_ms(bar.ns))
                there.append(Track(part["name"], cells, (Bar(begin_ns, bar.ns, "destination", bar.what),)))
    if log_bars["destination"]:
        there.append(Track("log lines", none, tuple(log_bars["destination"]), "log-row"))
    if there:
        rows += [Track(join(["On the destination, ", fields.show("destination_host")])), *there]
    marks = (Bar(stop_ns, 0, "instant", "the stop is requested"),) if downtime else ()
    heads = ("", "begin ms", "end ms", "took ms")
    placed = (
        "Phases are on the source's clock, from the beginning of the attempt. What the destination did while the guest "
        "stood still is placed by the parts of the downtime, end to end; log lines by their wall clocks"
    )
    skew = fields["time"]["wall_clock_skew_ns"] if fields["time"] else None
    corrected = f", the destination's corrected by {short(sum(skew) // 2)} of skew." if skew else "."
    return section(
        "timeline",
        "Time line of both hosts",
        tracks("Phases of the migration on both hosts", heads, rows, Axis(0, max(1, total), marks)),
        el("p", placed + corrected, class_="note"),
    )


def _guest_track(fields: Fields, stop_ns: int | None, downtime: Any) -> Track:
    total, none = fields["total_ns"], (NOTHING, NOTHING, NOTHING)
    guest = f"guest {fields['guest']}"
    if stop_ns is None or not downtime:
        return Track(guest, none, (Bar(0, total, "runs-source", "runs on the source"),), "guest-row")
    end_ns = stop_ns + downtime["measured_ns"]
    side = "destination" if fields["outcome"] == "completed" else "source"
    bars = (
        Bar(0, stop_ns, "runs-source", "runs on the source"),
        Bar(stop_ns, end_ns - stop_ns, "stopped", f"stands still for {short(end_ns - stop_ns)}"),
        Bar(end_ns, max(0, total - end_ns), f"runs-{side}", f"runs on the {side}"),
    )
    return Track(guest, (exact_ms(stop_ns), exact_ms(end_ns), exact_ms(end_ns - stop_ns)), bars, "guest-row")


def _log_bars(fields: Fields) -> dict[str, list[Bar]]:
    """Log lines as instants on the attempt's axis."""
    time = fields["time"]
    skew_ns = sum(time["wall_clock_skew_ns"]) // 2 if time else 0
    found: dict[str, list[Bar]] = {"source": [], "destination": []}
    for line in fields["events"]:
        at_ns = since_start_ns(fields, line["at"])
        if at_ns is not None:
            at_ns -= skew_ns if line["side"] == "destination" else 0
            found[line["side"]].append(Bar(at_ns, 0, f"instant {line['side']}", f"{line['level']}: {line['event']}"))
    return found


def since_start_ns(fields: Fields, at: str) -> int | None:
    """How long after the beginning a wall clock said ``at``; None when that is no time."""
    try:
        passed = datetime.fromisoformat(at) - datetime.fromisoformat(fields["started_at"])
    except (ValueError, TypeError):
        return None
    return round(passed.total_seconds() * 1e6) * 1000


def _downtime(fields: Fields) -> Markup | None:
    downtime = fields["downtime"]
    if not downtime:
        return None
    measured = downtime["measured_ns"]
    bars = part_bars(downtime)
    rows = []
    for path, bar in zip(fields.rows("downtime.parts"), bars, strict=False):
        side = fields[f"{path}.side"]
        cells = (chip(side, fields.show(f"{path}.side")), fields.ms(f"{path}.ns"), share(bar.ns, measured))
        rows.append(Track(fields.show(f"{path}.name"), cells, (bar,)))
    rest = (NOTHING, fields.ms("downtime.unattributed_ns"), share(downtime["unattributed_ns"], measured))
    rows.append(Track(UNATTRIBUTED, rest, tuple(bars[len(downtime["parts"]) :]), "rest-row"))
    whole = Bar(0, measured, "whole", short(measured))
    rows.append(Track("downtime", (NOTHING, fields.ms("downtime.measured_ns"), share(measured, measured)), (whole,), "sum-row"))
    by_side = [
        join([chip(side, side), " ", exact_ms(sum(p["ns"] for p in downtime["parts"] if p["side"] == side)), " ms"])
        for side in SIDES
    ]
    axis = Axis(0, max(1, round(measured * 1.005)), tuple(_checkpoint_marks(fields)))
    spoken = ", ".join(bar.what for bar in bars)
    return section(
        "downtime",
        "The downtime, part by part",
        el("p", join(by_side, "  "), class_="by-side"),
        magnified(f"Downtime of {short(measured)}: {spoken}", bars, measured),
        tracks("Parts of the downtime", ("part", "side", "ms", "share"), rows, axis),
        el(
            "p",
            "Parts and the unattributed rest sum to the downtime, to the nanosecond. Bars stand end to end; gaps between "
            "parts are gathered in the rest, at the end. Thin lines are QEMU's checkpoints.",
            class_="note",
        ),
        el("p", "Choose a bar to enlarge it.", class_="note scripted", hidden=True),
    )


def share(part: int, whole: int) -> str:
    """A part in percent, one decimal."""
    return f"{part / whole * 100:.1f} %" if whole else NOTHING


def _checkpoint_marks(fields: Fields) -> Iterator[Bar]:
    for point in fields["checkpoints"]:
        yield Bar(point["ns"], 0, f"instant {point['side']}", f"{point['name']}: {short(point['ns'])}")


# --- memory and devices -----------------------------------------------------------------------------------------------


def _rounds(fields: Fields) -> Markup | None:
    paths = fields.rows("rounds")
    if not paths:
        return None
    heads = (
        "round", "pages scanned", "left dirty", "zero pages", "sent", "time ms", "scan ms", "bandwidth", "pages dirtied/s",
        "predicted ms", "throttle %", "decision",
    )  # fmt: skip
    rows = [
        (
            fields.show(f"{path}.round"),
            fields.count(f"{path}.scanned_pages", "pages"),
            fields.count(f"{path}.dirty_pages", "pages"),
            fields.count(f"{path}.zero_pages", "pages"),
            fields.size(f"{path}.bytes"),
            fields.ms(f"{path}.ns"),
            fields.ms(f"{path}.scan_ns"),
            fields.rate(f"{path}.bandwidth_bytes_per_s"),
            fields.count(f"{path}.dirty_rate_pages_per_s", "pages/s"),
            fields.ms(f"{path}.predicted_downtime_ns"),
            fields.show(f"{path}.throttle_percent"),
            el("span", fields.show(f"{path}.decision"), class_="decision"),
        )
        for path in paths
    ]
    return section("rounds", "Memory rounds", *round_plots(fields), table("Memory rounds", heads, rows, words=(11,)))


def round_plots(fields: Fields) -> list[Markup]:
    """What the rounds sent and left, how fast, and why the guest was not stopped earlier. One round needs no plot."""
    rounds, page = fields["rounds"], fields["ram.page_size"]
    if len(rounds) < 2:
        return []
    numbers = [row["round"] for row in rounds]
    limit_ns = round(fields["parameters.downtime_limit_ms"] * 1e6)

    def line(name: str, look: str, key: str, factor: int = 1) -> Series:
        return Series(name, look, tuple(None if row[key] is None else row[key] * factor for row in rounds))

    plots = [
        plot("Sent, and left dirty", [line("sent", "source", "bytes"), line("dirty after it", "link", "dirty_pages", page)], numbers, size, base=16),
        plot(
            "Bandwidth against dirty rate",
            [line("bandwidth", "source", "bandwidth_bytes_per_s"), line("dirtied", "link", "dirty_rate_pages_per_s", page)],
            numbers,
            rate,
            base=16,
        ),
        plot(
            "Predicted downtime",
            [line("predicted", "destination", "predicted_downtime_ns")],
            numbers,
            lambda ns: short(round(ns)),
            base=10,
            limit=("limit", limit_ns),
        ),
    ]
    return [el("div", *plots, class_="plots")]


def _devices(fields: Fields) -> Markup | None:
    paths = fields.rows("devices")
    if not paths:
        return None
    rows = []
    longest = 1
    for path in paths:
        device = fields[path]
        save, load, expected = device["save_ns"], device["load_ns"], device["expected_load_ns"]
        longest = max(longest, save or 0, load or 0, expected or 0)
        bars = []
        if save:
            bars.append(Bar(0, save, "source upper", f"save {short(save)}"))
        if load:
            bars.append(Bar(0, load, "destination lower", f"load {short(load)}"))
        if expected:
            bars.append(Bar(expected, 0, "instant expected", f"expected load {short(expected)}"))
        cells = (
            fields.show(f"{path}.kind"),
            fields.size(f"{path}.bytes"),
            fields.size(f"{path}.precopy_bytes"),
            fields.ms(f"{path}.save_ns"),
            fields.ms(f"{path}.load_ns"),
            fields.ms(f"{path}.expected_load_ns"),
        )
        rows.append(Track(fields.show(f"{path}.name"), cells, tuple(bars)))
    heads = ("device", "kind", "state", "in pre-copy", "SAVE ms", "LOAD ms", "expected LOAD ms")
    return section(
        "devices",
        "Devices",
        tracks("Devices, what saving and loading them took", heads, rows, Axis(0, round(longest * 1.02) + 1)),
        el(
            "p",
            chip("source", "SAVE"), " on the source and ", chip("destination", "LOAD"), " on the destination; a line marks "
            "the load that the destination had expected. Loads begin while later devices are saved, so their sum may "
            "exceed what they add to the downtime.",
            class_="note",
        ),
    )  # fmt: skip


def _checkpoints(fields: Fields) -> Markup | None:
    paths = sorted(fields.rows("checkpoints"), key=lambda path: int(fields[f"{path}.ns"]))
    if not paths:
        return None
    rows = []
    before = 0
    for path in paths:
        point = fields[path]
        cells = (
            chip(point["side"], fields.show(f"{path}.side")),
            fields.ms(f"{path}.ns"),
            exact_ms(point["ns"] - before),
        )
        name = join([fields.show(f"{path}.name"), el("small", CHECKPOINTS.get(point["name"], ""), class_="meaning")])
        bar = Bar(before, point["ns"] - before, f"{point['side']} thin", f"{point['name']}: {short(point['ns'])}")
        rows.append(Track(name, cells, (bar,)))
        before = point["ns"]
    return section(
        "checkpoints",
        "QEMU’s checkpoints",
        tracks("QEMU's downtime checkpoints", ("checkpoint", "side", "at ms", "since last ms"), rows, Axis(0, max(1, round(before * 1.005)))),
        el(
            "p",
            "Since the stop was requested. The destination counts with the upper bound of every transit, so its "
            "checkpoints may lie after the source's src-downtime-end by that much.",
            class_="note",
        ),
    )


def _memory(fields: Fields) -> Markup:
    facts = [(path.removeprefix("ram."), fields.by_name(path)) for path in fields.members("ram") if path != "ram.encodings"]
    digest = [(path, fields.show(path)) for path in fields.members("digest")]
    heads = ("encoding", "batches", "page bytes", "wire bytes", "on the wire", "time ms")
    rows = []
    for path in fields.rows("ram.encodings"):
        pages = fields[f"{path}.page_bytes"]
        rows.append(
            (
                fields.show(f"{path}.encoding"),
                fields.count(f"{path}.batches"),
                fields.size(f"{path}.page_bytes"),
                fields.size(f"{path}.wire_bytes"),
                share(fields[f"{path}.wire_bytes"], pages),
                fields.ms(f"{path}.ns"),
            )
        )
    return section(
        "memory",
        "Memory, encodings and digest",
        facts_list([*facts, *digest]),
        table("Encodings", heads, rows) if rows else None,
    )


# --- guest time -------------------------------------------------------------------------------------------------------


def _time(fields: Fields) -> Markup | None:
    if not fields["time"]:
        return None
    lower, upper, used = (fields[f"time.elapsed{name}_ns"] for name in ("_lower", "_upper", ""))
    width = max(1, upper - lower)
    begin = min(lower, used) - width // 5
    interval = tracks(
        "How long the guest's time was on its way",
        ("", "ms"),
        [
            Track("at least", (fields.ms("time.elapsed_lower_ns"),), (Bar(lower, 0, "instant", "lower bound"),)),
            Track("used", (fields.ms("time.elapsed_ns"),), (Bar(lower, width, "interval", f"known to {short(width)}"), Bar(used, 0, "limit", "used"))),
            Track("at most", (fields.ms("time.elapsed_upper_ns"),), (Bar(upper, 0, "instant", "upper bound"),)),
        ],
        Axis(begin, max(upper, used) + width // 5 - begin + 1),
    )
    rows = []
    for path in fields.members("time.before"):
        name = path.rpartition(".")[2]
        before, after = fields[path], fields[f"time.after.{name}"]
        rows.append((name, fields.count(path), fields.count(f"time.after.{name}"), _signed(after - before)))
    stages = fields.rows("time.stages")
    begin_ns = 0
    stage_rows = []
    for path in stages:
        ns = fields[f"{path}.ns"]
        cells = (fields.ms(f"{path}.ns"), fields.count(f"{path}.tsc_delta", "ticks"), fields.count(f"{path}.boot_hrtime_delta", "ns"))
        stage_rows.append(Track(fields.show(f"{path}.name"), cells, (Bar(begin_ns, ns, "destination", short(ns)),)))
        begin_ns += ns
    facts = [
        ("policy", fields.show("time.policy")),
        ("elapsed time known to", join_unit(exact_ms(upper - lower), "ms")),
        ("round trip of the exchange", join_unit(fields.ms("time.round_trip_ns"), "ms")),
        ("guest uptime at the export", join_unit(fields.ms("time.guest_uptime_ns"), "ms")),
        ("guest uptime at the import (boot_hrtime_delta)", join_unit(fields.ms("time.boot_hrtime_delta"), "ms")),
        ("added to the guest’s TSC", join_unit(fields.count("time.tsc_delta"), "ticks")),
        ("wall clocks apart, at least", join_unit(fields.ms("time.wall_clock_skew_ns.0"), "ms")),
        ("wall clocks apart, at most", join_unit(fields.ms("time.wall_clock_skew_ns.1"), "ms")),
    ]
    return section(
        "time",
        "Guest time",
        el("p", "The guest’s clocks were moved on by the time between their export on the source and their import.", class_="note"),
        interval,
        facts_list(facts),
        table("Time data before and after", ("time data", "before", "after", "change"), rows),
        tracks("Stages of the adjustment", ("stage", "ms", "TSC ticks", "boot_hrtime ns"), stage_rows, Axis(0, max(1, round(begin_ns * 1.02)))) if stages else None,
    )  # fmt: skip


def _signed(value: int) -> str:
    return f"+{grouped(value)}" if value > 0 else grouped(value)


# --- the rest ---------------------------------------------------------------------------------------------------------


def _parameters(fields: Fields) -> Markup:
    defaults = MigrationParameters().model_dump(mode="json")
    facts: list[tuple[Node, Node]] = []
    for path in fields.members("parameters"):
        name = path.rpartition(".")[2]
        changed = fields[path] != defaults.get(name)
        facts.append((el("b", name, title="not the default") if changed else name, fields.by_name(path)))
    return section(
        "parameters", "Parameters", facts_list(facts), el("p", "Bold: not the default.", class_="note")
    )


def _log(fields: Fields) -> Markup | None:
    paths = fields.rows("events")
    if not paths:
        return None
    lines = []
    for path in paths:
        at_ns = since_start_ns(fields, fields[f"{path}.at"])
        shown = fields[f"{path}.at"] if at_ns is None else f"{at_ns / 1e6:+.3f}"
        level = fields[f"{path}.level"]
        lines.append(
            el(
                "li",
                fields.show(f"{path}.at", shown, title=fields[f"{path}.at"]),
                chip(fields[f"{path}.side"], fields.show(f"{path}.side")),
                el("span", fields.show(f"{path}.level"), class_="level"),
                el("span", fields.show(f"{path}.event"), class_="event"),
                class_=f"level-{level}" if level in ("debug", "warning", "error", "critical") else None,
            )
        )
    return section(
        "log",
        "Log lines of both daemons",
        el("p", "Milliseconds since the beginning, each by the wall clock of the host that wrote the line.", class_="note"),
        el("ol", *lines, class_="log", tabindex=0, aria_label="Log lines"),
    )


def _further(fields: Fields) -> Markup | None:
    """What the record holds and no section above shows, so that the page is complete whatever a record grows."""
    rest = fields.rest()
    return section("further", "Further fields", facts_list([(path, fields.by_name(path)) for path in rest])) if rest else None


def _document(fields: Fields) -> Markup:
    # ASCII only: nothing that a peer wrote can then hide or break anything in the text.
    document = Markup(escape(json.dumps(fields.document, indent=1)))
    return section(
        "record",
        "The record",
        el("details", el("summary", "The whole record as JSON"), el("pre", document, id="document", tabindex=0)),
    )


# --- pieces -----------------------------------------------------------------------------------------------------------


def section(name: str, title: str, *body: Node) -> Markup:
    """A titled section that a link can lead to."""
    return el("section", el("h2", title), *body, id=name)


def chip(side: str, shown: Node) -> Markup:
    """A side, in its colour and in words."""
    return el("span", shown, class_=f"chip {side}")


def legend() -> Markup:
    """The colours of the sides."""
    return el("p", join([chip(side, side) for side in SIDES], " "), " ", chip(UNATTRIBUTED, UNATTRIBUTED), class_="legend")


def facts_list(facts: Sequence[tuple[Node, Node]]) -> Markup:
    """Names and values."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in facts), class_="facts")


def table(label: str, heads: Sequence[str], rows: Sequence[Sequence[Node]], words: Sequence[int] = ()) -> Markup:
    """A table that scrolls by itself where the page is too narrow. ``words`` are columns of text besides the first."""
    align = ["" if index == 0 or index in words else "figure" for index in range(len(heads))]
    top = el("tr", *(el("th", head, scope="col", class_=look or None) for head, look in zip(heads, align, strict=True)))
    body = [
        el(
            "tr",
            *(
                el("th", cell, scope="row") if index == 0 else el("td", cell, class_=look or None)
                for index, (cell, look) in enumerate(zip(row, align, strict=True))
            ),
        )
        for row in rows
    ]
    inner = el("table", el("thead", top), el("tbody", *body))
    return el("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)
