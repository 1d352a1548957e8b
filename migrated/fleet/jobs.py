"""The state machines of a job and of its steps: two tables, (state, event) -> (state, actions), and what the actions do
to a step.

    planned -> reserved -> migrating -> done
       ^          |            |
       |          v            v
       +---- back-off, elsewhere ----> failed, with the reason, when nothing is left to try

A step is one guest of a job. Who takes which event:

- The job's worker, any daemon that holds the job's worker key, reserves, gives up and notices what is gone.
- The daemon of the step's source begins and ends the attempt. It writes MIGRATING before it starts, so a step that is
  not MIGRATING has no attempt and can be cancelled at once; and it writes what became of it, also after a restart.

Every change is one transaction that compares the step as it was (``migrated.fleet.changes``). So a change that was made
already, by whoever, is made once; a worker whose lease ended changes nothing; and the next worker goes on from what the
keys say, without anything to repair.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, TypeAlias

from migrated.fleet.model import MAX_REASON, MAX_TRIED, JobPhase, JobSpec, JobState, JobStep, StepState

FIRST_BACK_OFF_NS: Final = 5_000_000_000
LONGEST_BACK_OFF_NS: Final = 300_000_000_000


class StepEvent(StrEnum):
    """An event of a step."""

    RESERVE = "reserve"
    """A destination is chosen, and slots and memory are promised in the same transaction."""
    NO_HOST = "no-host"
    """No host can take the guest as things are."""
    BEGIN = "begin"
    """The source's daemon starts the attempt."""
    COMPLETED = "completed"
    """The guest runs on the destination."""
    FAILED = "failed"
    """The attempt is over, and the guest is still on the source."""
    GIVE_UP = "give-up"
    """The same, or nothing was tried, and nothing is to be tried any more."""
    GONE = "gone"
    """The source does not own the guest any more: somebody moved or ended it."""
    RETURNED = "returned"
    """The source owns the guest again: somebody moved it back, or started another one of its name."""
    LOST = "lost"
    """The source was fenced."""
    CANCEL = "cancel"
    """The job is being cancelled. An attempt that runs is cancelled by its daemon, which then says CANCELLED."""
    CANCELLED = "cancelled"
    """The attempt was cancelled."""
    RESUME = "resume"
    """An operator wants it tried again."""


class StepAction(StrEnum):
    """An effect of an event on a step, besides its new state."""

    HOLD_SLOTS = "hold-slots"
    """Promise a slot on both hosts, and the memory on the destination."""
    FREE_SLOTS = "free-slots"
    """Take both promises back."""
    LAND = "land"
    """Free both slots; the memory stays promised until the destination counts the guest."""
    COUNT = "count"
    """This is one more attempt."""
    BACK_OFF = "back-off"
    """Not again before a time that doubles with every attempt, and elsewhere if there is another host."""
    START_ANEW = "start-anew"
    """Forget the attempts so far."""


P, E, A = StepState, StepEvent, StepAction
StepTable: TypeAlias = Mapping[tuple[StepState, StepEvent], tuple[StepState, tuple[StepAction, ...]]]

STEPS: Final[StepTable] = {
    (P.PLANNED, E.RESERVE): (P.RESERVED, (A.HOLD_SLOTS, A.COUNT)),
    (P.PLANNED, E.NO_HOST): (P.PLANNED, (A.COUNT, A.BACK_OFF)),
    (P.PLANNED, E.GIVE_UP): (P.FAILED, ()),
    (P.PLANNED, E.GONE): (P.DONE, ()),
    (P.PLANNED, E.LOST): (P.FAILED, ()),
    (P.PLANNED, E.CANCEL): (P.CANCELLED, ()),
    (P.RESERVED, E.BEGIN): (P.MIGRATING, ()),
    (P.RESERVED, E.FAILED): (P.PLANNED, (A.FREE_SLOTS, A.BACK_OFF)),
    (P.RESERVED, E.GIVE_UP): (P.FAILED, (A.FREE_SLOTS,)),
    (P.RESERVED, E.GONE): (P.DONE, (A.FREE_SLOTS,)),
    (P.RESERVED, E.LOST): (P.FAILED, (A.FREE_SLOTS,)),
    (P.RESERVED, E.CANCEL): (P.CANCELLED, (A.FREE_SLOTS,)),
    (P.MIGRATING, E.COMPLETED): (P.DONE, (A.LAND,)),
    (P.MIGRATING, E.FAILED): (P.PLANNED, (A.FREE_SLOTS, A.BACK_OFF)),
    (P.MIGRATING, E.GIVE_UP): (P.FAILED, (A.FREE_SLOTS,)),
    (P.MIGRATING, E.LOST): (P.FAILED, (A.FREE_SLOTS,)),
    (P.MIGRATING, E.CANCELLED): (P.CANCELLED, (A.FREE_SLOTS,)),
    (P.DONE, E.RETURNED): (P.PLANNED, (A.START_ANEW,)),
    (P.FAILED, E.RESUME): (P.PLANNED, (A.START_ANEW,)),
    (P.CANCELLED, E.RESUME): (P.PLANNED, (A.START_ANEW,)),
}
FINAL: Final = frozenset({P.DONE, P.FAILED, P.CANCELLED})
ACTIVE: Final = frozenset({P.RESERVED, P.MIGRATING})


