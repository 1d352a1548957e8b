"""The destination's answers about attempts whose hand-over is no longer in memory, and the effect of a newer epoch on
an older attempt.

    HELLO of a newer epoch     the source took its guest back from every older one
    OUTCOME?                   who has the hand-over in memory answers; without one the journal does
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from protocol.effects import Answer, SendDiscarded, SendOpen, SendRunning
from protocol.executor import DESTINATION_FINAL
from protocol.handover import Decision, DestinationEvent, DestinationState, destination_state_of

HandOver = TypeVar("HandOver")

_STILL_THE_SOURCES: Final = frozenset({DestinationState.LOADING, DestinationState.READY})


def newer_epoch(state: DestinationState) -> DestinationEvent | None:
    """Return the event that ends an older attempt when the source offers the same guest with a newer epoch.

    The source offers a guest only when it is its own, so a newer epoch is the ABORT of an older one whose message was
    lost. None where COMMIT is journaled or the end is decided: a newer epoch changes nothing there.
    """
    return DestinationEvent.ABORT if state in _STILL_THE_SOURCES else None


def who_answers(running: HandOver | None, taken_up: HandOver | None, ended: HandOver | None) -> HandOver | None:
    """Choose the hand-over that takes a decision which the source sends over a fresh connection; None: the journal
    answers.

    A hand-over in memory knows more than the journal, because a write to the journal may have failed.

    Args:
        running: the hand-over of an attempt that is under way.
        taken_up: the hand-over that this daemon continued from its journal after a restart.
        ended: the hand-over of an attempt that ended since the daemon started.
    """
    return next((one for one in (running, taken_up, ended) if one is not None), None)


def journaled_answer(decision: DestinationEvent, journal: Sequence[Decision] | None) -> Answer:
    """Return the answer to the source's decision that follows from the journal alone.

    Args:
        decision: COMMIT or ABORT.
        journal: what was decided in this attempt, None when the journal does not know it.
    """
    if journal is None:
        if decision is DestinationEvent.ABORT:
            return SendDiscarded("the destination has nothing of this migration")
        return SendOpen("the destination's journal does not know this migration: resolve it by hand")
    match destination_state_of(journal):
        case DestinationState.RUNNING:
            return SendRunning()
        case DestinationState.DISCARDED:
            return SendDiscarded("the destination discarded the guest")
        case _:
            return SendOpen("the outcome is still open")


def may_close(journal: Sequence[Decision]) -> bool:
    """Return whether an incoming attempt may be closed in the journal: only when its end is journaled. An end that
    could not be written (a full disk) is written by the daemon that takes the attempt up again."""
    return destination_state_of(journal) in DESTINATION_FINAL
