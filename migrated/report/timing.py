"""Time: the phases of both hosts on one axis, and how the guest's own clocks were carried over."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from migrated.record.model import Downtime, PhaseRow, TimeSummary
from migrated.record.terms import Phase, Role
from migrated.report.charts import Axis, Bar, Track, tracks
from migrated.report.downtime import part_bars
from migrated.report.fields import Fields, exact_ms, join_unit, short
from migrated.report.markup import Markup, join
from migrated.report.pieces import Section, facts_list, note, section, signed, table, zoom_hint

BLANK: Final = ("", "", "")


def timeline(fields: Fields) -> Section | None:
    """Guest, source and destination on one axis from the beginning of the attempt."""
    phases, total_ns = fields.record.phases, fields.record.total_ns
    if not phases:
        return None
    stop_ns = next((phase.begin_ns for phase in phases if phase.name == Phase.PAUSE), None)
    downtime = fields.record.downtime
    log_lines = _log_bars(fields)
    here = [_phase_track(fields, f"phases.{index}", phase) for index, phase in enumerate(phases)]
    there = _destination_tracks(downtime, stop_ns) if downtime and stop_ns is not None else []
    rows = [_guest_track(fields, stop_ns, downtime)]
    halves: tuple[tuple[Role, str, list[Track]], ...] = (
        ("source", "source_host", here),
        ("destination", "destination_host", there),
    )
    for side, host, found in halves:
        if log_lines[side]:
            found.append(Track("log lines", BLANK, tuple(log_lines[side]), "log-row"))
        if found:
            rows += [Track(join([f"On the {side}, ", fields.show(host)])), *found]
    marks = (Bar(stop_ns, 0, "instant", "the stop is requested"),) if stop_ns is not None else ()
    skew_ns = _skew_ns(fields)
    corrected = f", the destination’s corrected by {short(skew_ns)} of skew." if skew_ns is not None else "."
    return section(
        "timeline",
        "Time line of both hosts",
        tracks(
            "Phases of the migration on both hosts",
            ("", "begin ms", "end ms", "took ms"),
            rows,
            Axis(0, max(1, total_ns), marks),
        ),
        note(
            "Phases are on the source’s clock, from the beginning of the attempt. What the destination did while the "
            "guest stood still is placed by the parts of the downtime, end to end; log lines by their wall clocks",
            corrected,
        ),
        zoom_hint(),
    )


def _phase_track(fields: Fields, path: str, phase: PhaseRow) -> Track:
    begin_ns, ns = phase.begin_ns, phase.end_ns - phase.begin_ns
    cells = (fields.ms(f"{path}.begin_ns"), fields.ms(f"{path}.end_ns"), exact_ms(ns))
    bar = Bar(begin_ns, ns, "source", f"{phase.name}: {short(ns)}")
    return Track(fields.show(f"{path}.name"), cells, (bar,))


def _destination_tracks(downtime: Downtime, stop_ns: int) -> list[Track]:
    found = []
    for bar, part in zip(part_bars(downtime), downtime.parts, strict=False):
        if part.side == "destination":
            begin_ns = stop_ns + bar.begin_ns
            cells = (exact_ms(begin_ns), exact_ms(begin_ns + bar.ns), exact_ms(bar.ns))
            found.append(Track(part.name, cells, (Bar(begin_ns, bar.ns, "destination", bar.what),)))
    return found


def _guest_track(fields: Fields, stop_ns: int | None, downtime: Downtime | None) -> Track:
    guest, total_ns = f"guest {fields.record.guest}", fields.record.total_ns
    if stop_ns is None or not downtime:
        # In doubt, the guest was stopped and the instant of its resume is not known.
        runs_ns = stop_ns if stop_ns is not None and fields.record.outcome == "in-doubt" else total_ns
        bars = [Bar(0, runs_ns, "runs-source", "runs on the source")]
        if runs_ns < total_ns:
            bars.append(Bar(runs_ns, total_ns - runs_ns, "stopped", "is kept stopped on the source"))
        return Track(guest, BLANK, tuple(bars), "guest-row")
    end_ns = stop_ns + downtime.measured_ns
    side = "destination" if fields.record.outcome == "completed" else "source"
    bars = [
        Bar(0, stop_ns, "runs-source", "runs on the source"),
        Bar(stop_ns, end_ns - stop_ns, "stopped", f"stands still for {short(end_ns - stop_ns)}"),
        Bar(end_ns, max(0, total_ns - end_ns), f"runs-{side}", f"runs on the {side}"),
    ]
    return Track(guest, (exact_ms(stop_ns), exact_ms(end_ns), exact_ms(end_ns - stop_ns)), tuple(bars), "guest-row")


def _skew_ns(fields: Fields) -> int | None:
    """The destination's less the source's wall clock: the middle of its bounds; None when it is not known."""
    time = fields.record.time
    return None if time is None else sum(time.wall_clock_skew_ns) // 2


def _log_bars(fields: Fields) -> dict[Role, list[Bar]]:
    """Log lines as instants on the attempt's axis, per side."""
    ahead_ns: dict[Role, int] = {"source": 0, "destination": _skew_ns(fields) or 0}
    found: dict[Role, list[Bar]] = {"source": [], "destination": []}
    for line in fields.record.events:
        at_ns, side = since_start_ns(fields, line.at), line.side
        if at_ns is not None:
            found[side].append(Bar(at_ns - ahead_ns[side], 0, f"instant {side}", f"{line.level}: {line.event}"))
    return found


