"""Lists and figures for people: guests, past attempts, statistics, estimates, events, and any flat object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from migrated.base.errors import DocumentError
from migrated.cli.style import (
    STATUS_STYLES,
    add_fact,
    clean,
    duration,
    milliseconds,
    new_facts,
    new_table,
    outcome_style,
    rate,
)
from migrated.record.reading import read_record
from protocol.units import format_size

Json = Mapping[str, Any]
_VERDICT_STYLES: Final = {"ok": "green", "warning": "yellow", "refused": "bold red"}

_BOUNDS_SHOWN: Final = 20
"""Most guests in the table of bounds, those that were migrated most."""


def guests_table(guests: Sequence[Json]) -> RenderableType:
    """All guests of a host."""
    if not guests:
        return Text("No guest is on this host.")
    table = new_table("", "guest", "state", "memory>", "pid>", "api socket")
    for guest in guests:
        style = STATUS_STYLES.get(guest["state"], "")
        state = Text(guest["state"], style=style)
        pid = "-" if guest["pid"] is None else str(guest["pid"])
        memory = "-" if guest["memory_bytes"] is None else format_size(guest["memory_bytes"])
        table.add_row(clean(guest["name"]), state, memory, pid, clean(guest["api_socket"]))
    silent = [f"{guest['name']}: {guest['reason']}." for guest in guests if guest.get("reason")]
    return Group(table, *(Text(clean(line)) for line in silent)) if silent else table


def checks_table(rows: Sequence[Json]) -> Table:
    """The table of a guest's checks: refusals first, then warnings, then those that passed."""
    order = ("refused", "warning", "ok")
    table = new_table("", "what", "verdict", "found")
    for row in sorted(rows, key=lambda row: order.index(row["verdict"])):
        verdict = Text(row["verdict"], style=_VERDICT_STYLES[row["verdict"]])
        table.add_row(clean(row["name"]), verdict, clean(row["sentence"]))
    return table


def facts_view(facts: Json) -> Table:
    """Any flat object: one line per member; nested ones as ``outer.inner``."""
    table = new_facts("")
    for name, value in _flat(facts):
        add_fact(table, *_readable(name, value))
    return table


def history_table(documents: Sequence[Json]) -> RenderableType:
    """Past attempts, newest first. One that this version cannot read is told of beneath."""
    if not documents:
        return Text("No migration is in the history.")
    made = new_table("", "migration", "guest", "began (UTC)", "outcome", "total>", "downtime>", "predicted>", "limit>")
    unreadable: list[str] = []
    for document in documents:
        try:
            record = read_record(document)
        except DocumentError as error:
            unreadable.append(str(error))
            continue
        downtime = record.downtime
        outcome = Text(record.outcome, style=outcome_style(record.outcome))
        if downtime is not None and downtime.limit_violated:
            outcome.append(" (late)", style="yellow")
        known = (None, None, None) if downtime is None else (
            downtime.measured_ns, downtime.predicted_ns, downtime.limit_ns
        )  # fmt: skip
        began = clean(record.started_at)[:19].replace("T", " ")
        made.add_row(
            clean(record.migration_id), clean(record.guest), began, outcome, duration(record.total_ns),
            *map(duration, known),
        )  # fmt: skip
    if not unreadable:
        return made
    return Group(made, Text(clean(f"{len(unreadable)} more cannot be shown. {unreadable[0]}"), style="yellow"))


def stats_view(stats: Json) -> RenderableType:
    """``history --stats``."""
    facts = new_facts(f"Migrations: {stats['migrations']}")
    for outcome, count in sorted(stats["outcomes"].items()):
        add_fact(facts, outcome, f"{count} ({count / stats['migrations']:.1%})")
    add_fact(facts, "over the limit", stats["limit_violations"])
    if stats["prediction_coverage_pct"] is not None:
        add_fact(facts, "within the predicted bound", f"{stats['prediction_coverage_pct']:.1f} %")
    table = new_table("", "", "count>", "p50>", "p90>", "p95>", "p99>", "max>")
    rows = {"downtime_ns": "downtime", "abort_pause_ns": "pause when aborted", "total_ns": "total time"}
    keys = ("p50", "p90", "p95", "p99", "max")
    for key, title in rows.items():
        summary = stats[key]
        table.add_row(title, str(summary["count"]), *(duration(summary[k]) for k in keys))
    errors = stats["prediction_error_pct"]
    percent = ["-" if errors[k] is None else f"{errors[k]:.1f} %" for k in keys]
    table.add_row("prediction error", str(errors["count"]), *percent)
    return Group(facts, table, *_bounds_held(stats))


def _bounds_held(stats: Json) -> Iterator[RenderableType]:
    """Two tables of how often the predicted bound held, by regime and by guest; nothing when an older daemon does not
    tell."""
    for key, title in (("prediction_by_regime", "regime"), ("prediction_by_guest", "guest")):
        if not (rows := stats.get(key)):
            continue
        table = new_table("Within the predicted bound", title, "switchovers>", "held>", "share>")
        for name, row in list(rows.items())[:_BOUNDS_SHOWN]:
            share = row["held"] / row["switchovers"]
            table.add_row(clean(name), str(row["switchovers"]), str(row["held"]), f"{share:.1%}")
        yield table


def estimate_view(estimate: Json) -> RenderableType:
    """``migratectl estimate``."""
    fits = estimate["fits"]
    bound = duration(estimate["predicted_upper_ns"])
    line = f"downtime {duration(estimate['predicted_ns'])}, bound {bound}, limit {duration(estimate['limit_ns'])}"
    verdict = Text(f"{'Fits' if fits else 'Does not fit'}: {line}", style="bold green" if fits else "bold red")
    parts: list[RenderableType] = [verdict]
    if estimate["reason"]:
        parts.append(Text(clean(estimate["reason"]), style="yellow"))
    table = new_table("Predicted parts", "part", "ms>")
    for name, ns in estimate["parts_ns"].items():
        table.add_row(clean(name), milliseconds(ns))
    parts.append(table)
    shown = {"predicted_ns", "predicted_upper_ns", "limit_ns", "fits", "reason", "parts_ns"}
    rest = {name: value for name, value in estimate.items() if name not in shown}
    if rest:
        parts.append(facts_view(rest))
    return Group(*parts)


def event_line(event: Json) -> str:
    """One event as a plain line; the time is UTC."""
    stamp = event["timestamp"]
    seconds = stamp["seconds"] % 86_400
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{stamp['microseconds']:06}"
    data = " ".join(f"{name}={value}" for name, value in event.get("data", {}).items())
    return clean(f"{clock} {event['event']} {data}".rstrip())


def _flat(value: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, member in value.items():
        if isinstance(member, Mapping):
            yield from _flat(member, f"{prefix}{name}.")
        else:
            yield prefix + name, member


def _readable(name: str, value: object) -> tuple[str, object]:
    """A member's name and value for people: the unit that ends the name of a bare number stands behind the number."""
    if value is None:
        return name, "-"
    if isinstance(value, bool):
        return name, "yes" if value else "no"
    if isinstance(value, int | float):
        for suffix, form in (("_bytes_per_s", rate), ("_bytes", format_size), ("_ns", duration)):
            if name.endswith(suffix):
                return name.removesuffix(suffix), form(round(value))
    if isinstance(value, list):
        if any(isinstance(item, Mapping) for item in value):
            return name, f"{len(value)} (--json has them all)"
        return name, ", ".join(str(item) for item in value) or "-"
    return name, value
