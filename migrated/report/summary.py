"""The head of the report: the outcome in a sentence and a handful of figures."""

from __future__ import annotations

from typing import Final

from migrated.record.model import Downtime, Record
from migrated.report.downtime import component_title, overruns
from migrated.report.fields import Fields, grouped, percent, short
from migrated.report.markup import Markup, Node, el, join
from migrated.report.pieces import chip

OUTCOME_LOOKS: Final = {"completed": "good", "in-doubt": "bad"}
LARGEST: Final = 3
WORTH_NAMING: Final = 0.08
"""Share of the downtime from which a part or an overrun is named in the head."""


def header(fields: Fields) -> Markup:
    """The head of the page: the outcome in a sentence and a handful of figures."""
    identity = [
        el("span", "migration ", fields.show("migration_id")),
        el("span", "epoch ", fields.show("epoch")),
        el("span", "began ", began(fields), " UTC"),
        el("span", fields.show("source_host"), " → ", fields.show("destination_host"), " at ", fields.show("peer")),
    ]
    reason = fields.record.reason
    return el(
        "header",
        el("p", "migrated · record of one migration", class_="kicker"),
        el("h1", fields.show("guest"), " ", badge(fields)),
        el("p", sentence(fields.record), class_="sentence"),
        _where_it_went(fields),
        el("p", el("b", "Reason: "), fields.show("reason"), class_="reason") if reason else None,
        el("p", *identity, class_="identity"),
        _key_figures(fields),
    )


def began(fields: Fields) -> Markup:
    """When the attempt began, to the second."""
    return fields.show("started_at", fields.record.started_at[:19].replace("T", " "))


def badge(fields: Fields) -> Markup:
    """The outcome, coloured."""
    downtime, outcome = fields.record.downtime, fields.record.outcome
    late = downtime is not None and downtime.limit_violated and outcome == "completed"
    look = "warn" if late else OUTCOME_LOOKS.get(outcome, "warn")
    return el("span", fields.show("outcome"), ", late" if late else None, class_=f"badge {look}")


def sentence(record: Record) -> str:
    """The outcome in words."""
    guest, took, downtime = record.guest, short(record.total_ns), record.downtime
    # Without their control sockets, which the line beneath has.
    here, there = (host.partition(" (")[0] for host in (record.source_host, _destination(record)))
    match record.outcome:
        case "completed":
            way = f"from {here} to {there}" if here != there else f"between two daemons on {here}"
            text = f"{guest} moved {way} in {took}"
            return f"{text} and stood still for {_against_limit(downtime)}." if downtime else f"{text}."
        case "in-doubt":
            return (
                f"{guest} was handed over to {_destination(record)}, which has not answered since: it is kept "
                f"stopped on {here} until the other host or an operator says which copy runs."
            )
        case outcome if downtime:
            text = "The switchover was given up" if outcome == "aborted" else f"The migration ended as {outcome}"
            return f"{text}: {guest} runs on where it was, on {here}, after a pause of {_against_limit(downtime)}."
        case "refused":
            return f"The migration was refused before the guest was stopped: {guest} ran on, on {here}."
        case outcome:
            return f"The migration was {outcome} after {took}, before the guest was stopped: {guest} ran on, on {here}."


def _destination(record: Record) -> str:
    return record.destination_host or record.peer


def _where_it_went(fields: Fields) -> Markup | None:
    """Name the largest parts, and those that took longer than predicted."""
    downtime = fields.record.downtime
    if not downtime or not downtime.measured_ns:
        return None
    measured = downtime.measured_ns
    largest = sorted(downtime.parts, key=lambda part: -part.ns)[:LARGEST]
    named = [
        join([chip(part.side, part.name), f" {short(part.ns)}"])
        for part in largest
        if part.ns >= measured * WORTH_NAMING
    ]
    pieces: list[Node] = ["Most of it: ", join(named, ", "), "."] if named else []
    predicted = downtime.predicted_parts_ns
    if fields.record.outcome != "completed" and predicted:
        longest = max(predicted, key=lambda name: predicted[name])
        pieces.append(f" Predicted to take longest: {longest}, {short(predicted[longest])}.")
    elif over := overruns(downtime):
        worst = max(over, key=lambda component: over[component])
        if over[worst] >= measured * WORTH_NAMING:
            pieces.append(f" Longer than predicted: {component_title(downtime, worst)}, by {short(over[worst])}.")
    return el("p", *pieces, class_="went") if pieces else None


def _against_limit(downtime: Downtime) -> str:
    """The time that the guest stood still, and its share of the limit, without what an operator held."""
    held, limit = downtime.hold_ns, downtime.limit_ns
    counted = downtime.counted_ns
    shown = short(downtime.measured_ns) + (f" ({short(held)} of it held by the operator)" if held else "")
    if counted > limit:
        return f"{shown}, {short(counted - limit)} more than the limit of {short(limit)}"
    return f"{shown}, {percent(counted / limit)} of the {short(limit)} that it may" if limit else shown


def _key_figures(fields: Fields) -> Markup:
    figures: list[tuple[str, Node, Node]] = []
    downtime = fields.record.downtime
    if downtime:
        what = fields.record.stop_name.capitalize()
        bounds = join(["between ", fields.ms("downtime.lower_ns"), " and ", fields.ms("downtime.upper_ns"), " ms"])
        figures.append((what, fields.short("downtime.measured_ns"), bounds))
        used = percent(downtime.counted_ns / downtime.limit_ns) + " of it used" if downtime.limit_ns else None
        violated = fields.show("downtime.limit_violated", "exceeded" if downtime.limit_violated else "kept")
        figures.append(("Limit", fields.short("downtime.limit_ns"), join([violated, used], ", ")))
        foreseen = _error(downtime) if fields.record.outcome == "completed" else "for a switchover to its end"
        figures.append(("Predicted", fields.short("downtime.predicted_ns"), foreseen))
    figures.append(("Total time", fields.short("total_ns"), join([fields.short("setup_ns"), " of it set-up"])))
    moved = join(
        ["of ", fields.size("ram.total_bytes"), "; ", fields.size("ram.downtime_bytes"), " while it stood still"]
    )
    figures.append(("Moved", fields.size("ram.transferred_bytes"), moved))
    figures.append(
        ("Rounds", grouped(len(fields.record.rounds)), join([fields.count("ram.dirty_sync_count"), " dirty-log reads"]))
    )
    if fields.record.digest.source:
        figures.append(("Memory digest", _digest_verdict(fields), fields.show("digest.algorithm")))
    cells = [el("div", el("dt", name), el("dd", value), el("dd", note, class_="note")) for name, value, note in figures]
    return el("dl", *cells, class_="figures")


def _error(downtime: Downtime) -> str | None:
    predicted, counted = downtime.predicted_ns, downtime.counted_ns
    if predicted is None or counted <= 0:
        return None
    off = percent(abs(predicted - counted) / counted)
    return f"{off} too {'high' if predicted > counted else 'low'}" if predicted != counted else "exact"


def _digest_verdict(fields: Fields) -> str:
    source, destination = fields.record.digest.source, fields.record.digest.destination
    return "not compared" if destination is None else "equal" if source == destination else "different"
