"""Records and progress for people: as rich renderables, and as plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from migrated.cli.style import (
    SHADES,
    add_fact,
    clean,
    colored,
    duration,
    milliseconds,
    new_facts,
    new_table,
    outcome_style,
    rate,
)
from migrated.observe.progress import Progress
from migrated.record.model import Checkpoint, DeviceRow, Digest, Downtime, PhaseRow, Ram, Record, RoundRow, TimeSummary
from migrated.settings.parameters import MigrationParameters
from protocol.units import format_size

BAR_WIDTH: Final = 60
UNATTRIBUTED: Final = "░"


def outcome_line(record: Record) -> str:
    """One sentence on how an attempt ended."""
    downtime = record.downtime
    line = f"{record.guest}: {record.outcome} after {duration(record.total_ns)}"
    if downtime:
        line += f", {record.stop_name} {duration(downtime.measured_ns)} (limit {duration(downtime.limit_ns)}"
        if downtime.predicted_ns is not None:
            line += f", predicted {duration(downtime.predicted_ns)}"
        if downtime.predicted_upper_ns is not None:
            line += f", bound {duration(downtime.predicted_upper_ns)}"
        line += ")"
        if downtime.limit_violated:
            line += ", over the limit"
    return clean(line)


def record_view(record: Record, *, details: bool = True) -> RenderableType:
    """A record for people. ``details`` adds the reason, checkpoints, phases, guest time and parameters."""
    style = outcome_style(record.outcome)
    parts: list[RenderableType] = [Text(outcome_line(record), style=style)]
    if details and record.reason:
        parts.append(Text(clean(record.reason), style="yellow"))
    identity = f"{record.migration_id}  epoch {record.epoch}  {record.started_at}"
    hosts = f"{record.source_host} -> {record.destination_host or record.peer}"
    parts.append(Text(clean(f"{identity}  {hosts}"), style="dim"))
    if record.downtime:
        parts.append(_downtime(record.downtime))
    devices = [device for device in record.devices if device.save_ns is not None or device.load_ns is not None]
    if devices:
        parts.append(_devices(devices))
    if record.rounds:
        parts.append(_rounds(record.rounds))
    if record.ram.transferred_bytes:
        parts.append(_memory(record.ram, record.digest))
    if details:
        if record.checkpoints:
            parts.append(_checkpoints(record.checkpoints))
        if record.phases:
            parts.append(_phases(record.phases))
        if record.time:
            parts.append(_time(record.time))
        parts.append(_parameters(record.parameters))
    return Group(*_spaced(parts))


def downtime_bar(downtime: Downtime, width: int = BAR_WIDTH) -> Text:
    """The downtime as one bar whose pieces are the parts, in the order they happened; the rest is unattributed.

    Neighbours differ in shade as well as in colour, for those who see none.
    """
    total = max(1, downtime.measured_ns)
    bar = Text()
    used = 0
    elapsed = 0
    for (part, color), shade in zip(colored(downtime.parts), cycle(SHADES), strict=False):
        elapsed += part.ns
        end = min(width, max(used, round(elapsed / total * width)))
        bar.append(shade * (end - used), style=color)
        used = end
    bar.append(UNATTRIBUTED * (width - used), style="dim")
    return bar


def _downtime(downtime: Downtime) -> RenderableType:
    total = max(1, downtime.measured_ns)
    table = new_table(f"Downtime {duration(downtime.measured_ns)}", "part", "side", "ms>", "share>", "")
    for part, color in colored(downtime.parts):
        share = part.ns / total
        bar = Text("█" * round(share * 30), style=color)
        table.add_row(clean(part.name), part.side, milliseconds(part.ns), f"{share:.1%}", bar)
    rest = downtime.unattributed_ns
    table.add_row("unattributed", "", milliseconds(rest), f"{rest / total:.1%}", "", style="dim")
    table.add_section()
    table.add_row("total", "", milliseconds(downtime.measured_ns), "", "", style="bold")
    width = downtime.upper_ns - downtime.lower_ns
    lines = [f"between {milliseconds(downtime.lower_ns)} and {milliseconds(downtime.upper_ns)} ms"]
    lines.append(f"known to {duration(width)}")
    if downtime.source_reported_ns is not None:
        lines.append(f"source reported {duration(downtime.source_reported_ns)}")
    if downtime.destination_measured_ns is not None:
        lines.append(f"destination counted {duration(downtime.destination_measured_ns)} at its vote")
    if downtime.hold_ns:
        lines.append(f"held {duration(downtime.hold_ns)} before the switchover")
    return Group(downtime_bar(downtime), table, Text("; ".join(lines), style="dim"))


def _devices(devices: Sequence[DeviceRow]) -> Table:
    table = new_table("Devices", "device", "kind", "state>", "save ms>", "load ms>", "expected load ms>")
    for device in devices:
        expected = milliseconds(device.expected_load_ns)
        size, save, load = (
            format_size(device.bytes),
            milliseconds(device.save_ns),
            milliseconds(device.load_ns),
        )
        table.add_row(clean(device.name), device.kind, size, save, load, expected)
    return table


def _rounds(rounds: Sequence[RoundRow]) -> RenderableType:
    table = new_table(
        "Rounds", "#>", "dirty pages>", "zero>", "sent>", "time>", "bandwidth>", "dirtied/s>", "predicted>"
    )
    decisions = new_facts("Decisions")
    for row in rounds:
        table.add_row(
            str(row.round),
            str(row.dirty_pages),
            str(row.zero_pages),
            format_size(row.bytes),
            duration(row.ns),
            rate(row.bandwidth_bytes_per_s),
            f"{row.dirty_rate_pages_per_s:.0f}",
            duration(row.predicted_downtime_ns),
        )
        add_fact(decisions, f"round {row.round}", row.decision)
    return Group(table, decisions)


def _memory(ram: Ram, digest: Digest) -> Table:
    table = new_facts("Memory")
    add_fact(table, "guest memory", f"{format_size(ram.total_bytes)} in pages of {format_size(ram.page_size)}")
    moved = f"{format_size(ram.transferred_bytes)} over {ram.channels} channel{'' if ram.channels == 1 else 's'}"
    add_fact(table, "moved", f"{moved}: {format_size(ram.downtime_bytes)} of it while the guest was stopped")
    if ram.shared:
        add_fact(table, "memory", "handed over on the same host, not copied")
    add_fact(table, "pages", f"{ram.normal_pages} normal, {ram.zero_pages} zero, {ram.sparse_pages} never touched")
    add_fact(table, "dirty tracking", ram.dirty_tracking or "-")
    for row in ram.encodings:
        saved = f"{format_size(row.page_bytes)} to {format_size(row.wire_bytes)} in {duration(row.ns)}"
        add_fact(table, row.encoding, saved)
    if digest.source is not None:
        other = digest.destination
        same = "not compared" if other is None else "equal on both sides" if other == digest.source else "different"
        add_fact(table, "digest", f"{digest.algorithm} {digest.source} ({same})")
    return table


def _checkpoints(checkpoints: Sequence[Checkpoint]) -> Table:
    table = new_table("Checkpoints", "checkpoint", "side", "ms>")
    for checkpoint in checkpoints:
        table.add_row(clean(checkpoint.name), checkpoint.side, milliseconds(checkpoint.ns))
    return table


def _phases(phases: Sequence[PhaseRow]) -> Table:
    table = new_table("Phases", "phase", "begin ms>", "end ms>", "took>")
    for phase in phases:
        took = duration(phase.end_ns - phase.begin_ns)
        table.add_row(clean(phase.name), milliseconds(phase.begin_ns), milliseconds(phase.end_ns), took)
    return table


def _time(time: TimeSummary) -> Table:
    table = new_facts("Guest time")
    lower, upper = time.elapsed_lower_ns, time.elapsed_upper_ns
    add_fact(table, "policy", time.policy)
    add_fact(table, "elapsed", f"{duration(time.elapsed_ns)}, known to {duration(upper - lower)}")
    add_fact(table, "guest uptime", duration(time.guest_uptime_ns))
    add_fact(table, "TSC", f"+{time.tsc_delta} ticks at {time.before.guest_freq} Hz")
    add_fact(table, "boot time", f"moved by {time.boot_hrtime_delta} ns")
    skew = time.wall_clock_skew_ns
    add_fact(table, "wall clocks apart", f"{duration(skew[0])} to {duration(skew[1])}")
    for stage in time.stages:
        add_fact(table, f"stage {stage.name}", f"{duration(stage.ns)}, +{stage.tsc_delta} ticks")
    return table


def _parameters(parameters: MigrationParameters) -> Table:
    table = new_facts("Parameters")
    for name, value in parameters.model_dump(mode="json").items():
        add_fact(table, name, {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value)
    return table


def progress_line(progress: Progress) -> str:
    """One plain line on a running migration, for logs and pipes."""
    parts = [
        f"{progress.guest} {progress.status}",
        f"round {progress.round}",
        f"{format_size(progress.transferred_bytes)} sent",
        f"{format_size(progress.remaining_bytes)} left",
        rate(progress.bandwidth_bytes_per_s),
    ]
    if progress.predicted_downtime_ns is not None:
        parts.append(f"predicted {_prediction(progress)}")
    if progress.downtime_ns is not None:
        parts.append(f"downtime {duration(progress.downtime_ns)}")
    if progress.decision:
        parts.append(progress.decision)
    return clean(", ".join(parts))


def _prediction(progress: Progress) -> str:
    text = duration(progress.predicted_downtime_ns)
    if progress.predicted_upper_ns is not None:
        text += f" (bound {duration(progress.predicted_upper_ns)})"
    return f"{text} of {duration(progress.downtime_limit_ns)}"


def _spaced(parts: Sequence[RenderableType]) -> list[RenderableType]:
    """Put an empty line between tables, none within the lines on top."""
    spaced: list[RenderableType] = []
    for part in parts:
        if spaced and not isinstance(part, Text):
            spaced.append("")
        spaced.append(part)
    return spaced
