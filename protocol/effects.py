"""Effects: the steps that an executor asks for, one at a time, and their possible outcomes.

An effect is a small value: the daemons carry it out for real, the explorer and the simulator in a model, and each tells
the executor its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from protocol.handover import Decision
from protocol.messages import NoCause


class Result(StrEnum):
    """The result of an effect."""

    DONE = "done"
    FAILED = "failed"
    """It was not done. For ``LookAtGuest``: the guest's VMM does not answer, or has ended."""
    REFUSED = "refused"
    """The fleet's store answered, and the answer is no (``TransferOwnership``, ``ConfirmOwnership``)."""
    RUNS = "runs"
    """The guest runs, or has run, in this epoch (``LookAtGuest``, ``EndGuest``)."""
    WAITS = "waits"
    """The guest is complete and has not run since it was built (``LookAtGuest``)."""
    STANDS = "stands"
    """The guest does not run now; whether it has run cannot be seen (``LookAtGuest``)."""
    NEVER_RAN = "never-ran"
    """The guest's process is gone, and it never ran in this epoch (``EndGuest``)."""
    UNKNOWN = "unknown"
    """The guest's process does not end, so nothing can be said of it (``EndGuest``)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an effect, with the reason of a failure."""

    result: Result
    reason: str = ""


DONE: Final = Outcome(Result.DONE)


def failed(reason: object) -> Outcome:
    """The outcome of an effect that was not done."""
    return Outcome(Result.FAILED, str(reason))


@dataclass(frozen=True, slots=True)
class Journal:
    """Write a decision so that it survives a kill of the daemon. DONE or FAILED."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class StopGuest:
    """Stop the vCPUs. DONE or FAILED."""


@dataclass(frozen=True, slots=True)
class TakeLock:
    """Take the guest's ownership lock; without effect when it is held. DONE or FAILED."""


@dataclass(frozen=True, slots=True)
class ReleaseLock:
    """Let go of the guest's ownership lock; without effect when it is not held. DONE or FAILED."""


@dataclass(frozen=True, slots=True)
class LookAtGuest:
    """Ask the VMM for the guest's state. RUNS, WAITS, STANDS or FAILED."""


@dataclass(frozen=True, slots=True)
class WriteMark:
    """Write down that the guest runs here in this epoch, before it does. DONE or FAILED."""


@dataclass(frozen=True, slots=True)
class WithdrawMark:
    """Write down that the guest has not run here in this epoch after all. DONE or FAILED."""


@dataclass(frozen=True, slots=True)
class ResumeGuest:
    """Give the guest to its user: run it, or leave it paused if it was paused when the migration began. DONE or
    FAILED."""


@dataclass(frozen=True, slots=True)
class EndGuest:
    """End a guest that could not be resumed, and find out from the marks whether it ran. RUNS, NEVER_RAN or
    UNKNOWN."""


@dataclass(frozen=True, slots=True)
class RetireGuest:
    """End the source's copy: the guest runs on the destination. DONE."""


@dataclass(frozen=True, slots=True)
class DestroyGuest:
    """End the destination's guest: it was discarded. DONE."""


@dataclass(frozen=True, slots=True)
class AskOutcome:
    """The attempt is in doubt: say so, and tell COMMIT over fresh connections until it is answered. DONE."""


@dataclass(frozen=True, slots=True)
class TransferOwnership:
    """Make the destination the guest's owner in the fleet's store, in one step that compares that this host still is
    and is not fenced. DONE; REFUSED when the store said no; FAILED when it did not say yes while COMMIT was still in
    time: then it may have been done, or may be done later."""


@dataclass(frozen=True, slots=True)
class ConfirmOwnership:
    """After a restart of the daemon, make sure that this host owns the guest, is not fenced, and that nothing that an
    earlier daemon asked of the fleet's store can change that any more. DONE, REFUSED; FAILED without an answer."""


@dataclass(frozen=True, slots=True)
class ReclaimOwnership:
    """Begin to write into the fleet's store that this host owns the guest, until it is there. DONE."""


@dataclass(frozen=True, slots=True)
class AskOwnership:
    """Take ASK_AGAIN after a while. DONE."""


@dataclass(frozen=True, slots=True)
class SendCommit:
    """Tell the destination to run the guest. DONE, also when the peer cannot be reached."""


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell the destination that the source keeps its guest. DONE, also when the peer cannot be reached."""

    reason: str


@dataclass(frozen=True, slots=True)
class SendReady:
    """Vote READY. DONE, as every answer: a peer that did not get it asks again."""


@dataclass(frozen=True, slots=True)
class SendNo:
    """Vote NO. DONE."""

    cause: NoCause
    reason: str


@dataclass(frozen=True, slots=True)
class SendRunning:
    """Answer that the guest runs here. DONE."""


@dataclass(frozen=True, slots=True)
class SendDiscarded:
    """Answer that the guest was discarded and will never run here. DONE."""

    reason: str


@dataclass(frozen=True, slots=True)
class SendOpen:
    """Answer that the outcome is still open. DONE."""

    reason: str


OwnershipEffect: TypeAlias = TransferOwnership | ConfirmOwnership | ReclaimOwnership | AskOwnership
"""The effects that concern the store of a fleet; nothing asks for them without one."""
SourceEffect: TypeAlias = (
    StopGuest
    | Journal
    | ReleaseLock
    | TakeLock
    | WriteMark
    | ResumeGuest
    | RetireGuest
    | SendCommit
    | SendAbort
    | AskOutcome
    | OwnershipEffect
)
Answer: TypeAlias = SendRunning | SendDiscarded | SendOpen
"""The destination's answers to a decision of the source."""
DestinationEffect: TypeAlias = (
    Journal
    | TakeLock
    | LookAtGuest
    | WriteMark
    | WithdrawMark
    | ResumeGuest
    | EndGuest
    | DestroyGuest
    | ConfirmOwnership
    | SendReady
    | SendNo
    | Answer
)
