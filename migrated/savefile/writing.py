"""A save under way as an operator sees it: what has been written, and the step that it is at."""

from __future__ import annotations

from migrated.record.terms import Phase
from migrated.savefile.desk import Desk
from migrated.source.ledger import OutgoingLedger
from migrated.source.phases import Beginning, Figures, figures_of
from migrated.source.precopy import Precopy


class Silent:
    """Nobody reports anything: a file does not answer."""

    acknowledged = None


class Writing(Beginning):
    """The phase of a save, from its begin to its end.

    Args:
        ledger: the figures so far.

    Attributes:
        desk: what it writes with, once that is there.
        precopy: the rounds, once they run.
        name: the step.
    """

    def __init__(self, ledger: OutgoingLedger) -> None:
        self.desk: Desk | None = None
        self.precopy: Precopy | None = None
        self.name: Phase = Phase.SYNC
        self._ledger = ledger
        self._last = Figures()
        self._written_bytes = 0

    @property
    def label(self) -> str:
        return self.name

    def figures(self) -> Figures:
        if self.precopy is not None:
            self._last = figures_of(self._ledger, self.precopy, self.sent_bytes())
        return self._last

    def sent_bytes(self) -> int:
        if self.desk is not None:
            self._written_bytes = self.desk.writer.written_bytes
        return self._written_bytes

    def pace(self, bytes_per_s: int) -> None:
        """Cap the rate; 0 lifts the cap."""
        if self.desk is not None:
            self.desk.transfer.sender.pace(bytes_per_s)

    def end(self) -> None:
        """Keep the figures and let go of what they came from."""
        self.figures()
        self.sent_bytes()
        self.desk = self.precopy = None
