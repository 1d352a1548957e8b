"""The phases of an outgoing attempt, as types: each phase holds the objects that exist by then and says which commands
are possible.

    Beginning -> Connected -> Opened -> Prepared -> Blackout
                 a channel    session   hand-over,  switchover
                                        rounds

A phase lasts until the next one begins; the last that was reached is released at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from typing import Final

from migrated.base.errors import LinkLostError, VmmError
from migrated.record.model import Record
from migrated.record.terms import Outcome, Phase, Stage
from migrated.source.handover import OPERATOR_KEEPS, SourceHandover
from migrated.source.ledger import OutgoingLedger
from migrated.source.precopy import Precopy
from migrated.source.session import Connection, Session
from migrated.source.switchover import Switchover
from migrated.source.transfer import Transfer
from protocol import messages
from protocol.errors import ProtocolError
from protocol.guest import PAGE_SIZE
from protocol.handover import SourceEvent, SourceState

_IN_DOUBT: Final = (
    "COMMIT was sent and the destination has not answered; the guest stays stopped here until it does, or until "
    "`migratectl resolve`"
)

_HELD: Final = (
    "COMMIT was not sent, and the guest stays stopped here until the fleet's store says that it is this host's, or "
    "until `migratectl resolve`: {}"
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of the rounds so far."""

    remaining_bytes: int = 0
    bandwidth_bytes_per_s: float = 0.0
    dirty_rate_pages_per_s: float = 0.0
    throttle_percent: int = 0


def figures_of(ledger: OutgoingLedger, precopy: Precopy, sent_bytes: int) -> Figures:
    """The figures of rounds under way.

    Args:
        sent_bytes: what has left so far; it tells what remains of the first round.
    """
    remaining_bytes = precopy.remaining_pages * PAGE_SIZE
    if not ledger.rounds.rows:
        remaining_bytes = max(0, (ledger.memory.pages - ledger.memory.sparse_pages) * PAGE_SIZE - sent_bytes)
    return Figures(remaining_bytes, precopy.bandwidth.bytes_per_s, precopy.dirty_pages_per_s, precopy.throttle_percent)


class Beginning:
    """Nothing exists but the attempt itself."""

    @property
    def label(self) -> str:
        """The phase's name for operators."""
        return Phase.SYNC

    @property
    def connected(self) -> bool:
        """True when there is a control channel."""
        return False

    @property
    def in_doubt(self) -> bool:
        """True when the destination may run the guest and has not said whether it does."""
        return False

    @property
    def too_late(self) -> bool:
        """True when the attempt cannot be cancelled any more."""
        return False

    @property
    def stage(self) -> Stage:
        """How far the attempt has come with the sending of memory."""
        return "setting-up"

    def figures(self) -> Figures:
        """Figures of the rounds."""
        return Figures()

    def sent_bytes(self) -> int:
        """Bytes that went over the data channels so far."""
        return 0

    def pace(self, bytes_per_s: int) -> None:
        """Take over a cap on the bandwidth that an operator changed."""

    def pace_first_round(self, bytes_per_s: int) -> None:
        """Let the first round go faster or slower than the cap."""

    def continue_switchover(self) -> bool:
        """Let a held switchover go on. Returns False when none is held."""
        return False

    async def resolve(self, run_here: bool) -> bool:
        """End a doubt by the operator's word. Returns False when there is none."""
        return False

    def outcome(self, cancelled: bool) -> tuple[Outcome, str | None] | None:
        """Return the outcome of the hand-over, with the reason; None while it has not decided anything.

        Args:
            cancelled: whether an operator ended the attempt.
        """
        return None

    async def give_up(self, reason: str) -> None:
        """Give up a failed attempt: tell the destination, and let the guest run here."""

    async def let_go(self) -> None:
        """Release everything but the control channel: threads, sockets, mappings, tracking, throttling."""

    async def part(self, record: Record) -> None:
        """Hand the record to the destination and close the control channel."""

    async def decided(self) -> None:
        """Wait until an attempt in doubt is decided."""

    async def stop_asking(self) -> None:
        """Stop asking for the outcome, because the daemon stops; a restarted one finds the attempt in its journal."""


