"""The two state machines that decide who may run the guest, as tables.

    source       RUNNING -> STOPPED -> ABORTED            (the guest is the source's again)
                               \\-> COMMITTED -> RETIRED   (journaled, then sent; in doubt until answered)
    destination  LOADING -> READY -> COMMITTED -> RUNNING
                     \\         \\-> DISCARDED
                      \\-> DISCARDED                      (its own NO: for good)

A machine takes one event at a time and returns the actions to carry out, in that order: a decision that must be
journaled before it is sent has its journal action first. The machines hold no clock, no socket and no file, so that a
test can explore them exhaustively and the daemons cannot decide anything elsewhere. One pair of machines serves one
epoch of one guest; the daemons drop messages of other epochs before they reach it, with ``check_epoch``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, Generic, TypeAlias, TypeVar

from protocol.errors import ErrorCode, RemoteProtocolError


class SourceState(StrEnum):
    """The states of the source's side."""

    RUNNING = "running"
    """The guest is the source's; it was not stopped for this epoch."""
    STOPPED = "stopped"
    """The guest is stopped here and nothing is decided."""
    COMMITTED = "committed"
    """COMMIT is journaled. The guest may run on the destination; in doubt until the destination answers."""
    ABORTED = "aborted"
    """The guest is the source's for good in this epoch."""
    RETIRED = "retired"
    """The guest runs on the destination; the copy here is dead."""
    HELD = "held"
    """In a fleet: COMMIT was not sent, and the store says that this host does not own the guest, or does not answer
    after a restart. The guest stays stopped here until the store or an operator says that it is this host's."""


class DestinationState(StrEnum):
    """States of the destination's side."""

    LOADING = "loading"
    """State arrives. The destination may vote NO at any moment."""
    READY = "ready"
    """Voted READY: it can run the guest, only the source decides."""
    COMMITTED = "committed"
    """COMMIT is journaled here; the guest is about to run."""
    RUNNING = "running"
    """The guest runs here."""
    DISCARDED = "discarded"
    """This epoch will never run here: journaled, for good."""


class SourceEvent(StrEnum):
    """Events on the source's side."""

    STOP = "stop"
    """The switchover begins."""
    READY_IN_TIME = "ready-in-time"
    """READY arrived and the rest of the budget covers what is left (budget.may_commit)."""
    READY_LATE = "ready-late"
    """READY arrived too late, or with another digest."""
    NO = "no"
    """The destination voted NO."""
    DEADLINE = "deadline"
    """The source's own deadline passed."""
    LINK_LOST = "link-lost"
    """The control channel is gone."""
    FAULT = "fault"
    """Something failed here."""
    CANCEL = "cancel"
    """The operator cancelled."""
    RUNNING = "running"
    """The destination says that it runs the guest."""
    DISCARDED = "discarded"
    """The destination proves that it discarded the guest."""
    RESOLVE_RUN_HERE = "resolve-run-here"
    """The operator vouches that the destination never runs it."""
    RESOLVE_DISCARD = "resolve-discard"
    """The operator vouches that the destination runs it."""
    RESTART = "restart"
    """The daemon came up again and found this state in its journal."""
    JOURNAL_FAILED = "journal-failed"
    """COMMIT could not be journaled, so it was not sent. Only in place of a journal action that succeeds."""
    OWNERSHIP_UNKNOWN = "ownership-unknown"
    """In a fleet: its store did not answer in time who owns the guest."""
    OWNERSHIP_LOST = "ownership-lost"
    """In a fleet: its store answered that another host owns the guest, or that this one is fenced."""
    ASK_AGAIN = "ask-again"
    """In a fleet: it is time to ask its store once more."""


class DestinationEvent(StrEnum):
    """Events on the destination's side."""

    LOADED = "loaded"
    """Every page and device is in place, the digest is equal, the limit is kept."""
    LIMIT = "limit"
    """The deadline passed."""
    FAULT = "fault"
    """Something failed here: a load, the digest, the VMM."""
    LINK_LOST = "link-lost"
    """The control channel is gone."""
    CANCEL = "cancel"
    """The operator of the destination gives up."""
    COMMIT = "commit"
    """The source's permission, on the session's channel or told again on a fresh connection."""
    ABORT = "abort"
    """The source keeps its guest."""
    READY_TIMEOUT = "ready-timeout"
    """No decision came after READY."""
    RESUMED = "resumed"
    """The vCPUs run."""
    RESUME_FAILED = "resume-failed"
    """The guest never ran here and cannot."""
    RESTART = "restart"
    """The daemon came up again and found this state in its journal."""
    JOURNAL_FAILED = "journal-failed"
    """READY or COMMIT could not be journaled, so what follows it was not done. Only in place of a journal action that
    succeeds."""


