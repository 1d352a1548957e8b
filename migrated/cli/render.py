"""What people see: records, progress, guests and history as rich renderables or plain lines, from plain JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from protocol.units import format_duration_ns, format_rate, format_size

BAR_WIDTH: Final = 60
SHADES: Final = "█▓▒"
UNATTRIBUTED: Final = "░"
SPARKS: Final = "▁▂▃▄▅▆▇█"
SIDE_COLORS: Final = {
    "source": ("blue", "dodger_blue2", "deep_sky_blue1"),
    "destination": ("green", "green3", "spring_green3"),
    "link": ("magenta", "orchid"),
}
OUTCOME_STYLES: Final = {"completed": "bold green", "in-doubt": "bold white on red"}
STATUS_STYLES: Final = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "in-doubt": "bold white on red",
    "unresponsive": "bold red",
}

Json = Mapping[str, Any]


def clean(text: object) -> str:
    """A text for the terminal: what another host or a guest wrote must not carry control sequences."""
    return "".join(character if character.isprintable() else "�" for character in str(text))


def duration(value_ns: int | None) -> str:
    """A duration, or a dash."""
    return "-" if value_ns is None else format_duration_ns(round(value_ns))


def milliseconds(value_ns: int | None) -> str:
    """A duration in ms to the microsecond, so that a column lines up; or a dash."""
    return "-" if value_ns is None else f"{value_ns / 1e6:.3f}"


def rate(bytes_per_s: float) -> str:
    """A rate, to a whole byte."""
    return format_rate(round(bytes_per_s))


# --- one finished attempt ---------------------------------------------------------------------------------------------


def outcome_line(record: Json) -> str:
    """One sentence on how an attempt ended."""
    downtime = record["downtime"]
    line = f"{record['guest']}: {record['outcome']} after {duration(record['total_ns'])}"
    if downtime:
        what = "downtime" if record["outcome"] in ("completed", "in-doubt") else "pause"
        line += f", {what} {duration(downtime['measured_ns'])} (limit {duration(downtime['limit_ns'])}"
        if downtime["predicted_ns"] is not None:
            line += f", predicted {duration(downtime['predicted_ns'])}"
        if downtime["predicted_upper_ns"] is not None:
            line += f", bound {duration(downtime['predicted_upper_ns'])}"
        line += ")"
        if downtime["limit_violated"]:
            line += ", over the limit"
    return clean(line)


def record_view(record: Json, *, details: bool = True) -> RenderableType:
    """A record for people. ``details`` adds the reason, checkpoints, phases, guest time and parameters."""
    style = OUTCOME_STYLES.get(record["outcome"], "bold red")
    parts: list[RenderableType] = [Text(outcome_line(record), style=style)]
    if details and record["reason"]:
        parts.append(Text(clean(record["reason"]), style="yellow"))
    identity = f"{record['migration_id']}  epoch {record['epoch']}  {record['started_at']}"
    hosts = f"{record['source_host']} -> {record['destination_host'] or record['peer']}"
    parts.append(Text(clean(f"{identity}  {hosts}"), style="dim"))
    if record["downtime"]:
        parts.append(_downtime(record["downtime"]))
    devices = [device for device in record["devices"] if device["save_ns"] is not None or device["load_ns"] is not None]
    if devices:
        parts.append(_devices(devices))
    if record["rounds"]:
        parts.append(_rounds(record["rounds"]))
    if record["ram"]["transferred_bytes"]:
        parts.append(_memory(record["ram"], record["digest"]))
    if details:
        if record["checkpoints"]:
            parts.append(_checkpoints(record["checkpoints"]))
        if record["phases"]:
            parts.append(_phases(record["phases"]))
        if record["time"]:
            parts.append(_time(record["time"]))
        parts.append(_parameters(record["parameters"]))
    return Group(*_spaced(parts))


def downtime_bar(downtime: Json, width: int = BAR_WIDTH) -> Text:
    """The downtime as one bar whose pieces are the parts, in the order they happened; the rest is unattributed.

    Neighbours differ in shade as well as in colour, for those who see none.
    """
    total = max(1, downtime["measured_ns"])
    bar = Text()
    used = 0
    elapsed = 0
    for (part, color), shade in zip(_colored(downtime["parts"]), cycle(SHADES), strict=False):
        elapsed += part["ns"]
        end = min(width, max(used, round(elapsed / total * width)))
        bar.append(shade * (end - used), style=color)
        used = end
    bar.append(UNATTRIBUTED * (width - used), style="dim")
    return bar


def _colored(parts: Iterable[Json]) -> Iterator[tuple[Json, str]]:
    colors = {side: cycle(choices) for side, choices in SIDE_COLORS.items()}
    for part in parts:
        yield part, next(colors[part["side"]])


def _downtime(downtime: Json) -> RenderableType:
    total = max(1, downtime["measured_ns"])
    table = _table(f"Downtime {duration(downtime['measured_ns'])}", "part", "side", "ms>", "share>", "")
    for part, color in _colored(downtime["parts"]):
        share = part["ns"] / total
        bar = Text("█" * round(share * 30), style=color)
        table.add_row(clean(part["name"]), part["side"], milliseconds(part["ns"]), f"{share:.1%}", bar)
    rest = downtime["unattributed_ns"]
    table.add_row("unattributed", "", milliseconds(rest), f"{rest / total:.1%}", "", style="dim")
    table.add_section()
    table.add_row("total", "", milliseconds(downtime["measured_ns"]), "", "", style="bold")
    width = downtime["upper_ns"] - downtime["lower_ns"]
    lines = [f"between {milliseconds(downtime['lower_ns'])} and {milliseconds(downtime['upper_ns'])} ms"]
    lines.append(f"known to {duration(width)}")
    if downtime["source_reported_ns"] is not None:
        lines.append(f"source reported {duration(downtime['source_reported_ns'])}")
    if downtime["destination_measured_ns"] is not None:
        lines.append(f"destination counted {duration(downtime['destination_measured_ns'])} at its vote")
    if downtime.get("hold_ns"):
        lines.append(f"held {duration(downtime['hold_ns'])} before the switchover")
    return Group(downtime_bar(downtime), table, Text("; ".join(lines), style="dim"))


def _devices(devices: Sequence[Json]) -> Table:
    table = _table("Devices", "device", "kind", "state>", "save ms>", "load ms>", "expected load ms>")
    for device in devices:
        expected = milliseconds(device.get("expected_load_ns"))
        size, save, load = (
            format_size(device["bytes"]),
            milliseconds(device["save_ns"]),
            milliseconds(device["load_ns"]),
        )
        table.add_row(clean(device["name"]), device["kind"], size, save, load, expected)
    return table


def _rounds(rounds: Sequence[Json]) -> RenderableType:
    table = _table("Rounds", "#>", "dirty pages>", "zero>", "sent>", "time>", "bandwidth>", "dirtied/s>", "predicted>")
    decisions = _facts("Decisions")
    for row in rounds:
        table.add_row(
            str(row["round"]),
            str(row["dirty_pages"]),
            str(row["zero_pages"]),
            format_size(row["bytes"]),
            duration(row["ns"]),
            rate(row["bandwidth_bytes_per_s"]),
            f"{row['dirty_rate_pages_per_s']:.0f}",
            duration(row["predicted_downtime_ns"]),
        )
        _fact(decisions, f"round {row['round']}", row["decision"])
    return Group(table, decisions)


def _memory(ram: Json, digest: Json) -> Table:
    table = _facts("Memory")
    _fact(table, "guest memory", f"{format_size(ram['total_bytes'])} in pages of {format_size(ram['page_size'])}")
    moved = f"{format_size(ram['transferred_bytes'])} over {ram['channels']} channels"
    _fact(table, "moved", f"{moved}: {format_size(ram['downtime_bytes'])} of it while the guest was stopped")
    _fact(
        table, "pages", f"{ram['normal_pages']} normal, {ram['zero_pages']} zero, {ram['sparse_pages']} never touched"
    )
    _fact(table, "dirty tracking", ram["dirty_tracking"] or "-")
    for row in ram.get("encodings", ()):
        saved = f"{format_size(row['page_bytes'])} to {format_size(row['wire_bytes'])} in {duration(row['ns'])}"
        _fact(table, row["encoding"], saved)
    if digest["source"] is not None:
        other = digest["destination"]
        same = "not compared" if other is None else "equal on both sides" if other == digest["source"] else "different"
        _fact(table, "digest", f"{digest['algorithm']} {digest['source']} ({same})")
    return table


def _checkpoints(checkpoints: Sequence[Json]) -> Table:
    table = _table("Checkpoints", "checkpoint", "side", "ms>")
    for checkpoint in checkpoints:
        table.add_row(clean(checkpoint["name"]), checkpoint["side"], milliseconds(checkpoint["ns"]))
    return table


def _phases(phases: Sequence[Json]) -> Table:
    table = _table("Phases", "phase", "begin ms>", "end ms>", "took>")
    for phase in phases:
        took = duration(phase["end_ns"] - phase["begin_ns"])
        table.add_row(clean(phase["name"]), milliseconds(phase["begin_ns"]), milliseconds(phase["end_ns"]), took)
    return table


def _time(time: Json) -> Table:
    table = _facts("Guest time")
    lower, upper = time["elapsed_lower_ns"], time["elapsed_upper_ns"]
    _fact(table, "policy", time["policy"])
    _fact(table, "elapsed", f"{duration(time['elapsed_ns'])}, known to {duration(upper - lower)}")
    _fact(table, "guest uptime", duration(time["guest_uptime_ns"]))
    _fact(table, "TSC", f"+{time['tsc_delta']} ticks at {time['before']['guest_freq']} Hz")
    _fact(table, "boot time", f"moved by {time['boot_hrtime_delta']} ns")
    skew = time["wall_clock_skew_ns"]
    _fact(table, "wall clocks apart", f"{duration(skew[0])} to {duration(skew[1])}")
    for stage in time["stages"]:
        _fact(table, f"stage {stage['name']}", f"{duration(stage['ns'])}, +{stage['tsc_delta']} ticks")
    return table


def _parameters(parameters: Json) -> Table:
    table = _facts("Parameters")
    for name, value in parameters.items():
        _fact(table, name, {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value)
    return table


# --- a migration that runs --------------------------------------------------------------------------------------------


def progress_line(progress: Json) -> str:
    """One plain line on a running migration, for logs and pipes."""
    parts = [
        f"{progress['guest']} {progress['status']}",
        f"round {progress['round']}",
        f"{format_size(progress['transferred_bytes'])} sent",
        f"{format_size(progress['remaining_bytes'])} left",
        rate(progress["bandwidth_bytes_per_s"]),
    ]
    if progress["predicted_downtime_ns"] is not None:
        parts.append(f"predicted {_prediction(progress)}")
    if progress["downtime_ns"] is not None:
        parts.append(f"downtime {duration(progress['downtime_ns'])}")
    if progress["decision"]:
        parts.append(progress["decision"])
    return clean(", ".join(parts))


def _prediction(progress: Json) -> str:
    text = duration(progress["predicted_downtime_ns"])
    if progress["predicted_upper_ns"] is not None:
        text += f" (bound {duration(progress['predicted_upper_ns'])})"
    return f"{text} of {duration(progress['downtime_limit_ns'])}"


# --- lists ------------------------------------------------------------------------------------------------------------


def guests_table(guests: Sequence[Json]) -> RenderableType:
    """All guests of a host."""
    if not guests:
        return Text("No guest is on this host.")
    table = _table("", "guest", "state", "memory>", "pid>", "api socket")
    for guest in guests:
        style = STATUS_STYLES.get(guest["state"], "")
        state = Text(guest["state"], style=style)
        pid = "-" if guest["pid"] is None else str(guest["pid"])
        memory = "-" if guest["memory_bytes"] is None else format_size(guest["memory_bytes"])
        table.add_row(clean(guest["name"]), state, memory, pid, clean(guest["api_socket"]))
    silent = [f"{guest['name']}: {guest['reason']}." for guest in guests if guest.get("reason")]
    return Group(table, *(Text(clean(line)) for line in silent)) if silent else table


def facts_view(facts: Json) -> Table:
    """Any flat object: one line per member; nested ones as ``outer.inner``."""
    table = _facts("")
    for name, value in _flat(facts):
        _fact(table, name, _readable(name, value))
    return table


def history_table(records: Sequence[Json]) -> RenderableType:
    """Past attempts, newest first."""
    if not records:
        return Text("No migration is in the history.")
    table = _table("", "migration", "guest", "began (UTC)", "outcome", "total>", "downtime>", "predicted>", "limit>")
    for record in records:
        downtime = record["downtime"] or {}
        outcome = Text(record["outcome"], style=OUTCOME_STYLES.get(record["outcome"], "red"))
        if downtime.get("limit_violated"):
            outcome.append(" (late)", style="yellow")
        figures = [duration(downtime.get(key)) for key in ("measured_ns", "predicted_ns", "limit_ns")]
        began = clean(record["started_at"])[:19].replace("T", " ")
        identity = clean(record["migration_id"]), clean(record["guest"])
        table.add_row(*identity, began, outcome, duration(record["total_ns"]), *figures)
    return table


def stats_view(stats: Json) -> RenderableType:
    """``history --stats``."""
    facts = _facts(f"Migrations: {stats['migrations']}")
    for outcome, count in sorted(stats["outcomes"].items()):
        _fact(facts, outcome, f"{count} ({count / stats['migrations']:.1%})")
    _fact(facts, "over the limit", stats["limit_violations"])
    if stats["prediction_coverage_pct"] is not None:
        _fact(facts, "within the predicted bound", f"{stats['prediction_coverage_pct']:.1f} %")
    table = _table("", "", "count>", "p50>", "p90>", "p95>", "p99>", "max>")
    rows = {"downtime_ns": "downtime", "abort_pause_ns": "pause when aborted", "total_ns": "total time"}
    keys = ("p50", "p90", "p95", "p99", "max")
    for key, title in rows.items():
        summary = stats[key]
        table.add_row(title, str(summary["count"]), *(duration(summary[k]) for k in keys))
    errors = stats["prediction_error_pct"]
    percent = ["-" if errors[k] is None else f"{errors[k]:.1f} %" for k in keys]
    table.add_row("prediction error", str(errors["count"]), *percent)
    return Group(facts, table)


def estimate_view(estimate: Json) -> RenderableType:
    """``migratectl estimate``."""
    fits = estimate["fits"]
    bound = duration(estimate["predicted_upper_ns"])
    line = f"downtime {duration(estimate['predicted_ns'])}, bound {bound}, limit {duration(estimate['limit_ns'])}"
    verdict = Text(f"{'Fits' if fits else 'Does not fit'}: {line}", style="bold green" if fits else "bold red")
    parts: list[RenderableType] = [verdict]
    if estimate["reason"]:
        parts.append(Text(clean(estimate["reason"]), style="yellow"))
    table = _table("Predicted parts", "part", "ms>")
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


# --- helpers ----------------------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    """A table; a ``>`` at the end of a column's name aligns it to the right."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", no_wrap=right)
    return table


def _facts(title: str) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table


def _fact(table: Table, name: str, value: object) -> None:
    table.add_row(clean(name), clean(value))


def _flat(value: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, member in value.items():
        if isinstance(member, Mapping):
            yield from _flat(member, f"{prefix}{name}.")
        else:
            yield prefix + name, member


def _readable(name: str, value: object) -> object:
    """A bare number with the unit that its name ends in."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        for suffix, form in (("_bytes_per_s", rate), ("_bytes", format_size), ("_ns", duration)):
            if name.endswith(suffix):
                return form(round(value))
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "-"
    return value


def _spaced(parts: Sequence[RenderableType]) -> list[RenderableType]:
    """An empty line between the tables, none within the lines on top."""
    spaced: list[RenderableType] = []
    for part in parts:
        if spaced and not isinstance(part, Text):
            spaced.append("")
        spaced.append(part)
    return spaced
