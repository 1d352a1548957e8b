"""The record of one attempt: what is written down while it runs, and the finished document.

``Record`` is frozen and equal on both hosts once both halves are in; its JSON is what ``migratectl show``, the history
and the report use. While an attempt runs its figures live in ``source.migration`` and ``destination.migration``; the
destination's share crosses the wire as a ``DestinationHalf`` and is merged by the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from migrated.parameters import MigrationParameters
from protocol.budget import Part, unattributed_ns
from protocol.guest_time import TimeStage, VmTimeData

Outcome = Literal["completed", "aborted", "cancelled", "failed", "refused", "in-doubt"]
Side = Literal["source", "destination", "link"]


Component = Literal["stop", "dirty-log", "state", "device-loads", "legs", "resume"]
COMPONENTS: Final[tuple[Component, ...]] = ("stop", "dirty-log", "state", "device-loads", "legs", "resume")

COMPONENT_OF: Final[Mapping[str, Component]] = {
    "stop": "stop",
    "final-dirty-log-read": "dirty-log",
    "dirty-log-read-after-saves": "dirty-log",
    "final-pages": "state",
    "device-saves": "state",
    "pages-after-saves": "state",
    "last-pages-leg": "state",
    "device-loads": "device-loads",
    "resume": "resume",
}
"""Which component of a prediction a part of a downtime belongs to; everything else is ``legs``."""


class RecordModel(BaseModel):
    """Base of everything in a record: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DowntimePart(RecordModel):
    """One part of the downtime and whose clock measured it."""

    name: str
    side: Side
    ns: int


class Downtime(RecordModel):
    """The downtime of the attempt, counted from the stop request to running vCPUs (on either side).

    ``lower_ns`` and ``upper_ns`` bound the truth, ``measured_ns`` is the middle. For an aborted switchover it is the
    pause that the guest saw on the source. ``parts`` and ``unattributed_ns`` sum to ``measured_ns`` exactly.
    ``source_reported_ns`` is the last figure that the source sent before the destination's vote,
    ``destination_measured_ns`` what the destination counted at its vote.
    """

    measured_ns: int
    lower_ns: int
    upper_ns: int
    limit_ns: int
    limit_violated: bool
    predicted_ns: int | None
    predicted_upper_ns: int | None
    parts: tuple[DowntimePart, ...]
    unattributed_ns: int
    source_reported_ns: int | None
    destination_measured_ns: int | None
    hold_ns: int = 0
    predicted_parts_ns: dict[str, int] = Field(default_factory=dict)
    predicted_bases_ns: dict[str, int] = Field(default_factory=dict)
    """What each component of the prediction rested on before correction."""


class DeviceRow(RecordModel):
    """One device's switchover. ``None`` where that side never got to it."""

    name: str
    kind: Literal["iterable", "non-iterable"]
    bytes: int
    save_ns: int | None
    load_ns: int | None
    expected_load_ns: int | None = None
    precopy_bytes: int = 0


class Checkpoint(RecordModel):
    """One of QEMU's downtime checkpoints, since the stop request, on the clock of ``side``'s own count."""

    name: str
    side: Side
    ns: int


class RoundRow(RecordModel):
    """One pre-copy round. ``scan_ns`` is the read of the dirty log before it; ``fence_ns``, inside ``ns``, the wait
    after that for writes that bypass the page tables. Bandwidth is acknowledged bytes over the round's time."""

    round: int
    scanned_pages: int
    dirty_pages: int
    zero_pages: int
    bytes: int
    ns: int
    scan_ns: int
    bandwidth_bytes_per_s: float
    dirty_rate_pages_per_s: float
    predicted_downtime_ns: int | None
    predicted_upper_ns: int | None = None
    decision: str
    throttle_percent: int = 0
    fence_ns: int = 0


class EncodingRow(RecordModel):
    """What one encoding did over the attempt: batches, page bytes in, wire bytes out, time spent encoding."""

    encoding: str
    batches: int
    page_bytes: int
    wire_bytes: int
    ns: int


class Ram(RecordModel):
    """Totals of the memory transfer."""

    total_bytes: int
    page_size: int
    transferred_bytes: int
    normal_pages: int
    zero_pages: int
    sparse_pages: int
    precopy_bytes: int
    downtime_bytes: int
    precopy_pages: int
    downtime_pages: int
    dirty_sync_count: int
    pages_per_second: float
    dirty_tracking: Literal["pagemap-scan", "logged"] | None
    channels: int
    postponed_pages: int = 0
    encodings: tuple[EncodingRow, ...] = ()