class Action(StrEnum):
    """An action that a machine asks its daemon to carry out."""

    JOURNAL_COMMIT = "journal-commit"
    JOURNAL_ABORT = "journal-abort"
    JOURNAL_RETIRED = "journal-retired"
    JOURNAL_READY = "journal-ready"
    JOURNAL_RUNNING = "journal-running"
    JOURNAL_DISCARD = "journal-discard"
    SEND_COMMIT = "send-commit"
    SEND_ABORT = "send-abort"
    SEND_READY = "send-ready"
    SEND_NO = "send-no"
    SEND_RUNNING = "send-running"
    SEND_DISCARDED = "send-discarded"
    SEND_OPEN = "send-open"
    """Answer that the outcome is still open."""
    STOP_GUEST = "stop-guest"
    RESUME_GUEST = "resume-guest"
    RETIRE_GUEST = "retire-guest"
    DESTROY_GUEST = "destroy-guest"
    ASK_OUTCOME = "ask-outcome"
    """Tell the decision again over a fresh connection until it is answered."""
    TRANSFER_OWNERSHIP = "transfer-ownership"
    """In a fleet: make the destination the owner, if this host still is."""
    RECLAIM_OWNERSHIP = "reclaim-ownership"
    """In a fleet: write down that the guest is this host's, as soon as the store answers."""
    ASK_OWNERSHIP = "ask-ownership"
    """In a fleet: ask the store again later who owns the guest."""
    REFUSE = "refuse"
    """The request comes too late: answer with the decision that stands."""


class IllegalEventError(RemoteProtocolError):
    """An event that the state does not allow: the peer broke the hand-over. The state did not change."""

    def __init__(self, side: str, state: StrEnum, event: StrEnum) -> None:
        super().__init__(f"the {side} is {state} and cannot take {event}", ErrorCode.UNEXPECTED)
        self.state = state
        self.event = event


S, E, D, F, A = SourceState, SourceEvent, DestinationState, DestinationEvent, Action

SourceTable: TypeAlias = Mapping[tuple[SourceState, SourceEvent], tuple[SourceState, tuple[Action, ...]]]
DestinationTable: TypeAlias = Mapping[
    tuple[DestinationState, DestinationEvent], tuple[DestinationState, tuple[Action, ...]]
]

_TAKE_BACK: Final = (A.RESUME_GUEST, A.SEND_ABORT)
"""The guest runs first: nothing the peer may hear can change that it is the source's."""
_PROVED: Final = (A.JOURNAL_ABORT, A.RESUME_GUEST)

