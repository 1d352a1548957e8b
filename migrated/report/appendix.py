"""The sections for reference: parameters, log lines, and the record itself."""

from __future__ import annotations

import json
from html import escape

from migrated.report.fields import Fields
from migrated.report.markup import Markup, Node, el
from migrated.report.pieces import Section, chip, facts_list, note, section
from migrated.report.timing import since_start_ns
from migrated.settings.parameters import MigrationParameters


def parameters(fields: Fields) -> Section:
    """The parameters of the attempt, in bold where they are not the default."""
    defaults = MigrationParameters().model_dump(mode="json")
    facts: list[tuple[Node, Node]] = []
    for path in fields.members("parameters"):
        name = path.rpartition(".")[2]
        changed = fields[path] != defaults.get(name)
        facts.append((el("b", name, title="not the default") if changed else name, fields.by_name(path)))
    return section("parameters", "Parameters", facts_list(facts), note("Bold: not the default."))


def log(fields: Fields) -> Section | None:
    """The log lines of both daemons on this migration."""
    if not fields.record.events:
        return None
    lines = []
    for index, line in enumerate(fields.record.events):
        path = f"events.{index}"
        at_ns = since_start_ns(fields, line.at)
        lines.append(
            el(
                "li",
                fields.show(f"{path}.at", line.at if at_ns is None else f"{at_ns / 1e6:+.3f}", title=line.at),
                chip(line.side, fields.show(f"{path}.side")),
                el("span", fields.show(f"{path}.level"), class_="level"),
                el("span", fields.show(f"{path}.event"), class_="event"),
                class_=f"level-{line.level}" if line.level in ("debug", "warning", "error", "critical") else None,
            )
        )
    return section(
        "log",
        "Log lines of both daemons",
        note("Milliseconds since the beginning, by the wall clock of the host that wrote the line."),
        el("ol", *lines, class_="log", tabindex=0, aria_label="Log lines"),
    )


def further(fields: Fields) -> Section | None:
    """Members of the record that no section above has shown, so that the page is complete even when a record gets new
    members."""
    rest = fields.rest()
    return (
        section("further", "Further fields", facts_list([(path, fields.by_name(path)) for path in rest]))
        if rest
        else None
    )


def document(fields: Fields) -> Section:
    """The record as it is, to copy."""
    # ASCII only: nothing that a peer wrote can then hide or break anything in the text.
    document = Markup(escape(json.dumps(fields.original, indent=1)))
    return section(
        "record",
        "The record",
        el("details", el("summary", "The whole record as JSON"), el("pre", document, id="document", tabindex=0)),
    )
