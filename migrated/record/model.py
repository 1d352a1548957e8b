"""The record of one attempt: the finished document, and the half of it that only the destination knows.

``Record`` is frozen and equal on both hosts once both halves are in; its JSON is what ``migratectl show``, the history
and the report use. While an attempt runs on the source its figures are kept in ``source.ledger``; the destination's
share crosses the wire as a ``DestinationHalf`` and is merged by the source.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field

from migrated.record.parts import Component, LogGroup, Part, find_part
from migrated.record.terms import HANDED_OVER, Outcome, QemuCheckpoint, Role, Side
from migrated.settings.parameters import MigrationParameters
from protocol.guest import DeviceKind
from protocol.guest_time import TimeStage, VmTimeData

Row = TypeVar("Row")
Rows: TypeAlias = Annotated[tuple[Row, ...], FailFast()]
"""Rows of a record. The first one that is none ends the reading: a peer's may have any number of faults, and each takes
a kilobyte."""


class RecordModel(BaseModel):
    """Base of everything in a record: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DowntimePart(RecordModel):
    """One part of the downtime and whose time it is.

    ``name`` is that of a ``Part``, or of one that only a newer version knows.
    """

    name: str
    side: Side
    ns: int

    @classmethod
    def of(cls, part: Part, ns: int) -> Self:
        """A known part and how long it took."""
        return cls(name=part.label, side=part.side, ns=ns)

    @property
    def known(self) -> Part | None:
        """The part of this version's table; None when it is not in there."""
        return find_part(self.name, self.side)

    @property
    def component(self) -> Component | None:
        """The component of the prediction that foresees it; None for one that no prediction is about."""
        return Component.LEGS if (part := self.known) is None else part.component

    @property
    def group(self) -> LogGroup:
        """Its group in the breakdown of the log."""
        return LogGroup.COMPLETING if (part := self.known) is None else part.group


class Downtime(RecordModel):
    """The downtime of the attempt, counted from the stop request to running vCPUs (on either side).

    ``lower_ns`` and ``upper_ns`` bound the true downtime, ``measured_ns`` is the middle of the two. For an aborted
    switchover it is the pause that the guest saw on the source. ``parts`` and ``unattributed_ns`` sum to
    ``measured_ns`` exactly. ``source_reported_ns`` is the last figure that the source sent before the destination's
    vote, ``destination_measured_ns`` the destination's own count at its vote.
    """

    measured_ns: int
    lower_ns: int
    upper_ns: int
    limit_ns: int
    limit_violated: bool
    predicted_ns: int | None
    predicted_upper_ns: int | None
    parts: Rows[DowntimePart]
    unattributed_ns: int
    source_reported_ns: int | None
    destination_measured_ns: int | None
    hold_ns: int = 0
    predicted_parts_ns: dict[str, int] = Field(default_factory=dict)
    predicted_bases_ns: dict[str, int] = Field(default_factory=dict)
    """The base of each component: measured or tried in this attempt, before earlier records corrected it."""
    predicted_regime: Annotated[str, Field(max_length=100)] = ""
    """The kind of attempt among which the bound must hold: first or later, host, link, what it waited for."""
    predicted_scale_ns: int = 0
    """How far such a prediction is usually off: the unit in which bounds are learned. 0 where it is not known."""
    predicted_spreads_ns: dict[str, int] = Field(default_factory=dict)
    """How far single tries of a component, or rounds, lay from its base, where it was tried more than once."""
    predicted_load: float = 0.0
    """How much longer things took on the source because they waited for a processor, at least 1; 0 where it is not
    known."""

    @property
    def counted_ns(self) -> int:
        """The downtime that counts: against the limit, and against the prediction. A hold is the operator's own."""
        return counted_ns(self.measured_ns, self.hold_ns)

    def by_component(self) -> dict[Component, int]:
        """The actual duration of each component of a prediction (ns): the parts by component, the unattributed rest
        with the legs. They sum to the measured time without a hold."""
        sums = dict.fromkeys(Component, 0)
        for part in self.parts:
            if (component := part.component) is not None:
                sums[component] += part.ns
        sums[Component.LEGS] += self.unattributed_ns
        return sums

    def by_group(self) -> dict[LogGroup, int]:
        """The parts by their group in the log (ns), in the order of the log line."""
        sums = dict.fromkeys(LogGroup, 0)
        for part in self.parts:
            sums[part.group] += part.ns
        return sums


class DeviceRow(RecordModel):
    """The switchover of one device. ``None`` where that side did not reach it."""

    name: str
    kind: DeviceKind
    bytes: int
    save_ns: int | None
    load_ns: int | None
    expected_load_ns: int | None = None
    precopy_bytes: int = 0


