"""The phases of an incoming attempt, as types, each with the part of its budget that is known by then.

Arriving -> Blackout -> Final
            DOWNTIME    STATE_END
            count,      what must be there for READY
            deadline
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from migrated.link.control import ControlChannel, Received
from protocol import messages
from protocol.blackout import DestinationBudget, Vote, destination_reserve_ns
from protocol.budget import DowntimeCount
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.messages import Limits


class Alarm:
    """One timer of the event loop, which can be set anew and cancelled."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def ring_in(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call back after a while; what was set before is forgotten."""
        self.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, call)

    def cancel(self) -> None:
        """Do not ring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@dataclass(frozen=True, slots=True)
class Terms:
    """The parts of one attempt's budget that are fixed when it begins.

    Attributes:
        control: its exchanges of clocks tell how long messages travel.
        limits: the budget, as the offer has it.
        own_resume_ns: kept back for the resume of the guest's VMM on this host (ns).
        on_late: called when the deadline passes, with the vote that this means.
    """

    control: ControlChannel
    limits: Limits
    own_resume_ns: int
    on_late: Callable[[Vote], None]


class Arriving:
    """The guest still runs on the source: rounds arrive and nothing counts."""

    source_reported_ns: int | None = None
    """The source's own figure of the downtime, None before it told one."""
    counted_at_vote_ns: int | None = None
    """The downtime by our own count when READY was voted, None before."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    @property
    def limits(self) -> Limits:
        """The budget in force."""
        return self.terms.limits

    def counted_ns(self, at_ns: int) -> int | None:
        """The downtime by our own count at an instant (monotonic, ns), None before it begins."""
        return None

    def reserve_ns(self) -> int:
        """Return the reserve for all that follows the vote: the legs of READY and COMMIT, and the resume (ns)."""
        return destination_reserve_ns(self.terms.control.round_trip_ns(), self.terms.own_resume_ns, 0)

    def hear(self, told: messages.Downtime | messages.StateEnd, received: Received) -> Blackout:
        """The source tells how long its guest has stood still: count on from there, and set the deadline."""
        transit_ns = self.terms.control.transit_upper_ns(told.sent_at_ns, received.read_at_hrtime_ns)
        count = DowntimeCount(told.source_downtime_ns + transit_ns, received.read_at_ns)
        budget = DestinationBudget(self.terms.limits, self.terms.own_resume_ns, count)
        blackout = Blackout(self.terms, budget, Alarm())
        blackout.take_terms(told)
        return blackout

    def vote(self, digest: int | None, now_ns: int) -> Vote:
        """Everything is in place: what to vote.

        Raises:
            RemoteProtocolError: the source has not said that this is everything.
        """
        raise RemoteProtocolError("the final state is loaded before the source ended it", ErrorCode.UNEXPECTED)

    def all_arrived(self, last_round: int) -> bool:
        """Whether everything that the source sent is here."""
        return False

    def stop_deadline(self) -> None:
        """Nothing is late any more."""


class Blackout(Arriving):
    """The guest stands still: the count runs, and the deadline is set.

    Args:
        budget: the destination's side of the budget.
        deadline: rings when the vote must be NO.
    """

    def __init__(self, terms: Terms, budget: DestinationBudget, deadline: Alarm) -> None:
        super().__init__(terms)
        self.budget = budget
        self.deadline = deadline

    @property
    def limits(self) -> Limits:
        return self.budget.limits

    def counted_ns(self, at_ns: int) -> int:
        return self.budget.count.now(at_ns)

    def reserve_ns(self) -> int:
        return self.budget.reserve_ns(self.terms.control.round_trip_ns())

    def hear(self, told: messages.Downtime | messages.StateEnd, received: Received) -> Blackout:
        transit_ns = self.terms.control.transit_upper_ns(told.sent_at_ns, received.read_at_hrtime_ns)
        self.budget.count.hear(told.source_downtime_ns, transit_ns, received.read_at_ns)
        self.take_terms(told)
        return self

    def take_terms(self, told: messages.Downtime | messages.StateEnd) -> None:
        """Take the limits that a message may carry, and set the deadline anew."""
        if isinstance(told, messages.Downtime):
            self.budget.set_terms(told.limits, told.resume_reserve_ns)
        self.source_reported_ns = told.source_downtime_ns
        patience_ns = self.budget.patience_ns(self.terms.control.round_trip_ns(), time.monotonic_ns())
        if patience_ns is None:
            self.deadline.cancel()
        else:
            self.deadline.ring_in(patience_ns / 1e9, self._late)

    def _late(self) -> None:
        self.terms.on_late(self.budget.over_limit(self.terms.control.round_trip_ns(), time.monotonic_ns()))

    def stop_deadline(self) -> None:
        self.deadline.cancel()


class Final(Blackout):
    """The source has ended its state: it is known what must be there for READY.

    Args:
        blackout: what was so far.
        end: what the source sent.
        read_at_ns: when that was read (monotonic).
    """

    def __init__(self, blackout: Blackout, end: messages.StateEnd, read_at_ns: int) -> None:
        super().__init__(blackout.terms, blackout.budget, blackout.deadline)
        self.source_reported_ns = blackout.source_reported_ns
        self.end = end
        self.read_at_ns = read_at_ns
        self.arrived_at_ns = 0
        """When the last page was here, 0 before."""

    def all_arrived(self, last_round: int) -> bool:
        if last_round < self.end.last_round:
            return False
        self.arrived_at_ns = self.arrived_at_ns or time.monotonic_ns()
        return True

    def vote(self, digest: int | None, now_ns: int) -> Vote:
        return self.budget.vote(digest, self.end.digest, self.terms.control.round_trip_ns(), now_ns)

    def ready(self, digest: int | None) -> messages.Ready:
        """The vote READY, counted now."""
        now_ns = time.monotonic_ns()
        self.counted_at_vote_ns = self.counted_ns(now_ns)
        return messages.Ready(
            epoch=self.end.epoch,
            digest=digest or 0,
            elapsed_ns=self.counted_at_vote_ns,
            completing_ns=now_ns - self.read_at_ns,
        )