SOURCE: Final[SourceTable] = {
    (S.RUNNING, E.STOP): (S.STOPPED, (A.STOP_GUEST,)),
    (S.RUNNING, E.NO): (S.ABORTED, ()),
    (S.RUNNING, E.LINK_LOST): (S.ABORTED, (A.SEND_ABORT,)),
    (S.RUNNING, E.FAULT): (S.ABORTED, (A.SEND_ABORT,)),
    (S.RUNNING, E.CANCEL): (S.ABORTED, (A.SEND_ABORT,)),
    (S.STOPPED, E.READY_IN_TIME): (S.COMMITTED, (A.JOURNAL_COMMIT, A.SEND_COMMIT)),
    (S.STOPPED, E.READY_LATE): (S.ABORTED, _TAKE_BACK),
    (S.STOPPED, E.NO): (S.ABORTED, _TAKE_BACK),
    (S.STOPPED, E.DEADLINE): (S.ABORTED, _TAKE_BACK),
    (S.STOPPED, E.LINK_LOST): (S.ABORTED, _TAKE_BACK),
    (S.STOPPED, E.FAULT): (S.ABORTED, _TAKE_BACK),
    (S.STOPPED, E.CANCEL): (S.ABORTED, _TAKE_BACK),
    (S.STOPPED, E.DISCARDED): (S.ABORTED, _TAKE_BACK),
    (S.STOPPED, E.RESTART): (S.ABORTED, _TAKE_BACK),
    (S.COMMITTED, E.RUNNING): (S.RETIRED, (A.JOURNAL_RETIRED, A.RETIRE_GUEST)),
    (S.COMMITTED, E.DISCARDED): (S.ABORTED, _PROVED),
    (S.COMMITTED, E.READY_IN_TIME): (S.COMMITTED, (A.SEND_COMMIT,)),
    (S.COMMITTED, E.READY_LATE): (S.COMMITTED, (A.SEND_COMMIT,)),
    (S.COMMITTED, E.LINK_LOST): (S.COMMITTED, (A.ASK_OUTCOME,)),
    (S.COMMITTED, E.DEADLINE): (S.COMMITTED, (A.ASK_OUTCOME,)),
    (S.COMMITTED, E.FAULT): (S.COMMITTED, (A.ASK_OUTCOME,)),
    (S.COMMITTED, E.CANCEL): (S.COMMITTED, (A.REFUSE,)),
    (S.COMMITTED, E.RESTART): (S.COMMITTED, (A.ASK_OUTCOME,)),
    (S.COMMITTED, E.JOURNAL_FAILED): (S.ABORTED, _TAKE_BACK),
    (S.COMMITTED, E.RESOLVE_RUN_HERE): (S.ABORTED, _PROVED),
    (S.COMMITTED, E.RESOLVE_DISCARD): (S.RETIRED, (A.JOURNAL_RETIRED, A.RETIRE_GUEST)),
    (S.ABORTED, E.READY_IN_TIME): (S.ABORTED, (A.SEND_ABORT,)),
    (S.ABORTED, E.READY_LATE): (S.ABORTED, (A.SEND_ABORT,)),
    (S.ABORTED, E.NO): (S.ABORTED, ()),
    (S.ABORTED, E.DEADLINE): (S.ABORTED, ()),
    (S.ABORTED, E.LINK_LOST): (S.ABORTED, ()),
    (S.ABORTED, E.FAULT): (S.ABORTED, ()),
    (S.ABORTED, E.CANCEL): (S.ABORTED, ()),
    (S.ABORTED, E.DISCARDED): (S.ABORTED, ()),
    (S.ABORTED, E.RESTART): (S.ABORTED, _TAKE_BACK),
    (S.RETIRED, E.READY_IN_TIME): (S.RETIRED, ()),
    (S.RETIRED, E.READY_LATE): (S.RETIRED, ()),
    (S.RETIRED, E.RUNNING): (S.RETIRED, ()),
    (S.RETIRED, E.LINK_LOST): (S.RETIRED, ()),
    (S.RETIRED, E.DEADLINE): (S.RETIRED, ()),
    (S.RETIRED, E.FAULT): (S.RETIRED, ()),
    (S.RETIRED, E.CANCEL): (S.RETIRED, (A.REFUSE,)),
    (S.RETIRED, E.RESTART): (S.RETIRED, (A.RETIRE_GUEST,)),
}

_TAKE_BACK_AND_RECLAIM: Final = (*_TAKE_BACK, A.RECLAIM_OWNERSHIP)
_PROVED_AND_RECLAIM: Final = (*_PROVED, A.RECLAIM_OWNERSHIP)
"""The guest runs first: nobody else may run it, whatever the store says by then."""