def since_start_ns(fields: Fields, at: str) -> int | None:
    """The time from the beginning of the attempt until a wall clock said ``at`` (ns); None when ``at`` is no time."""
    try:
        passed = datetime.fromisoformat(at) - datetime.fromisoformat(fields.record.started_at)
    except (ValueError, TypeError):
        return None
    return round(passed.total_seconds() * 1e6) * 1000


def guest_time(fields: Fields) -> Section | None:
    """The adjustment of guest time: the elapsed time with its bounds, time data before and after, and the share of each
    stage."""
    time = fields.record.time
    if time is None:
        return None
    facts = [
        ("policy", fields.show("time.policy")),
        ("elapsed time known to", join_unit(exact_ms(time.elapsed_upper_ns - time.elapsed_lower_ns), "ms")),
        ("round trip of the exchange", join_unit(fields.ms("time.round_trip_ns"), "ms")),
        ("added to the guest’s TSC", join_unit(fields.count("time.tsc_delta"), "ticks")),
        ("guest uptime at the export", join_unit(fields.ms("time.guest_uptime_ns"), "ms")),
        ("guest uptime at the import", join_unit(fields.ms("time.boot_hrtime_delta"), "ms")),
        ("wall clocks apart, at least", join_unit(fields.ms("time.wall_clock_skew_ns.0"), "ms")),
        ("wall clocks apart, at most", join_unit(fields.ms("time.wall_clock_skew_ns.1"), "ms")),
    ]
    changes = []
    after = time.after.model_dump()
    for name, ns in time.before.model_dump().items():
        shown = (fields.count(f"time.before.{name}"), fields.count(f"time.after.{name}"))
        changes.append((name, *shown, signed(after[name] - ns)))
    return section(
        "time",
        "Guest time",
        note("The guest’s clocks were moved on by the time between their export on the source and their import."),
        _elapsed(fields, time),
        facts_list(facts),
        table("Time data before and after", ("time data", "before", "after", "change"), changes),
        _stages(fields, time),
        note("Stages: Δ itself, the daemon until it wrote to the VMM, and the VMM until its own clock took over."),
    )


def _elapsed(fields: Fields, time: TimeSummary) -> Markup:
    lower, upper, used = time.elapsed_lower_ns, time.elapsed_upper_ns, time.elapsed_ns
    width = max(1, upper - lower)
    known = Bar(lower, width, "interval", f"known to {short(width)}")
    rows = [
        Track("at least", (fields.ms("time.elapsed_lower_ns"),), (Bar(lower, 0, "instant", "at least"),)),
        Track("Δ in use", (fields.ms("time.elapsed_ns"),), (known, Bar(used, 0, "limit", "in use"))),
        Track("at most", (fields.ms("time.elapsed_upper_ns"),), (Bar(upper, 0, "instant", "at most"),)),
    ]
    begin_ns = min(lower, used) - width // 5
    return tracks("Elapsed time", ("", "ms"), rows, Axis(begin_ns, max(upper, used) + width // 5 + 1 - begin_ns))


def _stages(fields: Fields, time: TimeSummary) -> Markup:
    rows = []
    begin_ns = 0
    for index, stage in enumerate(time.stages):
        path, ns = f"time.stages.{index}", stage.ns
        cells = (
            fields.ms(f"{path}.ns"),
            fields.count(f"{path}.tsc_delta", "ticks"),
            fields.count(f"{path}.boot_hrtime_delta", "ns"),
        )
        rows.append(Track(fields.show(f"{path}.name"), cells, (Bar(begin_ns, ns, "destination", short(ns)),)))
        begin_ns += ns
    heads = ("stage", "ms", "TSC ticks", "boot_hrtime ns")
    return tracks("Stages of the adjustment", heads, rows, Axis(0, max(1, round(begin_ns * 1.02))))
