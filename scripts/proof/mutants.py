"""Broken variants of what ships, each of which must be caught, or the proof proves nothing.

A mutant changes rows of a table, overrides one method of an executor or of a budget, or replaces one rule beside them;
the rest is the code that the daemons run. ``MUTANTS`` are the explorer's, ``LATE_MUTANTS`` break what needs a clock and
are the simulator's. One list of all of them is worth more than short modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from protocol.blackout import DestinationBudget, SourceBudget, SourceVerdict
from protocol.effects import Outcome, Result
from protocol.executor import DestinationExecutor, SourceExecutor, Step
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
from protocol.messages import Limits
from scripts.proof.explorer import BOTH_WRITE, CHANGED, NO_COPY, ROLLED_BACK, STUCK, TWO_RUN, UNLOCKED
from scripts.proof.model import LOCK_KEPT, NOT_JOURNALED, HandedOver, Marks, Model

S, E, D, F, A = SourceState, SourceEvent, DestinationState, DestinationEvent, Action


@dataclass(frozen=True)
class Mutant:
    """One change that breaks the rules, and the disaster that an outsider sees when only disasters are watched."""

    broken: str
    model: Model
    disaster: str


REAL: Final = Model()
SHARED: Final = replace(REAL, handed_over=HandedOver(), epochs=(1,))
"""Memory is handed over and not copied. One attempt is enough: what the next one finds is the source's memory."""
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


# Section: executors with one method that is wrong


def _first(steps: tuple[StrEnum, ...], *first: StrEnum) -> tuple[StrEnum, ...]:
    """The same steps, some of them before the rest."""
    return (*(step for step in steps if step in first), *(step for step in steps if step not in first))


class TellsFirst(SourceExecutor):
    """Tells COMMIT before it journals it."""

    def _taken(self, before: SourceState, event: SourceEvent) -> None:
        super()._taken(before, event)
        self._steps = _first(self._steps, Step.RELEASE_LOCK, A.SEND_COMMIT)


class TellsAnUnwrittenCommit(SourceExecutor):
    """Goes on as if COMMIT were in the journal."""

    def _commit_not_journaled(self, why: str) -> None:
        """Nothing: COMMIT is told."""


class KeepsTheLock(SourceExecutor):
    """Lets go of the lock when COMMIT was told."""

    def _expand(self, action: Action) -> tuple[StrEnum, ...]:
        return tuple(reversed(super()._expand(action))) if action is A.SEND_COMMIT else super()._expand(action)


class RunsWithoutTheLock(SourceExecutor):
    """Takes the lock when the guest runs again."""

    def _expand(self, action: Action) -> tuple[StrEnum, ...]:
        steps = super()._expand(action)
        return _first(steps, Step.WRITE_MARK, Step.RUN) if action is A.RESUME_GUEST else steps


class AsksOnce(SourceExecutor):
    """Forgets that it is in doubt."""

    def _follow(self, step: StrEnum, outcome: Outcome) -> None:
        super()._follow(step, outcome)
        self.in_doubt = False


class RunsFirst(DestinationExecutor):
    """Runs the guest before COMMIT is in the journal."""

    def _taken(self, before: DestinationState, event: DestinationEvent) -> None:
        super()._taken(before, event)
        self._steps = _first(self._steps, Step.TAKE_LOCK, Step.LOOK, Step.WRITE_MARK, Step.RUN)


class TellsAnUnwrittenReady(DestinationExecutor):
    """Goes on as if READY or COMMIT were in the journal."""

    def _vote_not_journaled(self, why: str) -> None:
        """Nothing: READY is told, or the guest runs."""


class TellsAnUnwrittenDiscard(DestinationExecutor):
    """Says DISCARDED although the journal does not."""

    def _discard_not_journaled(self) -> None:
        """Nothing: DISCARDED is told."""


