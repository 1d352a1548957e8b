"""The executors around the hand-over tables: an executor takes one event, then gives its effects one at a time.

    take(event) -> effect -> carried out -> done(outcome) -> effect -> done(outcome) -> ... -> effect is None

The tables in ``protocol.handover`` say which actions an event asks for, in which order. This module adds everything
between an action and its effects: the steps that an action consists of (the ownership lock is let go of before COMMIT
is told, and taken before a guest runs; the mark "ran in epoch N" is written before it runs; in a fleet, a restarted
daemon asks the store who owns a guest before it runs it), and the consequences of a step that fails (a decision that is
not journaled is not sent; the result of a resume is the next event). The executor
does nothing itself: the daemons carry effects out for real, the explorer and the simulator in a model. So the proofs
drive the code that ships.

The module is longer than others because both sides stand in it: the steps of each rest on those of the other, and
whoever checks that a guest never runs twice must read both together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Generic, NamedTuple, TypeVar

from protocol.effects import (
    AskOutcome,
    AskOwnership,
    ConfirmOwnership,
    DestinationEffect,
    DestroyGuest,
    EndGuest,
    Journal,
    LookAtGuest,
    Outcome,
    ReclaimOwnership,
    ReleaseLock,
    Result,
    ResumeGuest,
    RetireGuest,
    SendAbort,
    SendCommit,
    SendDiscarded,
    SendNo,
    SendOpen,
    SendReady,
    SendRunning,
    SourceEffect,
    StopGuest,
    TakeLock,
    TransferOwnership,
    WithdrawMark,
    WriteMark,
)
from protocol.handover import (
    DESTINATION,
    FLEET_SOURCE,
    SOURCE,
    Action,
    Decision,
    DestinationEvent,
    DestinationState,
    DestinationTable,
    Machine,
    SourceEvent,
    SourceState,
    SourceTable,
)
from protocol.messages import NoCause


class Step(StrEnum):
    """Steps that no table names: parts of an action."""

    CONFIRM_OWNERSHIP = "confirm-ownership"
    TAKE_LOCK = "take-lock"
    RELEASE_LOCK = "release-lock"
    LOOK = "look-at-guest"
    LOOK_AGAIN = "look-again"
    WRITE_MARK = "write-mark"
    WITHDRAW_MARK = "withdraw-mark"
    RUN = "run"
    END_GUEST = "end-guest"


StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT", bound=StrEnum)
EffectT = TypeVar("EffectT")

JOURNALED: Final = {action: Decision(action.removeprefix("journal-")) for action in Action if "journal-" in action}
RESUME_STEPS: Final = frozenset({Step.CONFIRM_OWNERSHIP, Step.TAKE_LOCK, Step.LOOK, Step.WRITE_MARK, Step.RUN})


class Memory(NamedTuple, Generic[StateT]):
    """The complete state of an executor without its sentences: with it a proof can continue from any point."""

    state: StateT
    steps: tuple[StrEnum, ...]
    in_doubt: bool
    unsure: bool
    restarted: bool = False


class Executor(ABC, Generic[StateT, EventT, EffectT]):
    """One side of one epoch.

    Args:
        machine: the side's table and the state in which it begins.
        final: states in which it is decided who runs the guest.
        steps: the steps of each action; an action that is not listed is a single step.
        locks: whether guests have ownership locks here.
        marks: whether this resume makes the guest run, so that a mark is written; False for a guest that stays paused.
        fleet: whether guests have owners in the store of a fleet.
        restart: the event of a restarted daemon.

    Attributes:
        reason: why the attempt ended, None while it has not.
        in_doubt: COMMIT was sent and not answered; the source asks until it is.
    """

    def __init__(
        self,
        machine: Machine[StateT, EventT],
        final: frozenset[StateT],
        steps: Mapping[Action, tuple[Step | Action, ...]],
        *,
        locks: bool,
        marks: bool,
        fleet: bool,
        restart: EventT,
    ) -> None:
        self.reason: str | None = None
        self.in_doubt = False
        self._machine = machine
        self._final = final
        self._steps_of = steps
        self._left_out = {*(() if locks else (Step.TAKE_LOCK, Step.RELEASE_LOCK)), *(() if marks else MARK_STEPS)}
        self._unsure = False
        self._fleet = fleet
        self._restart = restart
        self._restarted = False
        self._steps: tuple[StrEnum, ...] = ()

    @property
    def state(self) -> StateT:
        """The hand-over's state."""
        return self._machine.state

    @property
    def final(self) -> bool:
        """True once it is decided which host runs the guest."""
        return self._machine.state in self._final

    @property
    def memory(self) -> Memory[StateT]:
        """A copy of the executor's state, which ``recall`` takes to continue from here."""
        return Memory(self._machine.state, self._steps, self.in_doubt, self._unsure, self._restarted)

    def recall(self, memory: Memory[StateT]) -> None:
        """Continue from the state of another executor of the same side, as its ``memory`` gave it."""
        self._machine.state = memory.state
        self._steps, self.in_doubt = memory.steps, memory.in_doubt
        self._unsure, self._restarted = memory.unsure, memory.restarted

    def take(self, event: EventT, reason: str | None = None) -> bool:
        """Take one event. The caller must carry out all its effects before the next event.

        Args:
            reason: why, for events that end the attempt.

        Returns:
            False when it was refused because it comes too late (a cancel after COMMIT).

        Raises:
            IllegalEventError: the peer broke the hand-over; nothing changed.
            RuntimeError: effects of an earlier event are not carried out.
        """
        if self._steps:
            raise RuntimeError(f"{event} was taken while {self._steps[0]} is being carried out")
        return self._take(event, reason)

    @property
    def effect(self) -> EffectT | None:
        """The effect that must be carried out now, None when all are done."""
        return self._effect_of(self._steps[0]) if self._steps else None

    def done(self, outcome: Outcome) -> None:
        """Take the outcome of the current effect."""
        step, self._steps = self._steps[0], self._steps[1:]
        self._follow(step, outcome)
        self._skip()

    def _take(self, event: EventT, reason: str | None) -> bool:
        before = self._machine.state
        actions = self._machine.take(event)
        self._keep_reason(before, event, reason)
        self._restarted = self._restarted or (self._fleet and event is self._restart)
        self._steps = tuple(step for action in actions if action is not Action.REFUSE for step in self._expand(action))
        self._taken(before, event)
        self._skip()
        return Action.REFUSE not in actions

    def _expand(self, action: Action) -> tuple[StrEnum, ...]:
        left_out = self._left_out if self._restarted else self._left_out | {Step.CONFIRM_OWNERSHIP}
        return tuple(step for step in self._steps_of.get(action, (action,)) if step not in left_out)

    def _drop_resume(self) -> None:
        """Drop the remaining steps of a resume."""
        self._steps = tuple(step for step in self._steps if step not in RESUME_STEPS)

    @abstractmethod
    def _keep_reason(self, before: StateT, event: EventT, reason: str | None) -> None:
        """Decide whether this reason becomes the reason of the attempt."""

    @abstractmethod
    def _taken(self, before: StateT, event: EventT) -> None:
        """Hook: the event was taken, and its steps are those of its row in the table."""

    @abstractmethod
    def _effect_of(self, step: StrEnum) -> EffectT:
        """Return the effect of a step."""

    @abstractmethod
    def _follow(self, step: StrEnum, outcome: Outcome) -> None:
        """Act on the outcome of a step: change the remaining steps or take the event that follows."""

    @abstractmethod
    def _skip(self) -> None:
        """Drop leading steps that need no effect."""


