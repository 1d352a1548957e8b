"""The end of an outgoing attempt: its outcome, its record, and the last lines of its log."""

from __future__ import annotations

import structlog

from migrated.base.errors import CancelledByOperatorError, RefusedError
from migrated.record.model import Record
from migrated.record.terms import Outcome

log = structlog.get_logger()


def outcome_of_error(error: Exception) -> tuple[Outcome, str]:
    """The outcome of an attempt that ended before the stop, with its reason."""
    reason = str(error) or repr(error)
    if isinstance(error, CancelledByOperatorError):
        return "cancelled", reason
    return ("refused" if isinstance(error, RefusedError) else "failed"), reason


def log_outcome(record: Record) -> None:
    """The two lines of a downtime, breakdown first, or the reason why there is none."""
    downtime = record.downtime
    if downtime is not None:
        parts = " ".join(f"{group}={ns / 1e6:.1f}ms" for group, ns in downtime.by_group().items())
        log.debug(f"Migration downtime breakdown: {parts} unattributed={downtime.unattributed_ns / 1e6:.1f}ms")
    if record.outcome == "completed" and downtime is not None:
        predicted = downtime.predicted_ns
        expected = f", predicted {predicted / 1e6:.0f}ms" if predicted is not None else ""
        log.info(
            f"Migration complete: actual downtime was {downtime.measured_ns / 1e6:.0f}ms and migration took "
            f"{record.total_ns / 1e9:.2f}s (limit was {downtime.limit_ns / 1e6:.0f}ms{expected})"
        )
        if record.time is None:
            log.info(
                f"The guest's clock stood while it did and is {downtime.measured_ns / 1e6:.0f}ms behind now, until "
                "something in the guest sets it: its time does not travel apart from its devices"
            )
    elif record.outcome == "in-doubt":
        log.error("Migration in doubt", reason=record.reason)
    else:
        log.warning(f"Migration {record.outcome}", reason=record.reason)