class Phase(RecordModel):
    """One phase of the source, on its monotonic clock since the attempt began."""

    name: str
    begin_ns: int
    end_ns: int


class TimeSummary(RecordModel):
    """How guest time was carried over: everything needed to compute the adjustment again."""

    policy: Literal["midpoint", "never-ahead", "never-behind", "freeze"]
    elapsed_lower_ns: int
    elapsed_upper_ns: int
    elapsed_ns: int
    before: VmTimeData
    after: VmTimeData
    guest_uptime_ns: int
    tsc_delta: int
    boot_hrtime_delta: int
    wall_clock_skew_ns: tuple[int, int]
    round_trip_ns: int
    stages: tuple[TimeStage, ...]


class GuestGap(RecordModel):
    """What the guest itself saw of the blackout: the gap between two of its heartbeats, on its own TSC, and on the
    host's monotonic clock where both hosts are one (meaningless elsewhere)."""

    guest_ns: int
    host_ns: int | None


class Digest(RecordModel):
    """The memory digests of both sides, hexadecimal; ``None`` where it was off or never computed."""

    algorithm: str
    source: str | None
    destination: str | None


class LogLine(RecordModel):
    """One log line of the attempt, wall clock of the side that wrote it."""

    side: Literal["source", "destination"]
    at: str
    level: str
    event: str


class Record(RecordModel):
    """The finished record of one attempt (docs/record.md describes every field)."""

    migration_id: str
    guest: str
    epoch: int
    peer: str
    source_host: str
    destination_host: str
    started_at: str
    outcome: Outcome
    reason: str | None
    parameters: MigrationParameters
    total_ns: int
    setup_ns: int
    downtime: Downtime | None
    devices: tuple[DeviceRow, ...]
    checkpoints: tuple[Checkpoint, ...]
    rounds: tuple[RoundRow, ...]
    ram: Ram
    phases: tuple[Phase, ...]
    time: TimeSummary | None
    digest: Digest
    guest_gap: GuestGap | None = None
    events: tuple[LogLine, ...] = ()

    def document(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.model_dump(mode="json")


class DestinationHalf(RecordModel):
    """What only the destination knows of an attempt."""

    host: str
    load_ns: dict[str, int] = Field(default_factory=dict)
    """Per device, keyed ``name/kind``."""
    checkpoints: tuple[Checkpoint, ...] = ()
    parts: tuple[DowntimePart, ...] = ()
    """Consecutive pieces of the time from reading STATE_END to writing READY, and of the resume."""
    counted_ns: int | None = None
    source_reported_ns: int | None = None
    reserve_ns: int = 0
    time: TimeSummary | None = None
    digest: str | None = None
    guest_gap: GuestGap | None = None
    reason: str | None = None
    events: Annotated[tuple[LogLine, ...], Field(max_length=4096)] = ()


def downtime_of(
    *,
    lower_ns: int,
    upper_ns: int,
    measured_ns: int,
    limit_ns: int,
    parts: tuple[Part, ...],
    predicted_ns: int | None,
    predicted_upper_ns: int | None,
    source_reported_ns: int | None,
    destination_measured_ns: int | None,
    hold_ns: int = 0,
    predicted_parts_ns: dict[str, int] | None = None,
    predicted_bases_ns: dict[str, int] | None = None,
) -> Downtime:
    """Build the downtime of a record so that its parts and the unattributed rest sum to the measured time.

    A hold (pause-before-switchover) is inside the measured time but does not count against the limit.
    """
    return Downtime(
        measured_ns=measured_ns,
        lower_ns=lower_ns,
        upper_ns=upper_ns,
        limit_ns=limit_ns,
        limit_violated=measured_ns - hold_ns > limit_ns,
        predicted_ns=predicted_ns,
        predicted_upper_ns=predicted_upper_ns,
        parts=tuple(DowntimePart(name=part.name, side=part.side, ns=part.ns) for part in parts),
        unattributed_ns=unattributed_ns(measured_ns, parts),
        source_reported_ns=source_reported_ns,
        destination_measured_ns=destination_measured_ns,
        hold_ns=hold_ns,
        predicted_parts_ns=predicted_parts_ns or {},
        predicted_bases_ns=predicted_bases_ns or {},
    )