MARK_STEPS: Final = (Step.WRITE_MARK, Step.WITHDRAW_MARK)


# Section: the source

SOURCE_STEPS: Final[Mapping[Action, tuple[Step | Action, ...]]] = {
    # COMMIT is journaled: from now on the destination may take the lock, and must find it free when COMMIT arrives.
    Action.SEND_COMMIT: (Step.RELEASE_LOCK, Action.SEND_COMMIT),
    Action.ASK_OUTCOME: (Step.RELEASE_LOCK, Action.ASK_OUTCOME),
    # Nobody else can run the guest while this daemon has lived since the stop. After a restart somebody may have been
    # told that this host is dead.
    Action.RESUME_GUEST: (Step.CONFIRM_OWNERSHIP, Step.TAKE_LOCK, Step.WRITE_MARK, Step.RUN),
}
SOURCE_FINAL: Final = frozenset({SourceState.ABORTED, SourceState.RETIRED})
_ENDS_DOUBT: Final = frozenset({SourceEvent.DISCARDED, SourceEvent.RESOLVE_RUN_HERE})


class SourceExecutor(Executor[SourceState, SourceEvent, SourceEffect]):
    """The source's side of one epoch.

    Args:
        state: first state; after a restart the one that ``source_state_of`` read from the journal.
        locks: whether guests have ownership locks here.
        was_paused: the guest was paused when the migration began, and stays so when it is taken back.
        fleet: whether guests have owners in the store of a fleet.
        table: the rules; only a proof that breaks them on purpose passes others.
    """

    def __init__(
        self,
        state: SourceState = SourceState.RUNNING,
        *,
        locks: bool,
        was_paused: bool = False,
        fleet: bool = False,
        table: SourceTable | None = None,
    ) -> None:
        super().__init__(
            Machine("source", table or (FLEET_SOURCE if fleet else SOURCE), state),
            SOURCE_FINAL,
            SOURCE_STEPS,
            locks=locks,
            marks=not was_paused,
            fleet=fleet,
            restart=SourceEvent.RESTART,
        )

    def _keep_reason(self, before: SourceState, event: SourceEvent, reason: str | None) -> None:
        """Keep the first reason that ends the attempt before COMMIT, or that returns the guest to the source after
        it."""
        if before in (SourceState.RUNNING, SourceState.STOPPED) or event in _ENDS_DOUBT:
            self.reason = self.reason or reason

    def _taken(self, before: SourceState, event: SourceEvent) -> None:
        self.in_doubt = self.in_doubt and self.state is SourceState.COMMITTED
        if event is SourceEvent.RESOLVE_RUN_HERE:  # the operator's word counts, also while the store does not answer
            self._steps = tuple(step for step in self._steps if step is not Step.CONFIRM_OWNERSHIP)

    def _effect_of(self, step: StrEnum) -> SourceEffect:
        match step:
            case Action.STOP_GUEST:
                return StopGuest()
            case Action.SEND_COMMIT:
                return SendCommit()
            case Action.SEND_ABORT:
                return SendAbort(self.reason or "the source keeps its guest")
            case Action.RETIRE_GUEST:
                return RetireGuest()
            case Action.ASK_OUTCOME:
                return AskOutcome()
            case Action.TRANSFER_OWNERSHIP:
                return TransferOwnership()
            case Action.RECLAIM_OWNERSHIP:
                return ReclaimOwnership()
            case Action.ASK_OWNERSHIP:
                return AskOwnership()
            case Step.CONFIRM_OWNERSHIP:
                return ConfirmOwnership()
            case Step.RELEASE_LOCK:
                return ReleaseLock()
            case Step.TAKE_LOCK:
                return TakeLock()
            case Step.WRITE_MARK:
                return WriteMark()
            case Step.RUN:
                return ResumeGuest()
            case Action() if step in JOURNALED:
                return Journal(JOURNALED[step])
            case _:
                raise RuntimeError(f"{step} is nothing that a source does")

    def _follow(self, step: StrEnum, outcome: Outcome) -> None:
        if step is Action.ASK_OUTCOME:
            self.in_doubt = True
        if outcome.result is Result.REFUSED:
            self._not_the_owner(SourceEvent.OWNERSHIP_LOST, outcome.reason)
        if outcome.result is not Result.FAILED:
            return
        match step:
            case Action.STOP_GUEST:
                self._take(SourceEvent.FAULT, f"the guest could not be stopped: {outcome.reason}")
            case Action.JOURNAL_COMMIT:
                self._commit_not_journaled(outcome.reason)
            case Action.TRANSFER_OWNERSHIP | Step.CONFIRM_OWNERSHIP:
                self._not_the_owner(SourceEvent.OWNERSHIP_UNKNOWN, outcome.reason)
            case Step.TAKE_LOCK | Step.RUN:
                # Whoever cannot get the lock must not run.
                self._drop_resume()
                self.reason = f"{self.reason or 'aborted'}; then the guest could not be resumed: {outcome.reason}"
            # What the destination proved stays true without our note: a restarted daemon asks again. No decision of
            # the source rests on its mark. A lock that is not let go of makes the destination discard the guest.

    def _commit_not_journaled(self, why: str) -> None:
        """Handle a COMMIT that could not be journaled: it must not be sent, and the guest still belongs to the
        source."""
        self.reason = self.reason or why
        self._take(SourceEvent.JOURNAL_FAILED, None)

    def _not_the_owner(self, event: SourceEvent, why: str) -> None:
        """Handle a store that did not confirm that the guest is this host's: COMMIT must not be sent. Whether the guest
        may run here depends on whether it said no."""
        self.reason = why
        self._take(event, None)

    def _skip(self) -> None:
        """Drop ASK_OUTCOME when the source is asking already."""
        while self.in_doubt and self._steps and self._steps[0] in (Step.RELEASE_LOCK, Action.ASK_OUTCOME):
            self._steps = self._steps[1:]