class JobEvent(StrEnum):
    """An event of a job."""

    ALL_DONE = "all-done"
    """Every step is done."""
    SOME_LEFT = "some-left"
    """Every step is final and not all are done."""
    CANCEL = "cancel"
    RESUME = "resume"


J, G = JobPhase, JobEvent
JOBS: Final[Mapping[tuple[JobPhase, JobEvent], JobPhase]] = {
    (J.RUNNING, G.ALL_DONE): J.DONE,
    (J.RUNNING, G.SOME_LEFT): J.FAILED,
    (J.RUNNING, G.CANCEL): J.CANCELLING,
    (J.CANCELLING, G.CANCEL): J.CANCELLING,
    (J.CANCELLING, G.ALL_DONE): J.DONE,
    (J.CANCELLING, G.SOME_LEFT): J.CANCELLED,
    (J.FAILED, G.RESUME): J.RUNNING,
    (J.CANCELLED, G.RESUME): J.RUNNING,
    (J.RUNNING, G.RESUME): J.RUNNING,
}


class JobError(Exception):
    """A job or a step does not allow what is asked of it; the message is a sentence."""


def step_after(
    step: JobStep, event: StepEvent, now_utc_ns: int, *, reason: str = "", **facts: Any
) -> tuple[JobStep, tuple[StepAction, ...]]:
    """The step after an event, and the actions that the transaction of this change carries out.

    Args:
        now_utc_ns: the time.
        reason: why, for events that end an attempt.
        facts: fields of the step that become known with the event (destination, migration_id, downtime_ns).

    Raises:
        JobError: the state does not allow the event.
    """
    row = STEPS.get((step.state, event))
    if row is None:
        raise JobError(f"The step of {step.guest} is {step.state} and cannot take {event}.")
    state, actions = row
    changes: dict[str, Any] = {**facts, "state": state, "reason": reason[:MAX_REASON]}
    if event is StepEvent.BEGIN:
        changes["began_utc_ns"] = now_utc_ns
    if step.state in ACTIVE and state not in ACTIVE:
        changes["ended_utc_ns"] = now_utc_ns
    if StepAction.COUNT in actions:
        changes["attempt"] = step.attempt + 1
    if StepAction.BACK_OFF in actions:
        changes["not_before_utc_ns"] = now_utc_ns + back_off_ns(changes.get("attempt", step.attempt))
        if step.destination is not None and step.state in ACTIVE:
            changes["tried"] = (*(host for host in step.tried if host != step.destination), step.destination)[
                -MAX_TRIED:
            ]
    if StepAction.START_ANEW in actions:
        changes |= {"attempt": 0, "tried": (), "not_before_utc_ns": 0}
    return step.model_copy(update=changes), actions


def back_off_ns(attempt: int) -> int:
    """Return the wait after the attempt of this number, counted from 1 (ns)."""
    return min(LONGEST_BACK_OFF_NS, FIRST_BACK_OFF_NS << min(16, max(0, attempt - 1)))


def failure(step: JobStep, spec: JobSpec, *, cancelling: bool = False) -> StepEvent:
    """The event of an attempt that failed: whether anything is left to try."""
    return StepEvent.GIVE_UP if cancelling or step.attempt >= spec.max_attempts else StepEvent.FAILED


def job_after(state: JobState, event: JobEvent, now_utc_ns: int, reason: str = "") -> JobState:
    """The job after an event.

    Raises:
        JobError: its phase does not allow the event.
    """
    phase = JOBS.get((state.phase, event))
    if phase is None:
        raise JobError(f"The job is {state.phase} and cannot take {event}.")
    ended = None if phase in (JobPhase.RUNNING, JobPhase.CANCELLING) else now_utc_ns
    changes: dict[str, Any] = {"phase": phase, "reason": reason[:MAX_REASON], "ended_utc_ns": ended}
    if event is JobEvent.RESUME and state.phase is not JobPhase.RUNNING:
        changes["resumed_utc_ns"] = now_utc_ns
    return state.model_copy(update=changes)


def deadline_utc_ns(spec: JobSpec, state: JobState) -> int | None:
    """Return when a job's deadline passes; None without one. A job that was resumed has its whole time again: else one
    that missed its deadline could never be resumed."""
    begun_utc_ns = state.resumed_utc_ns if state.resumed_utc_ns is not None else spec.created_utc_ns
    return begun_utc_ns + spec.deadline_ns if spec.deadline_ns else None


def is_over(state: JobState) -> bool:
    """Whether nobody works on the job any more."""
    return state.phase not in (JobPhase.RUNNING, JobPhase.CANCELLING)