class MarksLate(DestinationExecutor):
    """Runs the guest before the mark is written."""

    def _expand(self, action: Action) -> tuple[StrEnum, ...]:
        return _first(super()._expand(action), Step.TAKE_LOCK, Step.LOOK, Step.RUN)


class RunsUnlocked(DestinationExecutor):
    """Runs the guest without its lock."""

    def _expand(self, action: Action) -> tuple[StrEnum, ...]:
        return tuple(step for step in super()._expand(action) if step is not Step.TAKE_LOCK)


class KeepsTheMark(DestinationExecutor):
    """Leaves the mark of a guest that its VMM did not run."""

    def _next(self, *steps: StrEnum) -> None:
        super()._next(*(step for step in steps if step is not Step.WITHDRAW_MARK))


class TrustsAFailure(DestinationExecutor):
    """Takes a resume whose answer is lost for one that did not happen."""

    def _resume(self, step: StrEnum, outcome: Outcome) -> None:
        if step is Step.RUN and outcome.result is Result.FAILED:
            self._next(F.RESUME_FAILED)
        else:
            super()._resume(step, outcome)


class PresumesTheEnd(DestinationExecutor):
    """Takes a guest whose process does not end for one that never ran."""

    def _resume(self, step: StrEnum, outcome: Outcome) -> None:
        unknown = outcome.result is Result.UNKNOWN
        super()._resume(step, Outcome(Result.NEVER_RAN) if unknown else outcome)


class TriesOnce(DestinationExecutor):
    """Does not try again to resume a guest of which nothing could be said."""

    def _taken(self, before: DestinationState, event: DestinationEvent) -> None:
        """Nothing: the answer is that it is open."""


class DiscardsLate(DestinationExecutor):
    """Destroys the guest and answers before it journals that it discarded it."""

    def _taken(self, before: DestinationState, event: DestinationEvent) -> None:
        super()._taken(before, event)
        self._steps = _first(self._steps, A.DESTROY_GUEST, A.SEND_DISCARDED)


# Section: budgets with one method that is wrong


class LateCommit(SourceBudget):
    """Commits whenever READY comes."""

    def judge_ready(self, destination_digest: int, source_digest: int | None, now_ns: int) -> SourceVerdict:
        return SourceVerdict(SourceEvent.READY_IN_TIME, None)


class KeepsNothingBack(DestinationBudget):
    """Votes READY until the limit itself is reached; a source that is right can still say no."""

    def reserve_ns(self, round_trip_ns: int) -> int:
        return 0


class PatientSource(SourceBudget):
    """Keeps nothing back for its own resume, and more."""

    @property
    def deadline_ns(self) -> int | None:
        deadline_ns = super().deadline_ns
        return None if deadline_ns is None else 2 * deadline_ns + self.reserves.own_resume_ns


class HeldTimeCounts(SourceBudget):
    """Counts what the operator held."""

    def hold_ends(self, now_ns: int) -> None:
        """Nothing is taken off."""
        self._holding_since_ns = None


class DeafToTerms(DestinationBudget):
    """Goes by the limits of HELLO."""

    def set_terms(self, limits: Limits, source_resume_ns: int) -> None:
        """Nothing changes."""


class PatientDestination(DestinationBudget):
    """Goes on loading for a while after its limit."""

    def remaining_ns(self, round_trip_ns: int, now_ns: int) -> int | None:
        remaining_ns = super().remaining_ns(round_trip_ns, now_ns)
        return None if remaining_ns is None else remaining_ns + 100_000_000