# Section: the destination

DESTINATION_STEPS: Final[Mapping[Action, tuple[Step | Action, ...]]] = {
    Action.RESUME_GUEST: (Step.TAKE_LOCK, Step.LOOK, Step.CONFIRM_OWNERSHIP, Step.WRITE_MARK, Step.RUN),
}
DESTINATION_FINAL: Final = frozenset({DestinationState.RUNNING, DestinationState.DISCARDED})
_TOLD_WHEN_JOURNALED: Final = frozenset({Action.SEND_NO, Action.SEND_DISCARDED})


class DestinationExecutor(Executor[DestinationState, DestinationEvent, DestinationEffect]):
    """The destination's side of one epoch.

        COMMIT -> lock -> look: runs already? -> mark "ran in epoch N" -> run -> RESUMED
                    |       | no answer            |                      |
                    |       v                      |                      v
                    |   end the process; the marks tell <-- stands --- look again -> runs: RESUMED
                    |                                                     | waits: withdraw the mark, end the process
                    `-----------------------------------------------------^

    Args:
        state: first state; after a restart the one that ``destination_state_of`` read from the journal.
        locks: whether guests have ownership locks here.
        keep_paused: the guest was paused on the source; it arrives paused.
        fleet: whether guests have owners in the store of a fleet.
        table: the rules; only a proof that breaks them on purpose passes others.

    Attributes:
        cause: kind of the reason that ended the attempt.
    """

    def __init__(
        self,
        state: DestinationState = DestinationState.LOADING,
        *,
        locks: bool,
        keep_paused: bool = False,
        fleet: bool = False,
        table: DestinationTable = DESTINATION,
    ) -> None:
        super().__init__(
            Machine("destination", table, state),
            DESTINATION_FINAL,
            DESTINATION_STEPS,
            locks=locks,
            marks=not keep_paused,
            fleet=fleet,
            restart=DestinationEvent.RESTART,
        )
        self.cause: NoCause = "fault"
        self._cause_told: NoCause = "fault"

    def take(self, event: DestinationEvent, reason: str | None = None, cause: NoCause = "fault") -> bool:
        """Take one event, as ``Executor.take`` does. ``cause`` is the kind of the reason."""
        self._cause_told = cause
        return super().take(event, reason)

    def _keep_reason(self, before: DestinationState, event: DestinationEvent, reason: str | None) -> None:
        """Keep a reason that makes the destination discard the guest, not one that leaves the decision open."""
        decided_here = before in (DestinationState.LOADING, DestinationState.READY)
        if event is DestinationEvent.RESUMED:
            self.reason = None  # an earlier try to resume may have failed
        elif reason is not None and decided_here and self.state is DestinationState.DISCARDED:
            self.reason, self.cause = reason, self._cause_told

    def _taken(self, before: DestinationState, event: DestinationEvent) -> None:
        """Try the resume again when the source asks again and the last try had no result."""
        if event is DestinationEvent.COMMIT and before is self.state is DestinationState.COMMITTED and self._unsure:
            self._unsure = False
            self._steps = self._expand(Action.RESUME_GUEST)

    def _effect_of(self, step: StrEnum) -> DestinationEffect:
        match step:
            case Action.SEND_READY:
                return SendReady()
            case Action.SEND_NO:
                return SendNo(self.cause, self._why())
            case Action.SEND_RUNNING:
                return SendRunning()
            case Action.SEND_DISCARDED:
                return SendDiscarded(self._why())
            case Action.SEND_OPEN:
                return SendOpen("the destination is resuming the guest")
            case Action.DESTROY_GUEST:
                return DestroyGuest()
            case Step.CONFIRM_OWNERSHIP:
                return ConfirmOwnership()
            case Step.TAKE_LOCK:
                return TakeLock()
            case Step.LOOK | Step.LOOK_AGAIN:
                return LookAtGuest()
            case Step.WRITE_MARK:
                return WriteMark()
            case Step.WITHDRAW_MARK:
                return WithdrawMark()
            case Step.RUN:
                return ResumeGuest()
            case Step.END_GUEST:
                return EndGuest()
            case Action() if step in JOURNALED:
                return Journal(JOURNALED[step])
            case _:
                raise RuntimeError(f"{step} is nothing that a destination does")

    def _why(self) -> str:
        return self.reason or "the destination discarded the guest"

    def _follow(self, step: StrEnum, outcome: Outcome) -> None:
        match step:
            case Action.JOURNAL_READY | Action.JOURNAL_COMMIT if outcome.result is Result.FAILED:
                self._vote_not_journaled(outcome.reason)
            case Action.JOURNAL_DISCARD if outcome.result is Result.FAILED:
                self._discard_not_journaled()
            case Step.LOOK | Step.LOOK_AGAIN | Step.END_GUEST | Step.RUN:
                self._resume(step, outcome)
            case Step.CONFIRM_OWNERSHIP if outcome.result is not Result.DONE:
                self._not_confirmed(outcome.reason)
            case Step.TAKE_LOCK | Step.WRITE_MARK | Step.WITHDRAW_MARK if outcome.result is Result.FAILED:
                self._resume(step, outcome)
            # RUNNING that is not journaled may be told: a restarted daemon finds COMMIT and the guest that runs.

    def _vote_not_journaled(self, why: str) -> None:
        """Handle a READY or COMMIT that could not be journaled: it does not count, and the steps after it are
        dropped."""
        self.reason, self.cause = why, "fault"
        self._take(DestinationEvent.JOURNAL_FAILED, None)

    def _discard_not_journaled(self) -> None:
        """Handle a DISCARD that could not be journaled: it must not be sent, and the source asks again."""
        self._steps = tuple(step for step in self._steps if step not in _TOLD_WHEN_JOURNALED)

    def _not_confirmed(self, why: str) -> None:
        """Handle a store that did not confirm that the guest is this host's: it stays stopped, and is tried again."""
        self._could_not(why)
        self._unsure = True
        self._next(Action.SEND_OPEN)

    def _resume(self, step: StrEnum, outcome: Outcome) -> None:
        """Act on the outcome of one step of a resume; the last step leads to the next event."""
        match step, outcome.result:
            case (Step.LOOK | Step.LOOK_AGAIN | Step.END_GUEST, Result.RUNS) | (Step.RUN, Result.DONE):
                self._next(DestinationEvent.RESUMED)
            case Step.LOOK, Result.WAITS | Result.STANDS:
                pass  # on to the mark
            case Step.LOOK_AGAIN, Result.WAITS:
                # Its VMM says that it never ran, so the mark must not say that it did once its process is gone.
                self._next(*(step for step in (Step.WITHDRAW_MARK, Step.END_GUEST) if step not in self._left_out))
            case Step.LOOK | Step.LOOK_AGAIN, _:
                self._could_not(outcome.reason)
                self._next(Step.END_GUEST)
            case Step.END_GUEST, Result.NEVER_RAN:
                self._next(DestinationEvent.RESUME_FAILED)
            case Step.END_GUEST | Step.WITHDRAW_MARK, _:
                self._not_confirmed(outcome.reason)
            case _:
                self._could_not(outcome.reason)
                self._next(Step.LOOK_AGAIN)

    def _next(self, *steps: StrEnum) -> None:
        """Queue the event that follows a resume: it replaces the rest of the resume and comes after the event's other
        steps."""
        self._steps = (*(step for step in self._steps if step not in RESUME_STEPS | {Step.END_GUEST}), *steps)

    def _could_not(self, why: str) -> None:
        if why:
            self.reason = f"the guest could not be resumed: {why}"

    def _skip(self) -> None:
        """Take the event that a resume led to as soon as no other step of the last event is left."""
        while len(self._steps) == 1 and isinstance(event := self._steps[0], DestinationEvent):
            self._steps = ()
            self._take(event, None)
