"""Broken variants of the hand-over, each of which the explorer must catch, or it proves nothing.

A mutant changes rows of a table or one rule beside the tables; the rest is the real protocol.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from protocol.handover import (
    DESTINATION,
    SOURCE,
    Action,
    Decision,
    DestinationEvent,
    DestinationState,
    SourceEvent,
    SourceState,
    destination_state_of,
    source_state_of,
)
from tests.explorer.explorer import NO_COPY, ROLLED_BACK, STUCK, TWO_RUN, Model

S, E, D, F, A = SourceState, SourceEvent, DestinationState, DestinationEvent, Action


@dataclass(frozen=True)
class Mutant:
    """What is broken, and the disaster that an outsider sees when nothing but disasters is watched."""

    broken: str
    model: Model
    disaster: str


REAL: Final = Model()
_TAKE_BACK: Final = (A.RESUME_GUEST, A.SEND_ABORT)


def _source(state: SourceState, event: SourceEvent, after: SourceState, *actions: Action) -> Model:
    return replace(REAL, source={**SOURCE, (state, event): (after, actions)})


def _destination(state: DestinationState, event: DestinationEvent, after: DestinationState, *actions: Action) -> Model:
    return replace(REAL, destination={**DESTINATION, (state, event): (after, actions)})


def _no_with_a_way_back() -> Model:
    limit = (D.DISCARDED, (A.JOURNAL_DISCARD, A.SEND_NO))
    loaded = (D.READY, (A.JOURNAL_READY, A.SEND_READY))
    return replace(REAL, destination={**DESTINATION, (D.LOADING, F.LIMIT): limit, (D.DISCARDED, F.LOADED): loaded})


def _source_forgets_commit(decisions: Iterable[Decision]) -> SourceState:
    return source_state_of(decision for decision in decisions if decision is not Decision.COMMIT)


def _destination_forgets(decision: Decision) -> Model:
    def state_of(decisions: Iterable[Decision]) -> DestinationState:
        return destination_state_of(each for each in decisions if each is not decision)

    return replace(REAL, destination_state_of=state_of)


MUTANTS: Final = (
    Mutant(
        "the source resumes when the last acknowledgement is lost",
        _source(S.COMMITTED, E.LINK_LOST, S.ABORTED, *_TAKE_BACK),
        TWO_RUN,
    ),
    Mutant(
        "the destination starts at the end of the stream, without COMMIT",
        _destination(D.LOADING, F.LOADED, D.COMMITTED, A.JOURNAL_COMMIT, A.RESUME_GUEST),
        TWO_RUN,
    ),
    Mutant(
        "COMMIT is journaled after it is sent",
        _source(S.STOPPED, E.READY_IN_TIME, S.COMMITTED, A.SEND_COMMIT, A.JOURNAL_COMMIT),
        TWO_RUN,
    ),
    Mutant(
        "COMMIT is sent and not journaled", _source(S.STOPPED, E.READY_IN_TIME, S.COMMITTED, A.SEND_COMMIT), TWO_RUN
    ),
    Mutant(
        "COMMIT is journaled, and lost with the daemon", replace(REAL, source_state_of=_source_forgets_commit), TWO_RUN
    ),
    Mutant("a NO can be withdrawn", _no_with_a_way_back(), TWO_RUN),
    Mutant("the epoch is used again for the retry", replace(REAL, epochs=(1, 1)), TWO_RUN),
    Mutant(
        "the source's timer resumes after COMMIT", _source(S.COMMITTED, E.DEADLINE, S.ABORTED, *_TAKE_BACK), TWO_RUN
    ),
    Mutant("a restarted destination forgets its NO", _destination_forgets(Decision.DISCARD), TWO_RUN),
    Mutant(
        "messages of an older epoch are accepted", replace(REAL, check_epoch=lambda _current, _received: True), TWO_RUN
    ),
    Mutant("a cancel is accepted after COMMIT", _source(S.COMMITTED, E.CANCEL, S.ABORTED, *_TAKE_BACK), TWO_RUN),
    Mutant("a fault after COMMIT takes the guest back", _source(S.COMMITTED, E.FAULT, S.ABORTED, *_TAKE_BACK), TWO_RUN),
    Mutant(
        "a restarted source takes its guest back after COMMIT",
        _source(S.COMMITTED, E.RESTART, S.ABORTED, *_TAKE_BACK),
        TWO_RUN,
    ),
    Mutant(
        "the destination presumes COMMIT when nobody answers",
        _destination(D.READY, F.READY_TIMEOUT, D.COMMITTED, A.JOURNAL_COMMIT, A.RESUME_GUEST),
        TWO_RUN,
    ),
    Mutant(
        "a restarted destination runs what was READY",
        _destination(D.READY, F.RESTART, D.COMMITTED, A.JOURNAL_COMMIT, A.RESUME_GUEST),
        TWO_RUN,
    ),
    Mutant(
        "DISCARDED is told before it is journaled",
        _destination(D.READY, F.FAULT, D.DISCARDED, A.SEND_DISCARDED, A.JOURNAL_DISCARD, A.DESTROY_GUEST),
        TWO_RUN,
    ),
    Mutant(
        "DISCARDED is told and not journaled", _destination(D.READY, F.FAULT, D.DISCARDED, A.SEND_DISCARDED), TWO_RUN
    ),
    Mutant(
        "a failed resume is told before it is journaled",
        _destination(D.COMMITTED, F.RESUME_FAILED, D.DISCARDED, A.SEND_DISCARDED, A.JOURNAL_DISCARD, A.DESTROY_GUEST),
        TWO_RUN,
    ),
    Mutant(
        "the destination runs the guest before it journals COMMIT",
        _destination(D.READY, F.COMMIT, D.COMMITTED, A.RESUME_GUEST, A.JOURNAL_COMMIT),
        NO_COPY,
    ),
    Mutant(
        "the source retires its copy when it sends COMMIT",
        _source(S.STOPPED, E.READY_IN_TIME, S.COMMITTED, A.JOURNAL_COMMIT, A.SEND_COMMIT, A.RETIRE_GUEST),
        NO_COPY,
    ),
    Mutant(
        "a READY that comes too late commits",
        _source(S.ABORTED, E.READY_LATE, S.COMMITTED, A.JOURNAL_COMMIT, A.SEND_COMMIT),
        TWO_RUN,
    ),
    Mutant(
        "a destination without a VMM presumes that the guest never ran",
        replace(REAL, marks=False, presumes=F.RESUME_FAILED),
        ROLLED_BACK,
    ),
    Mutant(
        "a destination without a VMM presumes that the guest ran",
        replace(REAL, marks=False, presumes=F.RESUMED),
        NO_COPY,
    ),
    Mutant("a restarted source in doubt does not ask", _source(S.COMMITTED, E.RESTART, S.COMMITTED), STUCK),
    Mutant(
        "a source that lost the link after COMMIT does not ask",
        replace(
            REAL,
            source={
                **SOURCE,
                (S.COMMITTED, E.LINK_LOST): (S.COMMITTED, ()),
                (S.COMMITTED, E.DEADLINE): (S.COMMITTED, ()),
            },
        ),
        STUCK,
    ),
    Mutant("a READY that nobody answers waits for ever", _destination(D.READY, F.READY_TIMEOUT, D.READY), STUCK),
    Mutant(
        "the source waits for ever for READY",
        replace(
            REAL,
            source={**SOURCE, (S.STOPPED, E.LINK_LOST): (S.STOPPED, ()), (S.STOPPED, E.DEADLINE): (S.STOPPED, ())},
        ),
        STUCK,
    ),
    Mutant("a discarded destination does not answer", _destination(D.DISCARDED, F.COMMIT, D.DISCARDED), STUCK),
    Mutant("a running destination does not answer", _destination(D.RUNNING, F.COMMIT, D.RUNNING), STUCK),
    Mutant("a restarted destination forgets COMMIT", _destination_forgets(Decision.COMMIT), NO_COPY),
    Mutant(
        "COMMIT is sent although it could not be journaled",
        _source(S.COMMITTED, E.JOURNAL_FAILED, S.COMMITTED, A.SEND_COMMIT),
        TWO_RUN,
    ),
    Mutant(
        "the destination runs although COMMIT could not be journaled",
        _destination(D.COMMITTED, F.JOURNAL_FAILED, D.COMMITTED, A.RESUME_GUEST),
        NO_COPY,
    ),
)
