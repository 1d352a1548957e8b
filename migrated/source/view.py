"""The operator's view of an outgoing attempt: its status with an event for each change, the sentence that explains the
last decision, and the snapshot."""

from __future__ import annotations

import time
from typing import Protocol

import structlog

from migrated.environment import Environment
from migrated.observe.progress import Acknowledged, Moved, Progress, Standing, snapshot
from migrated.prediction.model import Prediction
from migrated.record.terms import Status
from migrated.settings.parameters import limit_of
from migrated.source.ledger import OutgoingLedger
from migrated.source.phases import Beginning
from protocol.guest import PAGE_SIZE

log = structlog.get_logger()


class Told(Protocol):
    """Has heard from the receiving side."""

    @property
    def acknowledged(self) -> Acknowledged | None:
        """The figures that it reported, None where nobody can report any."""


class View:
    """One attempt as an operator sees it.

    Args:
        env: the daemon, which publishes events.
        ledger: the figures so far.
        told: has the figures that the destination reported.
    """

    def __init__(self, env: Environment, ledger: OutgoingLedger, told: Told) -> None:
        self.status: Status = "setup"
        self._env = env
        self._ledger = ledger
        self._told = told
        self._decision = "connecting"
        self._prediction: Prediction | None = None
        self._passes_told = 0

    def set_status(self, status: Status) -> None:
        """Set the status; publish an event if it changed."""
        if self.status != status:
            self.status = status
            self._env.publish(
                "MIGRATION",
                {"status": status, "guest": self._ledger.guest, "migration-id": self._ledger.migration_id},
            )

    def guest_stopped(self, held: bool) -> None:
        """Set the status after QEMU's event STOP, unless the attempt is being cancelled."""
        if self.status != "cancelling":
            self.set_status("pre-switchover" if held else "device")

    def became_doubtful(self, reason: str) -> None:
        """Set the status in-doubt: COMMIT was sent and the destination does not answer."""
        self.set_status("in-doubt")
        self._env.publish(
            "X_MIGRATED_IN_DOUBT",
            {"guest": self._ledger.guest, "migration-id": self._ledger.migration_id, "reason": reason},
        )

    def say(self, sentence: str) -> None:
        """Set the sentence on the step under way."""
        self._decision = sentence

    def say_round(self, sentence: str, prediction: Prediction) -> None:
        """Set the sentence on why the guest is stopped now or not yet, and the prediction behind it."""
        self._prediction = prediction
        log.debug("round", round=self._ledger.rounds.count, decision=sentence)
        self.tell_passes()
        self.say(sentence)

    def tell_passes(self) -> None:
        """Publish MIGRATION_PASS for every read of the dirty log since the last call, as QEMU does."""
        while self._passes_told < self._ledger.memory.dirty_syncs:
            self._passes_told += 1
            self._env.publish(
                "MIGRATION_PASS",
                {"pass": self._passes_told, "guest": self._ledger.guest, "migration-id": self._ledger.migration_id},
            )

    def progress(self, phase: Beginning, label: str, reason: str | None) -> Progress:
        """A snapshot.

        Args:
            phase: the last phase that the attempt has reached.
            label: the name of the phase, or of the step after it.
            reason: why the attempt ended, None while it has not, and when it completed.
        """
        ledger, figures, prediction = self._ledger, phase.figures(), self._prediction
        memory, rounds, interval = ledger.memory, ledger.rounds, ledger.blackout.interval
        standing = Standing(
            migration_id=ledger.migration_id,
            guest=ledger.guest,
            role="source",
            peer=ledger.peer,
            destination=ledger.destination_host,
            started_at=ledger.started_at,
            elapsed_ns=(ledger.ended_ns or time.monotonic_ns()) - ledger.began_ns,
            status=self.status,
            phase=label,
            memory_bytes=memory.pages * PAGE_SIZE,
            downtime_limit_ns=limit_of(ledger.parameters),
            decision=self._decision,
            reason=reason,
        )
        moved = Moved(
            setup_ns=ledger.setup_ns,
            round=rounds.count,
            dirty_sync_count=memory.dirty_syncs,
            transferred_bytes=memory.sent_bytes if ledger.ended_ns else phase.sent_bytes(),
            remaining_bytes=figures.remaining_bytes,
            normal_pages=memory.normal_pages,
            zero_pages=memory.zero_pages,
            bandwidth_bytes_per_s=figures.bandwidth_bytes_per_s,
            dirty_rate_pages_per_s=figures.dirty_rate_pages_per_s,
            throttle_percent=figures.throttle_percent,
            rounds=tuple(rounds.rows),
        )
        return snapshot(
            standing,
            moved,
            prediction=prediction,
            downtime_ns=interval.measured_ns if interval is not None else None,
            acknowledged=self._told.acknowledged,
        )