class Checkpoint(RecordModel):
    """One of QEMU's downtime checkpoints, since the stop request, on the clock of ``side``'s own count."""

    name: str
    side: Role
    ns: int

    @classmethod
    def of(cls, point: QemuCheckpoint, ns: int) -> Self:
        """A known checkpoint, ``ns`` after the stop request."""
        return cls(name=point.label, side=point.side, ns=ns)


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
    """Waiting, before the pages were read, until block I/O that was in flight had drained; 0 where none can be."""


class EncodingRow(RecordModel):
    """Totals of one encoding over the attempt: batches, page bytes in, wire bytes out, time spent encoding."""

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
    shared: bool = False
    """Memory was handed over on the same host; False: it was copied."""
    postponed_pages: int = 0
    encodings: Rows[EncodingRow] = ()


class PhaseRow(RecordModel):
    """One phase of the source, on its monotonic clock since the attempt began."""

    name: str
    begin_ns: int
    end_ns: int


class TimeSummary(RecordModel):
    """The adjustment of the guest's clocks, with everything needed to compute it again."""

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
    stages: Rows[TimeStage]


class GuestGap(RecordModel):
    """The blackout as the guest itself observed it: the gap between two of its heartbeats, on its own TSC, and on the
    host's monotonic clock where source and destination are one host (meaningless elsewhere)."""

    guest_ns: int
    host_ns: int | None


class Digest(RecordModel):
    """The memory digests of both sides, hexadecimal; ``None`` where it was off or never computed."""

    algorithm: str
    source: str | None
    destination: str | None


class LogLine(RecordModel):
    """One log line of the attempt, wall clock of the side that wrote it."""

    side: Role
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
    devices: Rows[DeviceRow]
    checkpoints: Rows[Checkpoint]
    rounds: Rows[RoundRow]
    ram: Ram
    phases: Rows[PhaseRow]
    time: TimeSummary | None
    digest: Digest
    guest_gap: GuestGap | None = None
    events: Rows[LogLine] = ()

    @property
    def stop_name(self) -> str:
        """The word for the guest's stop: downtime when it was handed over, pause when it went on at the source."""
        return "downtime" if self.outcome in HANDED_OVER else "pause"

    def document(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.model_dump(mode="json")


class DestinationHalf(RecordModel):
    """The part of a record that only the destination knows; it sends it to the source as REPORT."""

    host: str
    load_ns: dict[str, int] = Field(default_factory=dict)
    """Per device, keyed ``name/kind``."""
    checkpoints: Rows[Checkpoint] = ()
    parts: Rows[DowntimePart] = ()
    """Consecutive pieces of the time from reading STATE_END to writing READY, and of the resume."""
    counted_ns: int | None = None
    source_reported_ns: int | None = None
    reserve_ns: int = 0
    time: TimeSummary | None = None
    digest: str | None = None
    guest_gap: GuestGap | None = None
    reason: str | None = None
    events: Annotated[Rows[LogLine], Field(max_length=4096)] = ()


def counted_ns(measured_ns: int, hold_ns: int) -> int:
    """Return the downtime that counts (ns): the measured one without the operator's hold (pause-before-switchover). No
    other code applies this rule."""
    return measured_ns - hold_ns


def downtime_of(
    *,
    lower_ns: int,
    upper_ns: int,
    measured_ns: int,
    limit_ns: int,
    parts: Iterable[DowntimePart],
    predicted_ns: int | None,
    predicted_upper_ns: int | None,
    source_reported_ns: int | None,
    destination_measured_ns: int | None,
    hold_ns: int = 0,
    predicted_parts_ns: dict[str, int] | None = None,
    predicted_bases_ns: dict[str, int] | None = None,
    predicted_regime: str = "",
    predicted_scale_ns: int = 0,
    predicted_spreads_ns: dict[str, int] | None = None,
    predicted_load: float = 0.0,
) -> Downtime:
    """Build the downtime of a record so that its parts and the unattributed rest sum to the measured time.

    Parts that are longer than the whole leave a negative rest, so that a reader sees that they cannot be right.
    """
    rows = tuple(parts)
    return Downtime(
        measured_ns=measured_ns,
        lower_ns=lower_ns,
        upper_ns=upper_ns,
        limit_ns=limit_ns,
        limit_violated=counted_ns(measured_ns, hold_ns) > limit_ns,
        predicted_ns=predicted_ns,
        predicted_upper_ns=predicted_upper_ns,
        parts=rows,
        unattributed_ns=measured_ns - sum(part.ns for part in rows),
        source_reported_ns=source_reported_ns,
        destination_measured_ns=destination_measured_ns,
        hold_ns=hold_ns,
        predicted_parts_ns=predicted_parts_ns or {},
        predicted_bases_ns=predicted_bases_ns or {},
        predicted_regime=predicted_regime,
        predicted_scale_ns=predicted_scale_ns,
        predicted_spreads_ns=predicted_spreads_ns or {},
        predicted_load=predicted_load,
    )
