"""The operator's view of an incoming attempt: its status with an event for each change, counts of arrived pages and
bytes, and the snapshot."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

from migrated.environment import Environment
from migrated.observe.progress import Moved, Progress, Standing, snapshot
from migrated.record.terms import Status
from protocol import messages
from protocol.budget import abort_limit_ns
from protocol.messages import Limits


@dataclass(slots=True)
class Tally:
    """Counts of what has arrived: the last round in place, payload bytes, pages with and without content."""

    rounds: int = 0
    received_bytes: int = 0
    normal_pages: int = 0
    zero_pages: int = 0


class View:
    """One attempt as an operator sees it, from the offer on.

    Args:
        env: the daemon.
        hello: the source's offer.
        peer: the source's address.
    """

    def __init__(self, env: Environment, hello: messages.Hello, peer: str) -> None:
        self.status: Status = "setup"
        self.reason: str | None = None
        """The reason for which the attempt ended; None while it runs and when it completed."""
        self.tally = Tally()
        self.started_at = datetime.now(UTC).isoformat()
        self._began_ns = time.monotonic_ns()
        self._env = env
        self._hello = hello
        self._peer = peer

    def set_status(self, status: Status) -> None:
        """Set the status; publish an event if it changed."""
        if self.status != status:
            self.status = status
            self._env.publish(
                "MIGRATION",
                {"status": status, "guest": self._hello.guest.name, "migration-id": self._hello.migration_id},
            )

    def progress(self, phase: str, limits: Limits, counted_ns: int | None) -> Progress:
        """A snapshot.

        Args:
            phase: the state of the hand-over.
            limits: the budget in force.
            counted_ns: the downtime by this host's count, None before it begins.
        """
        tally = self.tally
        standing = Standing(
            migration_id=self._hello.migration_id,
            guest=self._hello.guest.name,
            role="destination",
            peer=self._peer,
            destination=self._env.host,
            started_at=self.started_at,
            elapsed_ns=time.monotonic_ns() - self._began_ns,
            status=self.status,
            phase=phase,
            memory_bytes=self._hello.guest.memory_bytes,
            downtime_limit_ns=abort_limit_ns(limits),
            decision=f"received {tally.rounds} rounds",
            reason=self.reason,
        )
        moved = Moved(
            round=tally.rounds,
            transferred_bytes=tally.received_bytes,
            normal_pages=tally.normal_pages,
            zero_pages=tally.zero_pages,
        )
        return snapshot(standing, moved, downtime_ns=counted_ns if self.status in ("device", "completed") else None)
