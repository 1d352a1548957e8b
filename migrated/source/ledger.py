"""The ongoing record of an outgoing attempt: every figure as it becomes known, of memory, rounds, blackout and devices.
``finish`` turns it into the frozen ``Record``; nothing else builds one on the source."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

from migrated.prediction.model import Prediction
from migrated.record.model import (
    Checkpoint,
    DestinationHalf,
    DeviceRow,
    Digest,
    Downtime,
    DowntimePart,
    EncodingRow,
    LogLine,
    PhaseRow,
    Ram,
    Record,
    RoundRow,
    downtime_of,
)
from migrated.record.parts import CUT_FINER, Part
from migrated.record.terms import Outcome, Phase, QemuCheckpoint
from migrated.settings.parameters import MigrationParameters
from migrated.source.encoding import EncodingTotals
from protocol.budget import DowntimeInterval
from protocol.digest import ALGORITHM
from protocol.guest import PAGE_SIZE, DeviceDescription

_ROUNDS_KEPT = 1000
NOT_COPIED: Final = "not copied"
"""Stands for the digest of memory that was handed over: both VMMs have the same bytes, there is nothing to compare."""


@dataclass(slots=True)
class DeviceFigures:
    """Sizes and durations of one device's state on the source."""

    description: DeviceDescription
    save_ns: int | None = None
    final_bytes: int = 0
    precopy_bytes: int = 0
    expected_load_ns: int | None = None


@dataclass(slots=True)
class MemoryFigures:
    """Pages and bytes of guest memory that were sent. A page that travels twice counts twice."""

    pages: int = 0
    """Pages of the whole guest."""
    sparse_pages: int = 0
    dirty_tracking: Literal["pagemap-scan", "logged"] | None = None
    shared: bool = False
    """It is handed over on the same host: no page of it is sent."""
    dirty_syncs: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    postponed_pages: int = 0
    precopy_bytes: int = 0
    precopy_pages: int = 0
    downtime_bytes: int = 0
    downtime_pages: int = 0
    encodings: Mapping[str, EncodingTotals] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> int:
        """Bytes sent on the wire, in rounds and in the downtime."""
        return self.precopy_bytes + self.downtime_bytes

    def ram(self, channels: int, moving_ns: int) -> Ram:
        """The totals for the record.

        Args:
            channels: data channels.
            moving_ns: how long memory could travel.
        """
        return Ram(
            total_bytes=self.pages * PAGE_SIZE,
            page_size=PAGE_SIZE,
            transferred_bytes=self.sent_bytes,
            normal_pages=self.normal_pages,
            zero_pages=self.zero_pages,
            sparse_pages=self.sparse_pages,
            precopy_bytes=self.precopy_bytes,
            downtime_bytes=self.downtime_bytes,
            precopy_pages=self.precopy_pages,
            downtime_pages=self.downtime_pages,
            dirty_sync_count=self.dirty_syncs,
            pages_per_second=(self.precopy_pages + self.downtime_pages) * 1e9 / max(1, moving_ns),
            dirty_tracking=self.dirty_tracking,
            channels=1 if self.shared else channels,
            shared=self.shared,
            postponed_pages=self.postponed_pages,
            encodings=tuple(
                EncodingRow(
                    encoding=name,
                    batches=totals.batches,
                    page_bytes=totals.page_bytes,
                    wire_bytes=totals.wire_bytes,
                    ns=totals.ns,
                )
                for name, totals in sorted(self.encodings.items())
            ),
        )


