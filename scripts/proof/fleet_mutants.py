"""Broken variants of the hand-over in a fleet, each of which the explorer must catch.

They are explored with one attempt and without what is explored without a fleet (``Model.calm``): what breaks here
breaks at the store.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final

from migrated.fleet.model import Ownership
from migrated.fleet.ownership import reclaimed, taken
from protocol.effects import DONE, Outcome, Result
from protocol.executor import DestinationExecutor, SourceExecutor, Step
from protocol.handover import FLEET_SOURCE, Action, SourceEvent, SourceState
from scripts.proof.explorer import OVERTAKEN, STUCK, TWO_RUN
from scripts.proof.model import NOT_THE_OWNER, Model
from scripts.proof.mutants import Mutant
from scripts.proof.store import Rules, SharedLock

S, E, A = SourceState, SourceEvent, Action

FLEET: Final = Model(source=FLEET_SOURCE, fleet=Rules())
CALM: Final = replace(FLEET, epochs=(1,), calm=True)
SHARED_LOCK: Final = replace(CALM, fleet=Rules(lock=SharedLock()))
"""The same with a lock that all hosts share, and fences that may be untrue."""


def _source(state: SourceState, event: SourceEvent, after: SourceState, *actions: Action) -> Model:
    return replace(CALM, source={**FLEET_SOURCE, (state, event): (after, actions)})


def _rules(**changes: Any) -> Model:
    return replace(CALM, fleet=replace(Rules(), **changes))


class TakesSilenceForYes(SourceExecutor):
    """Goes on to COMMIT when the store does not answer."""

    def _follow(self, step: StrEnum, outcome: Outcome) -> None:
        silent = step is A.TRANSFER_OWNERSHIP and outcome.result is Result.FAILED
        super()._follow(step, DONE if silent else outcome)


class TakesNoForYes(SourceExecutor):
    """Goes on to COMMIT when the store says no."""

    def _follow(self, step: StrEnum, outcome: Outcome) -> None:
        refused = step is A.TRANSFER_OWNERSHIP and outcome.result is Result.REFUSED
        super()._follow(step, DONE if refused else outcome)


class RestartsWithoutAsking(SourceExecutor):
    """Runs its guest after a restart as if it had lived on."""

    def _expand(self, action: Action) -> tuple[StrEnum, ...]:
        return tuple(step for step in super()._expand(action) if step is not Step.CONFIRM_OWNERSHIP)


class RestartsWithoutAnAnswer(SourceExecutor):
    """Runs its guest after a restart when the store does not answer."""

    def _follow(self, step: StrEnum, outcome: Outcome) -> None:
        silent = step is Step.CONFIRM_OWNERSHIP and outcome.result is Result.FAILED
        super()._follow(step, DONE if silent else outcome)


class ArrivesWithoutAsking(DestinationExecutor):
    """Runs the guest after a restart as if it had lived on."""

    def _expand(self, action: Action) -> tuple[StrEnum, ...]:
        return tuple(step for step in super()._expand(action) if step is not Step.CONFIRM_OWNERSHIP)


class ArrivesWithoutAnAnswer(DestinationExecutor):
    """Runs the guest after a restart whatever the store says."""

    def _not_confirmed(self, why: str) -> None:
        """Nothing: the guest runs."""


def _only_the_owner(known: Ownership, host: str, fenced: Collection[str]) -> Ownership:
    return taken(known.model_copy(update={"previous": None}), host, fenced)


def _anything(_known: Ownership, host: str, _fenced: Collection[str]) -> Ownership:
    return Ownership(owner=host, epoch=0)


def _forgets_previous(known: Ownership, host: str) -> Ownership:
    return reclaimed(known, host).model_copy(update={"previous": None})


def _source_is(executor: type[SourceExecutor]) -> Model:
    return replace(CALM, source_executor=executor)


def _destination_is(executor: type[DestinationExecutor]) -> Model:
    return replace(CALM, destination_executor=executor)


FLEET_MUTANTS: Final = (
    Mutant(
        "COMMIT needs no owner",
        _source(S.STOPPED, E.READY_IN_TIME, S.COMMITTED, A.JOURNAL_COMMIT, A.SEND_COMMIT),
        TWO_RUN,
    ),
    Mutant(
        "the destination becomes the owner after COMMIT is sent",
        _source(S.STOPPED, E.READY_IN_TIME, S.COMMITTED, A.JOURNAL_COMMIT, A.SEND_COMMIT, A.TRANSFER_OWNERSHIP),
        TWO_RUN,
    ),
    Mutant("no answer of the store counts as a yes", _source_is(TakesSilenceForYes), TWO_RUN),
    Mutant("a no of the store counts as a yes", _source_is(TakesNoForYes), TWO_RUN),
    Mutant(
        "no answer of the store commits",
        _source(S.COMMITTED, E.OWNERSHIP_UNKNOWN, S.COMMITTED, A.JOURNAL_COMMIT, A.SEND_COMMIT),
        TWO_RUN,
    ),
    Mutant(
        "a guest that is not the source's is taken back",
        _source(S.COMMITTED, E.OWNERSHIP_LOST, S.ABORTED, A.RESUME_GUEST, A.SEND_ABORT),
        NOT_THE_OWNER,
    ),
    Mutant("a restarted source does not ask who owns its guest", _source_is(RestartsWithoutAsking), TWO_RUN),
    Mutant("a restarted source takes no answer for a yes", _source_is(RestartsWithoutAnAnswer), TWO_RUN),
    Mutant("a restarted destination does not ask who owns its guest", _destination_is(ArrivesWithoutAsking), TWO_RUN),
    Mutant("a restarted destination runs its guest without a yes", _destination_is(ArrivesWithoutAnAnswer), TWO_RUN),
    Mutant("a third host needs the owner's fence alone", _rules(taken=_only_the_owner), TWO_RUN),
    Mutant("a third host needs no fence", _rules(taken=_anything), TWO_RUN),
    Mutant("hosts do not mind that they are fenced", _rules(minds_fences=False), TWO_RUN),
    Mutant(
        "a confirmation ends the source's claim before the guest runs", _rules(reclaimed=_forgets_previous), TWO_RUN
    ),
    Mutant("the lock carries no token", _rules(lock=SharedLock(tokens=False)), OVERTAKEN),
    Mutant("an arriving guest takes the lock without its token", _rules(lock=SharedLock(asks=False)), OVERTAKEN),
    Mutant(
        "a restarted source without an answer does not ask again",
        _source(S.ABORTED, E.OWNERSHIP_UNKNOWN, S.HELD, A.SEND_ABORT),
        STUCK,
    ),
)
