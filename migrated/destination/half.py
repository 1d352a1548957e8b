"""The destination's half of the record: its own parts of the downtime, checkpoints and figures; and the whole record,
as the source sends it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from migrated.base.errors import DocumentError, VmmError
from migrated.destination.loading import Loaded
from migrated.destination.phases import Arriving, Final
from migrated.destination.takeover import ResumeTimes, Takeover
from migrated.guests.registry import Guest
from migrated.record.model import Checkpoint, DestinationHalf, DowntimePart, GuestGap, LogLine, Record
from migrated.record.parts import Part
from migrated.record.terms import HANDED_OVER, QemuCheckpoint
from protocol import messages
from protocol.budget import abort_limit_ns

log = structlog.get_logger()

_CLOCKS_APART = timedelta(days=1)
"""How far two hosts' wall clocks may be apart before nothing can be said of when an attempt began."""


@dataclass(slots=True)
class VoteTimes:
    """Instants before the vote on this host's monotonic clock (ns), 0 for a step that was not reached."""

    loaded_ns: int = 0
    checked_ns: int = 0


async def guest_gap_of(guest: Guest) -> GuestGap | None:
    """Wait for the blackout that the guest itself observed, known once its heartbeat goes on; None when its VMM cannot
    tell."""
    with contextlib.suppress(VmmError):
        if (gap := (await guest.vmm.status()).observed_gap) is not None:
            return GuestGap(guest_ns=gap.guest_ns, host_ns=gap.host_ns)
    return None


async def settle(guest: Guest) -> None:
    """Have its VMM do what is left for a guest that runs here now; what came of it is a line of the record."""
    try:
        if (done := await guest.vmm.settle()) is not None:
            log.info(done)
    except VmmError as error:
        log.warning("the guest runs, and not all is done for it", reason=str(error))


def half_of(
    host: str,
    phase: Arriving,
    times: VoteTimes,
    takeover: Takeover,
    done: Loaded,
    digest: int | None,
    guest_gap: GuestGap | None,
    lines: Iterable[dict[str, str]],
) -> DestinationHalf:
    """The half of an attempt that has ended.

    Args:
        host: this host's name.
        phase: the last phase that it reached.
        times: instants of the vote.
        takeover: the destination's hand-over, which has ended.
        done: what loading has put into the guest.
        digest: the digest of guest memory here.
        guest_gap: the blackout that the guest observed.
        lines: the log lines of the attempt.
    """
    parts: list[DowntimePart] = []
    checkpoints: list[Checkpoint] = []
    if isinstance(phase, Final):
        if times.loaded_ns:
            # Pages may still be on their way when the end of state, on its own channel, is here.
            arrived_ns = max(phase.arrived_at_ns, phase.read_at_ns)
            loaded_ns = max(times.loaded_ns, arrived_ns)
            parts.append(DowntimePart.of(Part.LAST_PAGES_LEG, arrived_ns - phase.read_at_ns))
            parts.append(DowntimePart.of(Part.DEVICE_LOADS, loaded_ns - arrived_ns))
            checkpoints.append(Checkpoint.of(QemuCheckpoint.LOADED, phase.counted_ns(loaded_ns)))
            if times.checked_ns:
                parts.append(DowntimePart.of(Part.DIGEST_CHECK, times.checked_ns - loaded_ns))
        if (resumed := takeover.resume_times) is not None:
            parts.append(DowntimePart.of(Part.COMMIT_JOURNAL, resumed.begin_ns - resumed.commit_read_ns))
            parts.append(DowntimePart.of(Part.RESUME, resumed.end_ns - resumed.begin_ns))
            checkpoints.append(Checkpoint.of(QemuCheckpoint.VM_STARTED, phase.counted_ns(resumed.end_ns)))
    return DestinationHalf(
        host=host,
        load_ns=done.load_ns,
        checkpoints=tuple(checkpoints),
        parts=tuple(parts),
        counted_ns=phase.counted_at_vote_ns,
        source_reported_ns=phase.source_reported_ns,
        reserve_ns=phase.reserve_ns(),
        time=done.time,
        digest=f"{digest:016x}" if digest is not None else None,
        guest_gap=guest_gap,
        reason=takeover.reason,
        events=tuple(LogLine(side="destination", **line) for line in lines),
    )


def check_record(record: Record, hello: messages.Hello, offered_at: str, runs_here: bool) -> None:
    """Check that a record that the source sent is of this attempt, and does not say what cannot be.

    Args:
        hello: the offer.
        offered_at: when it came (ISO 8601).
        runs_here: whether the guest was taken over.

    Raises:
        DocumentError: it is not.
    """
    if (record.migration_id, record.guest, record.epoch) != (hello.migration_id, hello.guest.name, hello.epoch):
        raise DocumentError(
            f"it is of migration {record.migration_id[:40]}, epoch {record.epoch} of guest {record.guest[:80]!r}, not "
            "of this attempt"
        )
    if runs_here is not (record.outcome in HANDED_OVER):
        raise DocumentError(f"it says {record.outcome}, and the guest {'runs' if runs_here else 'does not run'} here")
    try:
        apart = abs(datetime.fromisoformat(record.started_at) - datetime.fromisoformat(offered_at))
    except (ValueError, TypeError, OverflowError) as error:
        raise DocumentError(f"it began at {record.started_at[:80]!r}, which is no date with a time zone") from error
    if apart > _CLOCKS_APART:
        raise DocumentError(f"it began at {record.started_at}, {apart.days} days from when it was offered here")


def log_costs(phase: Arriving, times: VoteTimes, resumed: ResumeTimes | None, done: Loaded) -> None:
    """The two lines of a guest that runs here, breakdown first."""
    resume_ms = (resumed.end_ns - resumed.begin_ns) / 1e6 if resumed is not None else 0.0
    loads_ms = sum(done.load_ns.values()) / 1e6
    completing_ms = (times.checked_ns - phase.read_at_ns) / 1e6 if isinstance(phase, Final) else 0.0
    log.debug(
        f"Migration (incoming) breakdown: device_loads={loads_ms:.1f}ms completing={completing_ms:.1f}ms "
        f"resume={resume_ms:.1f}ms"
    )
    log.info(
        "Migration (incoming) complete: the guest runs here, counted downtime was "
        f"{(phase.counted_at_vote_ns or 0) / 1e6:.0f}ms at READY "
        f"(limit was {abort_limit_ns(phase.limits) / 1e6:.0f}ms)"
    )
