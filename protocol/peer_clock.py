"""The peer's clock and the round trip to it, as the recent exchanges of clocks show them.

    ask -> CLOCK_ASK ... CLOCK_REPLY -> hear -> round trip, bounds of the offset, upper bound of a transit

It reads no clock: instants are arguments, in nanoseconds of this host's raw clock. Daemons and simulator use it.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

from protocol.clock import ClockExchange, OffsetEstimate, one_way_transit
from protocol.messages import ClockAsk, ClockReply

KEPT_EXCHANGES: Final = 32


class PeerClock:
    """The recent exchanges of clocks with one peer, and the asks that are not answered yet."""

    def __init__(self) -> None:
        self._asked: dict[int, int] = {}
        self._exchanges: deque[ClockExchange] = deque(maxlen=KEPT_EXCHANGES)

    def ask(self, nonce: int, now_ns: int) -> ClockAsk:
        """Return the message that begins an exchange; it is to be sent now.

        Args:
            nonce: any number that no open ask has.
        """
        if len(self._asked) > KEPT_EXCHANGES:
            self._asked.clear()
        self._asked[nonce] = now_ns
        return ClockAsk(nonce=nonce)

    def hear(self, reply: ClockReply, read_at_ns: int) -> bool:
        """Take an answer. Returns False for one that comes after its ask was forgotten, which proves nothing.

        Raises:
            FalsifiedStampsError: two honest clocks cannot have produced its stamps.
        """
        asked_at_ns = self._asked.pop(reply.nonce, None)
        if asked_at_ns is None:
            return False
        exchange = ClockExchange(asked_at_ns, reply.t2_ns, reply.t3_ns, read_at_ns)
        exchange.check()
        self._exchanges.append(exchange)
        return True

    def forget_but(self, count: int) -> None:
        """Keep only the last ``count`` exchanges: those before were made under other circumstances."""
        while len(self._exchanges) > count:
            self._exchanges.popleft()

    def round_trip_ns(self) -> int:
        """Return the longest round trip of the recent exchanges (ns), 0 before the first: for reserves."""
        return max((exchange.delta_ns for exchange in self._exchanges), default=0)

    def typical_round_trip_ns(self) -> int:
        """Return the median round trip of the recent exchanges (ns), 0 before the first: for predictions."""
        return int(median(exchange.delta_ns for exchange in self._exchanges)) if self._exchanges else 0

    def offset(self) -> OffsetEstimate | None:
        """Return the bounds of the peer's raw clock that the recent exchanges prove; None before the first.

        Raises:
            FalsifiedStampsError: one of the exchanges is impossible.
        """
        return OffsetEstimate(tuple(self._exchanges)) if self._exchanges else None

    def transit_upper_ns(self, sent_at_peer_ns: int, read_at_ns: int) -> int:
        """Return an upper bound of the transit of a message that the peer stamped (ns): from the offset, or the longest
        round trip before one is known.

        Raises:
            ClockError: the exchanges exclude each other, or the message would have arrived before it was sent.
        """
        estimate = self.offset()
        if estimate is None:
            return self.round_trip_ns()
        return one_way_transit(estimate.at(read_at_ns), sent_at_peer_ns, read_at_ns)[1]