class Connected(Beginning):
    """A control channel stands."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @property
    def connected(self) -> bool:
        return self.connection.control.lost is None

    async def part(self, record: Record) -> None:
        with contextlib.suppress(LinkLostError, ProtocolError):
            self.connection.control.send(messages.Record(), json.dumps(record.document()).encode())
        await self.connection.control.close()


class Opened(Connected):
    """The destination has taken the offer; nothing is journaled yet."""

    def __init__(self, session: Session, ledger: OutgoingLedger) -> None:
        super().__init__(session.connection)
        self.session = session
        self.ledger = ledger

    def sent_bytes(self) -> int:
        return sum(channel.sent_bytes for channel in self.session.channels)

    def pace(self, bytes_per_s: int) -> None:
        self.session.sender.pace(bytes_per_s)

    async def give_up(self, reason: str) -> None:
        self.connection.give_up(self.ledger.epoch, reason)

    async def let_go(self) -> None:
        await self._close_session(guest_stays=True)

    async def _close_session(self, *, guest_stays: bool) -> None:
        await self.session.close(guest_stays=guest_stays)
        self.ledger.memory.encodings = self.session.sender.encodings


class Prepared(Opened):
    """The attempt is journaled and rounds can run."""

    def __init__(self, opened: Opened, handover: SourceHandover, transfer: Transfer, precopy: Precopy) -> None:
        super().__init__(opened.session, opened.ledger)
        self.handover = handover
        self.transfer = transfer
        self.precopy = precopy

    @property
    def label(self) -> str:
        return Phase.PRE_COPY

    @property
    def stage(self) -> Stage:
        return "first-round" if self.precopy.in_first_round else "later"

    def figures(self) -> Figures:
        return figures_of(self.ledger, self.precopy, self.sent_bytes())

    def pace(self, bytes_per_s: int) -> None:
        self.precopy.cap_changed()

    def pace_first_round(self, bytes_per_s: int) -> None:
        self.precopy.pace_first_round(bytes_per_s)

    async def give_up(self, reason: str) -> None:
        if self.handover.state in (SourceState.RUNNING, SourceState.STOPPED):
            await self.handover.take(SourceEvent.FAULT, self.connection.control, reason)

    async def let_go(self) -> None:
        guest_stays = self.handover.state is not SourceState.RETIRED
        await self._close_session(guest_stays=guest_stays)
        if guest_stays:
            with contextlib.suppress(VmmError):
                await self.precopy.end_throttle()

    async def stop_asking(self) -> None:
        await self.handover.close()


class Blackout(Prepared):
    """The guest is stopped, or about to be: only the hand-over ends the attempt now.

    Args:
        hold: set when the operator lets the switchover go on; None without pause-before-switchover.
    """

    def __init__(self, prepared: Prepared, switchover: Switchover, hold: asyncio.Event | None) -> None:
        super().__init__(prepared, prepared.handover, prepared.transfer, prepared.precopy)
        self.switchover = switchover
        self._hold = hold

    @property
    def label(self) -> str:
        return self.switchover.phase

    @property
    def in_doubt(self) -> bool:
        return self.handover.in_doubt

    @property
    def too_late(self) -> bool:
        return self.handover.state in (SourceState.COMMITTED, SourceState.HELD, SourceState.RETIRED)

    def continue_switchover(self) -> bool:
        if self._hold is None:
            return False
        self._hold.set()
        return True

    async def resolve(self, run_here: bool) -> bool:
        if not self.handover.in_doubt:
            return False
        event = SourceEvent.RESOLVE_RUN_HERE if run_here else SourceEvent.RESOLVE_DISCARD
        await self.handover.take(event, None, OPERATOR_KEEPS if run_here else None)
        return True

    def outcome(self, cancelled: bool) -> tuple[Outcome, str | None] | None:
        match self.handover.state:
            case SourceState.RETIRED:
                return "completed", None
            case SourceState.COMMITTED:
                return "in-doubt", _IN_DOUBT
            case SourceState.HELD:
                return "in-doubt", _HELD.format(self.handover.reason)
            case SourceState.ABORTED:
                return ("cancelled" if cancelled else "aborted"), self.handover.reason
            case _:
                return None

    async def give_up(self, reason: str) -> None:
        await super().give_up(reason)
        if self.handover.state is SourceState.COMMITTED and not self.handover.in_doubt:
            await self.handover.take(SourceEvent.DEADLINE, self.connection.control)

    async def decided(self) -> None:
        await self.handover.finished.wait()
        self.switchover.account()
        if self.handover.state is SourceState.ABORTED:
            await self.session.tracking.stop_in_vmm()
        self.ledger.ended_ns = time.monotonic_ns()