def _executor(
    source: type[SourceExecutor] | None = None, destination: type[DestinationExecutor] | None = None
) -> Model:
    return replace(
        REAL,
        source_executor=source or REAL.source_executor,
        destination_executor=destination or REAL.destination_executor,
    )


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
        NOT_JOURNALED,
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
        replace(REAL, marks=Marks.NONE, presumes=Result.NEVER_RAN),
        ROLLED_BACK,
    ),
    Mutant(
        "a destination without a VMM presumes that the guest ran",
        replace(REAL, marks=Marks.NONE, presumes=Result.RUNS),
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
    Mutant("the executor tells COMMIT before it journals it", _executor(TellsFirst), TWO_RUN),
    Mutant("the executor goes on when COMMIT cannot be journaled", _executor(TellsAnUnwrittenCommit), TWO_RUN),
    Mutant("the lock is let go of after COMMIT was told", _executor(KeepsTheLock), LOCK_KEPT),
    Mutant("a guest that is taken back runs before its lock is taken", _executor(RunsWithoutTheLock), UNLOCKED),
    Mutant("an executor in doubt forgets that it is", _executor(AsksOnce), STUCK),
    Mutant("the executor runs the guest before it journals COMMIT", _executor(None, RunsFirst), NO_COPY),
    Mutant("READY is told although it could not be journaled", _executor(None, TellsAnUnwrittenReady), NOT_JOURNALED),
    Mutant(
        "the executor runs the guest when COMMIT cannot be journaled", _executor(None, TellsAnUnwrittenReady), NO_COPY
    ),
    Mutant(
        "DISCARDED is told although it could not be journaled", _executor(None, TellsAnUnwrittenDiscard), NOT_JOURNALED
    ),
    Mutant("DISCARDED is told before it is journaled", _executor(None, DiscardsLate), NOT_JOURNALED),
    Mutant(
        "the mark is written after the guest runs",
        replace(_executor(None, MarksLate), marks=Marks.DAEMON),
        ROLLED_BACK,
    ),
    Mutant(
        "the mark of a guest that could not be resumed stands",
        replace(_executor(None, KeepsTheMark), marks=Marks.DAEMON),
        NO_COPY,
    ),
    Mutant("an incoming guest runs without its lock", _executor(None, RunsUnlocked), UNLOCKED),
    Mutant("a resume whose answer is lost counts as failed", _executor(None, TrustsAFailure), NO_COPY),
    Mutant("a guest that does not end counts as one that never ran", _executor(None, PresumesTheEnd), NO_COPY),
    Mutant("a resume that showed nothing is not tried again", _executor(None, TriesOnce), STUCK),
    Mutant(
        "a VMM that may not run yet writes the memory that it was handed",
        replace(SHARED, handed_over=HandedOver(private=False)),
        BOTH_WRITE,
    ),
    Mutant(
        "what such a VMM wrote stays there after an abort",
        replace(SHARED, handed_over=HandedOver(private=False)),
        CHANGED,
    ),
    Mutant(
        "nothing is put back when a VMM that had changed the memory does not run the guest",
        replace(SHARED, handed_over=HandedOver(puts_back=False)),
        CHANGED,
    ),
    Mutant(
        "a VMM that died when it had changed the memory counts as one that never ran",
        replace(SHARED, handed_over=HandedOver(counts=False)),
        CHANGED,
    ),
    Mutant(
        "the destination starts without COMMIT, in memory that was handed over",
        replace(
            SHARED,
            destination={
                **DESTINATION,
                (D.LOADING, F.LOADED): (D.COMMITTED, (A.JOURNAL_COMMIT, A.RESUME_GUEST)),
            },
        ),
        CHANGED,
    ),
)

LATE_MUTANTS: Final = (
    Mutant(
        "a READY commits whenever it comes",
        replace(REAL, source_budget=LateCommit, destination_budget=KeepsNothingBack),
        "I5",
    ),
    Mutant("the source waits beyond its limit", replace(REAL, source_budget=PatientSource), "L3"),
    Mutant("held time counts against the limit", replace(REAL, source_budget=HeldTimeCounts), "L4"),
    Mutant("the destination goes by the limits of HELLO", replace(REAL, destination_budget=DeafToTerms), "L2"),
    Mutant("the destination votes READY after its limit", replace(REAL, destination_budget=PatientDestination), "L2"),
)
"""``disaster`` is the beginning of the rule that the simulator finds broken."""
