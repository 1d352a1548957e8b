"""The rounds as they arrive: a round is in place when both its pages, on every data channel, and its announcement, on
the control channel, are here and agree."""

from __future__ import annotations

from typing import Final

from migrated.destination.pages import RoundReceived
from migrated.destination.view import Tally
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.errors import ErrorCode, RemoteProtocolError

ROUNDS_AHEAD: Final = 64
"""How many rounds may be on their way before the first of them is in place."""


class Rounds:
    """The rounds of one attempt.

    Args:
        digest: the running digest of guest memory here, None when this migration keeps none.
        tally: counts of arrived pages and bytes, for operators.
    """

    def __init__(self, digest: MemoryDigest | None, tally: Tally) -> None:
        self._digest = digest
        self._tally = tally
        self._announced: dict[int, messages.RoundEnd] = {}
        self._arrived: dict[int, RoundReceived] = {}

    @property
    def last(self) -> int:
        """The last round that is in place, 0 before the first."""
        return self._tally.rounds

    @property
    def digest(self) -> int | None:
        """The digest of the pages in place, None when this migration keeps none."""
        return self._digest.value if self._digest is not None else None

    def announced(self, end: messages.RoundEnd) -> messages.RoundDone | None:
        """Take the source's announcement of a round. Returns the acknowledgement once the round is in place, else None.

        Raises:
            RemoteProtocolError: other pages came than were sent, or the round is none that can come now.
        """
        self._check_number(end.round, end.round in self._announced)
        self._announced[end.round] = end
        return self._in_place(end.round)

    def arrived(self, number: int, received: RoundReceived) -> messages.RoundDone | None:
        """Take a round that is complete on every data channel. Returns and raises as ``announced``."""
        self._check_number(number, number in self._arrived)
        if self._digest is not None:
            self._digest.add(received.digest_delta)
        self._arrived[number] = received
        self._tally.received_bytes += received.payload_bytes
        self._tally.normal_pages += received.normal_pages
        self._tally.zero_pages += received.zero_pages
        return self._in_place(number)

    def _check_number(self, number: int, twice: bool) -> None:
        if twice or not self.last < number <= self.last + ROUNDS_AHEAD:
            raise RemoteProtocolError(
                f"round {number} comes twice or out of turn: round {self.last} is in place", ErrorCode.UNEXPECTED
            )

    def _in_place(self, number: int) -> messages.RoundDone | None:
        end, received = self._announced.get(number), self._arrived.get(number)
        if end is None or received is None:
            return None
        if (end.pages, end.zero_pages) != (received.normal_pages, received.zero_pages):
            raise RemoteProtocolError(
                f"round {number} brought {received.normal_pages} pages and {received.zero_pages} zero pages, but "
                f"{end.pages} and {end.zero_pages} were sent",
                ErrorCode.CORRUPT,
            )
        del self._announced[number], self._arrived[number]
        self._tally.rounds = number
        return messages.RoundDone(round=number, bytes=received.payload_bytes, digest=self.digest or 0)
