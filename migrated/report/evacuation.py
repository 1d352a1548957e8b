"""The report on a job of a fleet: all its guests on one time axis, from the job's document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from migrated.report import write_page
from migrated.report.charts import Axis, Bar, Track, tracks
from migrated.report.fields import NOTHING, short
from migrated.report.markup import Markup, el, join
from migrated.report.pieces import Section, contents, facts_list, note, section, table, zoom_hint

Job = Mapping[str, Any]
_LOOKS: Final = {"done": "good", "failed": "bad"}


def write_evacuation(job: Job, path: Path) -> None:
    """Write the report on a job.

    Args:
        job: its document (``migratectl --json evacuate --status JOB``).
        path: the HTML file, replaced when it exists.

    Raises:
        OSError: the file cannot be written.
    """
    sections = [one for one in (_timeline(job), _hosts(job), _guests(job)) if one is not None]
    body = join([_header(job), contents(sections), *(one.render() for one in sections)])
    write_page(f"{job['host']}: {job['kind']} {job['job']}", body, path)


def _header(job: Job) -> Markup:
    moved, count = job["done"], len(job["guests"])
    began = datetime.fromtimestamp(job["created_utc_ns"] / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
    sentence = f"{moved} of {count} guests moved away from {job['host']} in {short(job['total_ns'])}."
    if job["late"]:
        sentence += f" {job['late']} of them stood longer than their limit."
    facts = [
        ("planned", short(job["expected_total_ns"])),
        ("took", short(job["total_ns"])),
        ("longest downtime", _longest(job["guests"])),
        ("attempts", str(sum(guest["attempt"] for guest in job["guests"]))),
    ]
    return el(
        "header",
        el("p", f"migrated · {job['kind']} of one host", class_="kicker"),
        el("h1", job["host"], " ", el("span", job["phase"], class_=f"badge {_LOOKS.get(job['phase'], 'warn')}")),
        el("p", sentence, class_="sentence"),
        el("p", el("b", "Reason: "), job["reason"], class_="reason") if job["reason"] else None,
        el("p", el("span", "job ", job["job"]), el("span", "began ", began, " UTC"), class_="identity"),
        facts_list(facts),
    )


def _longest(guests: Sequence[Job]) -> str:
    known = [guest["downtime_ns"] for guest in guests if guest["downtime_ns"] is not None]
    return short(max(known)) if known else NOTHING


def _timeline(job: Job) -> Section | None:
    """Every guest's last attempt, beneath what was planned."""
    span_ns = max(job["total_ns"], job["expected_total_ns"])
    rows = [_track(job, guest) for guest in job["guests"]]
    if not rows or span_ns <= 0:
        return None
    chart = tracks("Guests over time", ["guest", "to", "took", "downtime"], rows, Axis(0, span_ns))
    return section(
        "time",
        "All guests on one time axis",
        chart,
        note("Filled: the guest's last attempt. Outlined: when the plan had it. Hatched: it failed."),
        zoom_hint(),
    )


def _track(job: Job, guest: Job) -> Track:
    began, ended = guest["began_utc_ns"], guest["ended_utc_ns"]
    bars = []
    if guest["expected_end_ns"]:
        planned = guest["expected_end_ns"] - guest["expected_begin_ns"]
        what = f"planned: {short(planned)} from {short(guest['expected_begin_ns'])} on"
        bars.append(Bar(guest["expected_begin_ns"], planned, "predicted", what))
    took = NOTHING
    if began is not None:
        until = ended if ended is not None and ended >= began else job["created_utc_ns"] + job["total_ns"]
        took = short(max(0, until - began))
        look = "destination" if guest["state"] == "done" else "stopped" if guest["state"] == "failed" else "source"
        what = f"{guest['source']} to {guest['destination']}: {took}, {guest['state']}"
        bars.append(Bar(max(0, began - job["created_utc_ns"]), max(0, until - began), look, what))
    downtime = short(guest["downtime_ns"]) if guest["downtime_ns"] is not None else NOTHING
    return Track(guest["guest"], (guest["destination"] or NOTHING, took, downtime), tuple(bars))


def _hosts(job: Job) -> Section | None:
    """The number of guests that each host took in."""
    taken: dict[str, list[Job]] = {}
    for guest in job["guests"]:
        if guest["state"] == "done" and guest["destination"]:
            taken.setdefault(guest["destination"], []).append(guest)
    if not taken:
        return None
    rows = [[host, str(len(guests)), _longest(guests)] for host, guests in sorted(taken.items())]
    return section("hosts", "Where they went", table("Hosts", ["host", "guests", "longest downtime"], rows))


def _guests(job: Job) -> Section:
    """Every guest with its figures and, beneath, the last reason."""
    heads = ["guest", "state", "to", "attempts", "downtime", "limit", "predicted"]
    rows = [
        [
            guest["guest"],
            guest["state"],
            guest["destination"] or NOTHING,
            str(guest["attempt"]),
            short(guest["downtime_ns"]) if guest["downtime_ns"] is not None else NOTHING,
            short(guest["limit_ns"]) if guest["limit_ns"] is not None else NOTHING,
            short(guest["expected_downtime_ns"]),
        ]
        for guest in job["guests"]
    ]
    return section("guests", "Every guest", table("Guests", heads, rows, [guest["reason"] for guest in job["guests"]]))
