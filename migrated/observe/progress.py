"""The snapshot of a migration that an operator sees while it runs, on either side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from migrated.record.model import RoundRow
from migrated.record.reading import read_document
from migrated.record.terms import Role, Status


class Acknowledged(BaseModel):
    """Figures that the destination itself has told the source: the rounds that are in place there and their bytes; and
    after its vote, the vote and the downtime that it had counted by then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = 0
    received_bytes: int = 0
    vote: Literal["ready", "no"] | None = None
    counted_ns: int | None = None


class Progress(BaseModel):
    """A snapshot of one migration. Byte and page figures are of guest memory; rates are per second.

    ``decision`` is the sentence that says why the guest has not been stopped yet, or which step is under way.
    ``dirty_sync_count`` counts reads of the dirty log, as MIGRATION_PASS does. ``acknowledged`` is None where no
    destination can have told anything: on the destination itself, and after a restart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    migration_id: str
    guest: str
    role: Role
    peer: str
    status: Status
    phase: str
    started_at: str
    elapsed_ns: int
    setup_ns: int
    round: int
    dirty_sync_count: int
    total_bytes: int
    transferred_bytes: int
    remaining_bytes: int
    normal_pages: int
    zero_pages: int
    bandwidth_bytes_per_s: float
    dirty_rate_pages_per_s: float
    predicted_downtime_ns: int | None
    predicted_upper_ns: int | None
    predicted_parts_ns: dict[str, int]
    downtime_limit_ns: int
    downtime_ns: int | None
    throttle_percent: int
    decision: str
    destination: str
    acknowledged: Acknowledged | None
    reason: str | None
    rounds: tuple[RoundRow, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """The attempt of a snapshot, and its state. ``elapsed_ns`` counts from its beginning."""

    migration_id: str
    guest: str
    role: Role
    peer: str
    destination: str
    started_at: str
    elapsed_ns: int
    status: Status
    phase: str
    memory_bytes: int
    downtime_limit_ns: int
    decision: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Moved:
    """Figures of the transfer so far: 0 where this side does not know one, as after a restart."""

    setup_ns: int = 0
    round: int = 0
    dirty_sync_count: int = 0
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    bandwidth_bytes_per_s: float = 0.0
    dirty_rate_pages_per_s: float = 0.0
    throttle_percent: int = 0
    rounds: tuple[RoundRow, ...] = ()


class Predicted(Protocol):
    """A prediction of the downtime (``prediction.model.Prediction``)."""

    @property
    def total_ns(self) -> int:
        """The most likely downtime (ns)."""

    @property
    def upper_ns(self) -> int:
        """The upper bound (ns)."""

    def parts(self) -> dict[str, int]:
        """Its pieces by name (ns)."""


def snapshot(
    standing: Standing,
    moved: Moved,
    *,
    prediction: Predicted | None = None,
    downtime_ns: int | None = None,
    acknowledged: Acknowledged | None = None,
) -> Progress:
    """Build the snapshot of an attempt, on either side; no other code builds one."""
    return Progress(
        migration_id=standing.migration_id,
        guest=standing.guest,
        role=standing.role,
        peer=standing.peer,
        status=standing.status,
        phase=standing.phase,
        started_at=standing.started_at,
        elapsed_ns=standing.elapsed_ns,
        setup_ns=moved.setup_ns,
        round=moved.round,
        dirty_sync_count=moved.dirty_sync_count,
        total_bytes=standing.memory_bytes,
        transferred_bytes=moved.transferred_bytes,
        remaining_bytes=0 if standing.status == "completed" else moved.remaining_bytes,
        normal_pages=moved.normal_pages,
        zero_pages=moved.zero_pages,
        bandwidth_bytes_per_s=moved.bandwidth_bytes_per_s,
        dirty_rate_pages_per_s=moved.dirty_rate_pages_per_s,
        predicted_downtime_ns=None if prediction is None else prediction.total_ns,
        predicted_upper_ns=None if prediction is None else prediction.upper_ns,
        predicted_parts_ns={} if prediction is None else prediction.parts(),
        downtime_limit_ns=standing.downtime_limit_ns,
        downtime_ns=downtime_ns,
        throttle_percent=moved.throttle_percent,
        decision=standing.decision,
        destination=standing.destination,
        acknowledged=acknowledged,
        reason=standing.reason,
        rounds=moved.rounds,
    )


def read_progress(document: Mapping[str, Any]) -> Progress:
    """Return the snapshot in a document (``x-migrated-status``), also in one of a newer daemon.

    Raises:
        DocumentError: it is no snapshot that this version can read.
    """
    return read_document(Progress, document, "snapshot of a migration")