FLEET_ROWS: Final[SourceTable] = {
    (S.STOPPED, E.READY_IN_TIME): (S.COMMITTED, (A.TRANSFER_OWNERSHIP, A.JOURNAL_COMMIT, A.SEND_COMMIT)),
    (S.COMMITTED, E.OWNERSHIP_UNKNOWN): (S.ABORTED, _TAKE_BACK_AND_RECLAIM),
    (S.COMMITTED, E.OWNERSHIP_LOST): (S.HELD, (A.SEND_ABORT,)),
    (S.COMMITTED, E.JOURNAL_FAILED): (S.ABORTED, _TAKE_BACK_AND_RECLAIM),
    (S.COMMITTED, E.DISCARDED): (S.ABORTED, _PROVED_AND_RECLAIM),
    (S.COMMITTED, E.RESOLVE_RUN_HERE): (S.ABORTED, _PROVED_AND_RECLAIM),
    (S.ABORTED, E.OWNERSHIP_UNKNOWN): (S.HELD, (A.SEND_ABORT, A.ASK_OWNERSHIP)),
    (S.ABORTED, E.OWNERSHIP_LOST): (S.HELD, (A.SEND_ABORT,)),
    (S.HELD, E.ASK_AGAIN): (S.ABORTED, (A.RESUME_GUEST,)),
    (S.HELD, E.READY_IN_TIME): (S.HELD, (A.SEND_ABORT,)),
    (S.HELD, E.READY_LATE): (S.HELD, (A.SEND_ABORT,)),
    (S.HELD, E.NO): (S.HELD, ()),
    (S.HELD, E.DEADLINE): (S.HELD, ()),
    (S.HELD, E.LINK_LOST): (S.HELD, ()),
    (S.HELD, E.FAULT): (S.HELD, ()),
    (S.HELD, E.CANCEL): (S.HELD, (A.REFUSE,)),
    (S.HELD, E.DISCARDED): (S.HELD, ()),
    (S.HELD, E.RESOLVE_RUN_HERE): (S.ABORTED, _PROVED_AND_RECLAIM),
    (S.HELD, E.RESOLVE_DISCARD): (S.RETIRED, (A.JOURNAL_RETIRED, A.RETIRE_GUEST)),
    (S.RETIRED, E.NO): (S.RETIRED, ()),
    (S.RETIRED, E.DISCARDED): (S.RETIRED, ()),
}
"""What is different in a fleet: the destination becomes the owner in the fleet's store before COMMIT is journaled."""
FLEET_SOURCE: Final[SourceTable] = {**SOURCE, **FLEET_ROWS}
"""The source's rules in a fleet."""

_DISCARD: Final = (A.JOURNAL_DISCARD, A.DESTROY_GUEST)
_VOTE_NO: Final = (A.JOURNAL_DISCARD, A.SEND_NO, A.DESTROY_GUEST)
_ANSWER_DISCARDED: Final = (A.JOURNAL_DISCARD, A.DESTROY_GUEST, A.SEND_DISCARDED)
_PROVE: Final = (A.JOURNAL_DISCARD, A.SEND_DISCARDED)
"""Journaled again, which changes nothing, because the first time may have failed: the answer is a proof."""

DESTINATION: Final[DestinationTable] = {
    (D.LOADING, F.LOADED): (D.READY, (A.JOURNAL_READY, A.SEND_READY)),
    (D.LOADING, F.LIMIT): (D.DISCARDED, _VOTE_NO),
    (D.LOADING, F.FAULT): (D.DISCARDED, _VOTE_NO),
    (D.LOADING, F.CANCEL): (D.DISCARDED, _VOTE_NO),
    (D.LOADING, F.LINK_LOST): (D.DISCARDED, _DISCARD),
    (D.LOADING, F.ABORT): (D.DISCARDED, _ANSWER_DISCARDED),
    (D.LOADING, F.RESTART): (D.DISCARDED, _DISCARD),
    (D.READY, F.COMMIT): (D.COMMITTED, (A.JOURNAL_COMMIT, A.RESUME_GUEST)),
    (D.READY, F.ABORT): (D.DISCARDED, _ANSWER_DISCARDED),
    (D.READY, F.READY_TIMEOUT): (D.DISCARDED, _DISCARD),
    (D.READY, F.FAULT): (D.DISCARDED, _ANSWER_DISCARDED),
    (D.READY, F.JOURNAL_FAILED): (D.DISCARDED, (A.SEND_NO, A.DESTROY_GUEST)),
    (D.READY, F.LIMIT): (D.READY, ()),
    (D.READY, F.LINK_LOST): (D.READY, ()),
    (D.READY, F.CANCEL): (D.READY, (A.REFUSE,)),
    (D.READY, F.RESTART): (D.READY, ()),
    (D.COMMITTED, F.RESUMED): (D.RUNNING, (A.JOURNAL_RUNNING, A.SEND_RUNNING)),
    (D.COMMITTED, F.RESUME_FAILED): (D.DISCARDED, (A.DESTROY_GUEST, A.JOURNAL_DISCARD, A.SEND_DISCARDED)),
    (D.COMMITTED, F.JOURNAL_FAILED): (D.READY, (A.SEND_OPEN,)),
    (D.COMMITTED, F.COMMIT): (D.COMMITTED, (A.SEND_OPEN,)),
    (D.COMMITTED, F.LINK_LOST): (D.COMMITTED, ()),
    (D.COMMITTED, F.READY_TIMEOUT): (D.COMMITTED, ()),
    (D.COMMITTED, F.LIMIT): (D.COMMITTED, ()),
    (D.COMMITTED, F.FAULT): (D.COMMITTED, ()),
    (D.COMMITTED, F.CANCEL): (D.COMMITTED, (A.REFUSE,)),
    (D.COMMITTED, F.RESTART): (D.COMMITTED, (A.RESUME_GUEST,)),
    (D.RUNNING, F.COMMIT): (D.RUNNING, (A.SEND_RUNNING,)),
    (D.RUNNING, F.LINK_LOST): (D.RUNNING, ()),
    (D.RUNNING, F.READY_TIMEOUT): (D.RUNNING, ()),
    (D.RUNNING, F.LIMIT): (D.RUNNING, ()),
    (D.RUNNING, F.FAULT): (D.RUNNING, ()),
    (D.RUNNING, F.CANCEL): (D.RUNNING, (A.REFUSE,)),
    (D.RUNNING, F.RESTART): (D.RUNNING, ()),
    (D.DISCARDED, F.COMMIT): (D.DISCARDED, _PROVE),
    (D.DISCARDED, F.ABORT): (D.DISCARDED, _PROVE),
    (D.DISCARDED, F.LOADED): (D.DISCARDED, ()),
    (D.DISCARDED, F.LIMIT): (D.DISCARDED, ()),
    (D.DISCARDED, F.FAULT): (D.DISCARDED, ()),
    (D.DISCARDED, F.LINK_LOST): (D.DISCARDED, ()),
    (D.DISCARDED, F.READY_TIMEOUT): (D.DISCARDED, ()),
    (D.DISCARDED, F.CANCEL): (D.DISCARDED, ()),
    (D.DISCARDED, F.RESTART): (D.DISCARDED, (A.DESTROY_GUEST,)),
}

StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT", bound=StrEnum)


class Machine(Generic[StateT, EventT]):
    """One side of one epoch.

    Args:
        side: "source" or "destination", for messages.
        table: next state and actions for each event in each state.
        state: first state; after a restart, the one that ``source_state_of`` or ``destination_state_of`` read from
            the journal.
    """

    def __init__(
        self, side: str, table: Mapping[tuple[StateT, EventT], tuple[StateT, tuple[Action, ...]]], state: StateT
    ) -> None:
        self.side = side
        self.state = state
        self._table = table

    def take(self, event: EventT) -> tuple[Action, ...]:
        """Advance by one event and return the actions to carry out, in order.

        Raises:
            IllegalEventError: the state does not allow the event; nothing changed.
        """
        row = self._table.get((self.state, event))
        if row is None:
            raise IllegalEventError(self.side, self.state, event)
        self.state, actions = row
        return actions


class Decision(StrEnum):
    """An entry of the journal for one epoch on one side, in the order in which they can come."""

    BEGIN = "begin"
    READY = "ready"
    COMMIT = "commit"
    RUNNING = "running"
    RETIRED = "retired"
    ABORT = "abort"
    DISCARD = "discard"


def source_state_of(decisions: Iterable[Decision]) -> SourceState:
    """The source's state after a restart: without a journaled COMMIT the guest is still its own."""
    state = SourceState.STOPPED
    for decision in decisions:
        if decision is Decision.COMMIT and state is SourceState.STOPPED:
            state = SourceState.COMMITTED
        elif decision is Decision.ABORT:
            state = SourceState.ABORTED
        elif decision is Decision.RETIRED:
            state = SourceState.RETIRED
    return state


def destination_state_of(decisions: Iterable[Decision]) -> DestinationState:
    """The destination's state after a restart. A journaled DISCARD is final, whatever follows it."""
    state = DestinationState.LOADING
    for decision in decisions:
        if decision is Decision.DISCARD:
            return DestinationState.DISCARDED
        if decision is Decision.READY:
            state = DestinationState.READY
        elif decision is Decision.COMMIT:
            state = DestinationState.COMMITTED
        elif decision is Decision.RUNNING:
            state = DestinationState.RUNNING
    return state


def check_epoch(current: int, received: int) -> bool:
    """Return whether a hand-over message counts: True for the current epoch, False for an older one, which changes
    nothing.

    Raises:
        RemoteProtocolError: it is of an epoch that does not exist yet.
    """
    if received > current:
        raise RemoteProtocolError(
            f"a hand-over message names epoch {received}, but this is epoch {current}", ErrorCode.UNEXPECTED
        )
    return received == current
