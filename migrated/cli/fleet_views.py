"""Tables of a fleet for people: hosts, jobs, plans, and what ``watch --fleet`` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from migrated.cli.style import clean, duration, new_table, rate
from protocol.units import format_size

Json = Mapping[str, Any]
_STATE_STYLES: Final = {
    "done": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "migrating": "bold cyan",
    "reserved": "cyan",
}


def hosts_view(hosts: Sequence[Json]) -> RenderableType:
    """All hosts, and beneath what is wrong with them."""
    if not hosts:
        return Text("No host is in the fleet yet.")
    table = new_table("", "host", "state", "guests>", "used>", "promised>", "free>", "in>", "out>", "link>", "address")
    for host in hosts:
        table.add_row(clean(host["name"]), _host_state(host), *_host_figures(host), clean(host.get("address", "-")))
    wrong = [Text(clean(f"{host['name']}: {line}"), style="yellow") for host in hosts for line in host["problems"]]
    return Group(table, *wrong)


def _host_state(host: Json) -> Text:
    words = [word for word in ("fenced", "cordoned") if host[word]]
    if not host["lease"]:
        words.insert(0, "no lease")
    style = "bold red" if host["fenced"] or not host["lease"] else "yellow" if words else "green"
    return Text(", ".join(words) or "ready", style=style)


def _host_figures(host: Json) -> list[str]:
    if not host["lease"]:
        return [str(host["owned_guests"]), "-", "-", "-", "-", "-", "-"]
    link = host["link_bytes_per_s"]
    return [
        str(host["owned_guests"]),
        format_size(host["used_bytes"]),
        format_size(host["reserved_bytes"]),
        format_size(host["free_bytes"]),
        f"{host['inbound']}/{host['max_inbound']}",
        f"{host['outbound']}/{host['max_outbound']}",
        rate(link) if link else "-",
    ]


def jobs_view(jobs: Sequence[Json]) -> RenderableType:
    """All jobs, newest first."""
    if not jobs:
        return Text("There is no job.")
    table = new_table("", "job", "kind", "host", "phase", "moved>", "time>", "late>", "reason")
    for job in jobs:
        moved = f"{job['done']}/{len(job['guests'])}"
        late = str(job["late"]) if job["late"] else "-"
        table.add_row(
            job["job"], job["kind"], clean(job["host"]), _state(job["phase"]), moved, duration(job["total_ns"]), late,
            clean(job["reason"] or ""),
        )  # fmt: skip
    return table


def job_view(job: Json) -> RenderableType:
    """One job with its guests."""
    moved = f"{job['done']} of {len(job['guests'])} guests moved in {duration(job['total_ns'])}"
    title = Text(f"{job['kind']} {clean(job['host'])}, job {job['job']}: {job['phase']}. {moved}", style="bold")
    reason = [Text(clean(job["reason"]), style="yellow")] if job["reason"] else []
    return Group(title, *reason, _guests_table(job))


def _guests_table(job: Json) -> Table:
    table = new_table("", "guest", "state", "to", "try>", "began>", "took>", "downtime>", "limit>", "reason")
    for guest in job["guests"]:
        began, ended = guest["began_utc_ns"], guest["ended_utc_ns"]
        downtime = Text(duration(guest["downtime_ns"]), style="bold red" if guest["late"] else "")
        table.add_row(
            clean(guest["guest"]), _state(guest["state"]), clean(guest["destination"] or "-"), str(guest["attempt"]),
            duration(None if began is None else max(0, began - job["created_utc_ns"])),
            duration(None if began is None or ended is None else max(0, ended - began)),
            downtime, duration(guest["limit_ns"]), clean(guest["reason"]),
        )  # fmt: skip
    return table


def plan_view(plan: Json) -> RenderableType:
    """A plan that is not carried out."""
    table = new_table(
        f"{clean(plan['host'])} would be empty after about {duration(plan['total_ns'])}",
        "guest", "to", "begins>", "ends>", "share>", "downtime>", "bound>", "limit>", "doubt",
    )  # fmt: skip
    for move in plan["moves"]:
        table.add_row(
            clean(move["guest"]), clean(move["destination"]), duration(move["begin_ns"]), duration(move["end_ns"]),
            rate(move["bytes_per_s"]), duration(move["downtime_ns"]), duration(move["downtime_bound_ns"]),
            duration(move["limit_ns"]), clean(move["doubt"] or ""),
        )  # fmt: skip
    refusals = [Text(clean(f"{guest}: {why}"), style="bold red") for guest, why in plan["refusals"].items()]
    late = [Text(clean(f"{guest} would end after the deadline."), style="yellow") for guest in plan["too_late"]]
    return Group(table, *refusals, *late)


def step_lines(job: Json, told: dict[str, str]) -> Iterator[str]:
    """A line for each guest of a job that has come further. ``told`` is what was said before, by job and guest."""
    for guest in job["guests"]:
        key = f"{job['job']}/{guest['guest']}"
        now = f"{guest['state']} {guest['destination'] or ''} {guest['attempt']} {guest['reason']}"
        if told.get(key) == now:
            continue
        told[key] = now
        way = f"{guest['source']} -> {guest['destination'] or '?'}"
        downtime = f", stopped for {duration(guest['downtime_ns'])}" if guest["downtime_ns"] is not None else ""
        reason = f": {guest['reason']}" if guest["reason"] else ""
        yield clean(f"{guest['guest']} {way} {guest['state']}{downtime}{reason}")


def fleet_view(hosts: Sequence[Json], jobs: Sequence[Json], now_utc_ns: int) -> RenderableType:
    """Hosts with their slots, and the running jobs with guests on their way and the time left."""
    parts: list[RenderableType] = [hosts_view(hosts)]
    for job in jobs:
        moved = f"{job['done']} of {len(job['guests'])} guests moved"
        left = f"about {duration(job['left_ns'])} left" if job["left_ns"] else "longer than planned"
        elapsed = duration(max(0, now_utc_ns - job["created_utc_ns"]))
        worker = f"carried on by {job['worker']}" if job["worker"] else "without a worker"
        title = f"{job['kind']} {job['host']}, job {job['job']}: {moved} after {elapsed}, {left}, {worker}"
        parts += [Text(""), Text(clean(title), style="bold")]
        parts += [Text(clean(job["reason"]), style="yellow")] if job["reason"] else []
        parts.append(_guests_table(job))
    if not jobs:
        parts += [Text(""), Text("No job runs.")]
    return Group(*parts)


def _state(state: str) -> Text:
    return Text(state, style=_STATE_STYLES.get(state, ""))
