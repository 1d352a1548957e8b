"""What an operator sees of a migration while it runs: one snapshot, on either side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from migrated.record.model import RoundRow
from migrated.record.reading import read_document
from migrated.record.terms import Role, Status


class Acknowledged(BaseModel):
    """What the destination itself has told the source: rounds that are in place there, the bytes that brought them, and
    once it has voted, how, and what it had counted of the downtime by then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = 0
    received_bytes: int = 0
    vote: Literal["ready", "no"] | None = None
    counted_ns: int | None = None


class Progress(BaseModel):
    """A snapshot of one migration. Byte and page figures are of guest memory; rates are per second.

    ``decision`` is the sentence that says why the guest has not been stopped yet, or what happens now.
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


def read_progress(document: Mapping[str, Any]) -> Progress:
    """A snapshot from its document (``x-migrated-status``), also one of a newer daemon.

    Raises:
        DocumentError: it is no snapshot that this version can read.
    """
    return read_document(Progress, document, "snapshot of a migration")