@dataclass(slots=True)
class RoundFigures:
    """The rounds that are over, as many as a record can carry, and the last prediction."""

    rows: list[RoundRow] = field(default_factory=list)
    count: int = 0
    prediction: Prediction | None = None

    def add(self, row: RoundRow) -> None:
        """Keep a round. When there are too many for a record, every second one of the older half is dropped."""
        self.rows.append(row)
        self.count += 1
        if len(self.rows) > _ROUNDS_KEPT:
            del self.rows[1 : _ROUNDS_KEPT // 2 : 2]


@dataclass(slots=True)
class BlackoutFigures:
    """Figures of the time from the stop request to running vCPUs."""

    parts: list[DowntimePart] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    hold_ns: int = 0
    source_digest: int | None = None
    source_reported_ns: int | None = None
    interval: DowntimeInterval | None = None
    """The downtime, once it is known."""

    def downtime(self, limit_ns: int, prediction: Prediction | None, half: DestinationHalf) -> Downtime | None:
        """The downtime with its parts, the destination's own account filled in where it came."""
        interval = self.interval
        if interval is None:
            return None
        return downtime_of(
            lower_ns=interval.lower_ns,
            upper_ns=interval.upper_ns,
            measured_ns=interval.measured_ns,
            limit_ns=limit_ns,
            parts=_refined(self.parts, half.parts),
            predicted_ns=prediction.total_ns if prediction else None,
            predicted_upper_ns=prediction.upper_ns if prediction else None,
            source_reported_ns=self.source_reported_ns,
            destination_measured_ns=half.counted_ns,
            hold_ns=self.hold_ns,
            predicted_parts_ns=prediction.parts() if prediction else None,
            predicted_bases_ns=prediction.bases_by_name() if prediction else None,
            predicted_regime=prediction.regime if prediction else "",
            predicted_scale_ns=prediction.scale_ns if prediction else 0,
            predicted_spreads_ns=prediction.spreads_by_name() if prediction else None,
            predicted_load=prediction.bases.load if prediction else 0.0,
        )


@dataclass(slots=True)
class OutgoingLedger:
    """Figures of one outgoing attempt. Instants are of the source's monotonic clock (ns)."""

    migration_id: str
    guest: str
    epoch: int
    peer: str
    source_host: str
    parameters: MigrationParameters
    began_ns: int = field(default_factory=time.monotonic_ns)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    destination_host: str = ""
    setup_ns: int = 0
    ended_ns: int = 0
    memory: MemoryFigures = field(default_factory=MemoryFigures)
    rounds: RoundFigures = field(default_factory=RoundFigures)
    blackout: BlackoutFigures = field(default_factory=BlackoutFigures)
    devices: dict[tuple[str, str], DeviceFigures] = field(default_factory=dict)
    phases: list[PhaseRow] = field(default_factory=list)
    half: DestinationHalf = field(default_factory=lambda: DestinationHalf(host=""))

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a phase, also when it fails."""
        begin_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.add_phase(name, begin_ns, time.monotonic_ns())

    def add_phase(self, name: Phase, begin_ns: int, end_ns: int) -> None:
        """A phase between two instants."""
        row = PhaseRow(name=name.value, begin_ns=begin_ns - self.began_ns, end_ns=end_ns - self.began_ns)
        self.phases.append(row)

    def part(self, part: Part, begin_ns: int, end_ns: int) -> None:
        """A part of the downtime between two instants."""
        self.add_part(part, end_ns - begin_ns)

    def add_part(self, part: Part, ns: int) -> None:
        """A part of the downtime by its length."""
        self.blackout.parts.append(DowntimePart.of(part, ns))

    def checkpoint(self, point: QemuCheckpoint, ns: int) -> None:
        """One of QEMU's checkpoints, ``ns`` after the stop request."""
        self.blackout.checkpoints.append(Checkpoint.of(point, ns))

    def finish(self, outcome: Outcome, reason: str | None, events: list[dict[str, str]]) -> Record:
        """The frozen record. ``events`` are the source's log lines."""
        total_ns = (self.ended_ns or time.monotonic_ns()) - self.began_ns
        blackout, half, digest = self.blackout, self.half, self.blackout.source_digest
        lines = [LogLine(side="source", **line) for line in events] + list(half.events)
        return Record(
            migration_id=self.migration_id,
            guest=self.guest,
            epoch=self.epoch,
            peer=self.peer,
            source_host=self.source_host,
            destination_host=self.destination_host,
            started_at=self.started_at,
            outcome=outcome,
            reason=reason,
            parameters=self.parameters,
            total_ns=total_ns,
            setup_ns=self.setup_ns,
            downtime=blackout.downtime(int(self.parameters.downtime_limit_ms * 1e6), self.rounds.prediction, half),
            devices=tuple(self._device_rows()),
            checkpoints=(*blackout.checkpoints, *half.checkpoints),
            rounds=tuple(self.rounds.rows),
            ram=self.memory.ram(self.parameters.channels, total_ns - self.setup_ns),
            phases=tuple(self.phases),
            time=half.time,
            digest=Digest(
                algorithm=self._digest_algorithm,
                source=None if digest is None else f"{digest:016x}",
                destination=half.digest,
            ),
            guest_gap=half.guest_gap,
            events=tuple(sorted(lines, key=lambda line: line.at)),
        )

    @property
    def _digest_algorithm(self) -> str:
        if self.memory.shared:
            return NOT_COPIED
        return ALGORITHM if self.parameters.digest else "off"

    def _device_rows(self) -> Iterator[DeviceRow]:
        for (name, kind), figures in self.devices.items():
            yield DeviceRow(
                name=name,
                kind=figures.description.kind,
                bytes=figures.final_bytes,
                save_ns=figures.save_ns,
                load_ns=self.half.load_ns.get(f"{name}/{kind}"),
                expected_load_ns=figures.expected_load_ns,
                precopy_bytes=figures.precopy_bytes,
            )


def _refined(parts: Iterable[DowntimePart], details: Sequence[DowntimePart]) -> Iterator[DowntimePart]:
    """Return the source's parts, with those that passed on the destination cut into the pieces that it reported.

    The pieces are durations on the destination's clock that lie inside the part; the part keeps the rest.
    Pieces that are longer than their part cannot be right and are left out.
    """
    for whole in parts:
        inside = () if (part := whole.known) is None else CUT_FINER.get(part, ())
        pieces = [piece for piece in details if piece.known in inside]
        spent_ns = sum(piece.ns for piece in pieces)
        if spent_ns > whole.ns:
            pieces, spent_ns = [], 0
        yield from pieces
        yield whole.model_copy(update={"ns": whole.ns - spent_ns})
