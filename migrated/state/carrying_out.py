"""The part that both sides of the hand-over share when they carry out the effects of protocol/executor.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from migrated.observe.transitions import Transitions
from migrated.record.terms import Role
from migrated.state.journal import Journal, JournalError
from protocol.effects import DONE, Outcome, failed
from protocol.executor import EffectT, EventT, Executor, StateT
from protocol.handover import Decision

log = structlog.get_logger()


async def carry_out_all(
    executor: Executor[StateT, EventT, EffectT],
    carry_out: Callable[[EffectT], Awaitable[Outcome]],
    transitions: Transitions,
) -> None:
    """Carry out the effects of an event, one after the other, until the executor has none left.

    An error that nobody foresaw is a failure of its effect as any other: an effect without an outcome would keep the
    hand-over from every further event, and its guest from running.

    Args:
        executor: has taken the event.
        carry_out: called with each effect; returns what came of it.
        transitions: notes what each effect changed.
    """
    unforeseen: list[Exception] = []
    while (effect := executor.effect) is not None:
        before = executor.state
        try:
            outcome = await carry_out(effect)
        except Exception as error:
            unforeseen.append(error)
            outcome = failed(f"internal error: {error!r}")
        executor.done(outcome)
        transitions.note(before, effect, executor.state)
    for cause in unforeseen:  # told when the guest is where it belongs: that takes its time
        log.error("a step of the hand-over failed unexpectedly", exc_info=cause)


def journal_decision(journal: Journal, migration_id: str, role: Role, decision: Decision) -> Outcome:
    """Write a decision into the journal. Nobody may be told of one that could not be written."""
    try:
        journal.decide(migration_id, role, decision)
    except JournalError as error:
        log.error("a decision could not be journaled", decision=decision, reason=str(error))
        return failed(error)
    return DONE
