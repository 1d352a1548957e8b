"""The moves of the two hosts, one executor's effect at a time.

Nothing here repeats a rule of the hand-over: effects are carried out on a guest of which only the least is kept, and
every outcome that they can have is a move.

The module is longer than others because both hosts stand in it, which share what an effect and its outcomes are.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Final, NamedTuple

from protocol import effects
from protocol.effects import DONE, Outcome, Result, failed
from protocol.executor import Memory
from protocol.handover import Decision, DestinationEvent, DestinationState, IllegalEventError, SourceEvent, SourceState
from scripts.proof.model import (
    ALIVE,
    ILLEGAL,
    INCOMPLETE,
    LOCK_KEPT,
    NOT_JOURNALED,
    NOT_THE_OWNER,
    DestinationSide,
    Guard,
    Guest,
    HandedOver,
    Journal,
    Marks,
    Message,
    Model,
    Move,
    Row,
    SideT,
    SourceSide,
)
from scripts.proof.store import DESTINATION_HOST, SOURCE_HOST, Rules, StoreStep


class Done(NamedTuple):
    """One way in which an effect can end.

    Attributes:
        outcome: what the executor is told.
        changes: what it does to the side.
        sends: what it adds to the network.
        note: what is special about this way.
        fault: no progress may depend on it.
        wrong: why a daemon would refuse it.
        breaks: the rule that it breaks by itself.
        store: what it does to the fleet's store.
    """

    outcome: Outcome = DONE
    changes: dict[str, Any] = {}  # noqa: RUF012 - never changed
    sends: int = 0
    note: str = ""
    fault: bool = False
    wrong: str = ""
    breaks: str = ""
    store: StoreStep | None = None


SOURCE_HEARS: Final = {
    Message.READY: (SourceEvent.READY_IN_TIME, SourceEvent.READY_LATE),
    Message.NO: (SourceEvent.NO,),
    Message.RUNNING: (SourceEvent.RUNNING,),
    Message.DISCARDED: (SourceEvent.DISCARDED,),
}
DESTINATION_HEARS: Final = {Message.COMMIT: DestinationEvent.COMMIT, Message.ABORT: DestinationEvent.ABORT}
NOT_WRITTEN: Final = Done(failed(""), note=" fails", fault=True)
SILENT: Final = frozenset({": silence", ": it does not end"})
"""VMMs that do not answer, which a calm model leaves out."""


def _at_rest(state: Any) -> Memory[Any]:
    return Memory(state, (), in_doubt=False, unsure=False)


def _name(effect: object) -> str:
    """An effect for people: its class and what it carries."""
    decision = getattr(effect, "decision", None)
    return type(effect).__name__ if decision is None else f"{type(effect).__name__}({decision})"


class Source:
    """The moves of the source host."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def begin(self) -> SourceSide:
        """The guest runs and nothing was tried yet."""
        return SourceSide(0, _at_rest(SourceState.ABORTED), (), Guest.RUNS, fresh=False, sending=False, holds=True)

    def moves(self, side: SourceSide) -> Iterator[Move]:
        """Everything that can happen next on the source."""
        if side.guest in (Guest.RUNS, Guest.HALTED) and side.attempt and not self._model.calm:
            yield Move("the VMM dies", side._replace(guest=Guest.DEAD, holds=False), fault=True)
        if side.down:
            yield self._take("the daemon restarts", side._replace(down=False), SourceEvent.RESTART)
            return
        if side.attempt:
            state = self._model.source_state_of(side.journal)
            died = side._replace(memory=_at_rest(state), fresh=False, sending=False, reclaims=False, asks=False)
            if self._model.fleet is None:
                yield self._take("the daemon dies and restarts", died, SourceEvent.RESTART, fault=True)
            else:
                yield Move("the daemon dies", died._replace(down=True), fault=True)
        if (effect := self._model.source_at(side.memory).effect) is not None:
            for way in self._carry_out(side, effect):
                if not (self._model.calm and (way is NOT_WRITTEN or way.note in SILENT)):
                    yield self._done(side, _name(effect), way)
            return
        if side.memory.in_doubt:
            yield Move("asks again", side, sends=Message.COMMIT.bit(self._model.epoch(side.attempt)))
        if side.sending:
            sends = Message.STATE.bit(side.attempt) if side.guest is Guest.HALTED else 0
            yield Move("sends the last state", side._replace(sending=False), sends=sends)
        if side.state is SourceState.ABORTED and side.guest is Guest.RUNS and side.attempt < len(self._model.epochs):
            attempt = side.attempt + 1
            begun = SourceSide(
                attempt,
                _at_rest(SourceState.RUNNING),
                (Decision.BEGIN,),
                Guest.RUNS,
                fresh=True,
                sending=False,
                holds=side.holds,
            )
            store = None if self._model.fleet is None else self._model.fleet.begin(attempt)
            yield Move(f"begins attempt {attempt}", begun, sends=Message.HELLO.bit(attempt), fault=True, store=store)
        if side.attempt:
            yield from self._events(side)
        if self._model.fleet is not None and side.reclaims:
            yield Move("reclaims the guest", side._replace(reclaims=False), store=self._model.fleet.reclaim)

    def _events(self, side: SourceSide) -> Iterator[Move]:
        if side.asks and side.state is SourceState.HELD:
            yield self._take("asks the store again", side._replace(asks=False), SourceEvent.ASK_AGAIN)
        if side.state is SourceState.HELD:
            for event, guard in (
                (SourceEvent.RESOLVE_RUN_HERE, Guard.NOT_ELSEWHERE),
                (SourceEvent.RESOLVE_DISCARD, Guard.ELSEWHERE),
            ):
                told = side._replace(told_no=False)
                yield self._take("is resolved", told, event, fault=True)._replace(guard=guard)
        if side.state is SourceState.RUNNING:
            yield self._take("stops the guest", side, SourceEvent.STOP)
        if side.fresh:
            yield self._take("finds the link lost", side, SourceEvent.LINK_LOST)
            if side.state is not SourceState.RUNNING:
                yield self._take("passes its deadline", side, SourceEvent.DEADLINE)
        if not self._model.calm:
            yield self._take("has a fault", side, SourceEvent.FAULT, fault=True)
            yield self._take("is cancelled", side, SourceEvent.CANCEL, fault=True)
        if side.state is SourceState.COMMITTED:
            for event, guard in (
                (SourceEvent.RESOLVE_RUN_HERE, Guard.DISCARDED_THERE),
                (SourceEvent.RESOLVE_DISCARD, Guard.RUNS_THERE),
            ):
                told = side._replace(told_no=False)
                yield self._take("is resolved", told, event, fault=True)._replace(guard=guard)
        for message, events in SOURCE_HEARS.items():
            for epoch in set(self._model.epochs):
                if self._model.counts(self._model.epoch(side.attempt), epoch):
                    for event in events:
                        yield self._take(f"hears {message.name}({epoch})", side, event)._replace(
                            needs=message.bit(epoch)
                        )

    def _take(self, label: str, side: SourceSide, event: SourceEvent, *, fault: bool = False) -> Move:
        one = self._model.source_at(side.memory)
        try:
            one.take(event)
        except IllegalEventError as error:
            return Move(f"{label}: {event}", side, wrong=f"{ILLEGAL}: {error}")
        after = self._after(side, one.memory)
        return Move(f"{label}: {event} -> {one.state}", after, fault=fault, row=(side.state, event))

    def _done(self, side: SourceSide, label: str, way: Done) -> Move:
        one = self._model.source_at(side.memory)
        try:
            one.done(way.outcome)
        except IllegalEventError as error:
            return Move(label + way.note, side, wrong=f"{ILLEGAL}: {error}")
        after = self._after(side._replace(**way.changes), one.memory)
        # A step that fails is the only way to an event that no row before it asked for.
        row = None if one.state is side.state else _ROW_OF_FAILURE.get((side.state, one.state))
        if row is not None and label in _ABOUT_OWNERSHIP:
            lost = way.outcome.result is Result.REFUSED
            row = (side.state, SourceEvent.OWNERSHIP_LOST if lost else SourceEvent.OWNERSHIP_UNKNOWN)
        return _moved(label, after, way, row)

    def _after(self, side: SourceSide, memory: Memory[SourceState]) -> SourceSide:
        sending = side.sending and memory.state is SourceState.STOPPED
        return side._replace(memory=memory, sending=sending)

    def _carry_out(self, side: SourceSide, effect: effects.SourceEffect) -> Iterator[Done]:
        epoch = self._model.epoch(side.attempt)
        match effect:
            case effects.StopGuest():
                if side.guest is Guest.DEAD:
                    yield Done(failed(""), note=": no VMM")
                else:
                    yield Done(changes={"guest": Guest.HALTED, "sending": True})
                    yield NOT_WRITTEN
            case effects.Journal(decision=decision):
                yield Done(changes={"journal": _append(side.journal, decision)})
                yield NOT_WRITTEN
            case effects.ReleaseLock():
                # A VMM does not let go of the lock of a guest that runs.
                yield Done(failed(""), note=": it runs") if side.guest is Guest.RUNS else Done(changes={"holds": False})
            case effects.TakeLock():
                yield from _lock(self._model.fleet, SOURCE_HOST, side)
            case effects.WriteMark():
                yield Done()
            case effects.ResumeGuest():
                breaks = NOT_THE_OWNER if side.told_no and side.guest is Guest.HALTED else ""
                yield Done(changes={"guest": Guest.RUNS if side.guest is Guest.HALTED else side.guest}, breaks=breaks)
            case effects.RetireGuest():
                yield Done(changes={"guest": Guest.NONE, "holds": False})
            case effects.SendCommit() | effects.AskOutcome():
                keeps_lock = side.holds and side.guest is Guest.HALTED
                breaks = LOCK_KEPT if keeps_lock else _told(Decision.COMMIT, side.journal)
                yield Done(sends=Message.COMMIT.bit(epoch), breaks=breaks)
            case effects.SendAbort():
                yield Done(sends=Message.ABORT.bit(epoch))
            case _:
                yield from self._ask_store(self._model.fleet or Rules(), side, effect)

    def _ask_store(self, rules: Rules, side: SourceSide, effect: effects.OwnershipEffect) -> Iterator[Done]:
        match effect:
            case effects.TransferOwnership():
                yield Done(store=rules.transfer(side.attempt, yes=True), note=": yes")
                refused = Outcome(Result.REFUSED)
                yield Done(refused, {"told_no": True}, store=rules.transfer(side.attempt, yes=False), note=": no")
                # It may have been carried out, be carried out later, or never.
                sends = Message.TRANSFER.bit(side.attempt)
                yield Done(failed(""), sends=sends, note=": no answer", fault=True)
            case effects.ConfirmOwnership():
                yield from _confirmed(rules, SOURCE_HOST, {"told_no": False}, {"told_no": True})
            case effects.ReclaimOwnership():
                yield Done(changes={"reclaims": True})
            case effects.AskOwnership():
                yield Done(changes={"asks": True})


def _lock(rules: Rules | None, host: str, side: SideT) -> Iterator[Done]:
    """The ways in which taking the lock can end for a host."""
    taken = Done(changes={"holds": side.guest in ALIVE})
    if rules is None or rules.lock is None or side.holds:
        yield taken
        return
    yield taken._replace(store=rules.lock.taken(host, yes=True))
    yield Done(failed(""), store=rules.lock.taken(host, yes=False), note=" is refused")


def _confirmed(rules: Rules, host: str, owned: dict[str, Any], lost: dict[str, Any]) -> Iterator[Done]:
    """The answers that a restarted host gets of the store."""
    yield Done(changes=owned, store=rules.confirm(host, yes=True), note=": yes")
    yield Done(Outcome(Result.REFUSED), lost, store=rules.confirm(host, yes=False), note=": no")
    yield Done(failed(""), note=": no answer", fault=True)
    yield Done(failed(""), store=rules.confirm(host, yes=True), note=": carried out, no answer", fault=True)


def _moved(label: str, after: SideT, way: Done, row: Row | None) -> Move:
    return Move(
        label + way.note,
        after,
        sends=way.sends,
        fault=way.fault,
        wrong=way.wrong,
        breaks=way.breaks,
        row=row,
        store=way.store,
    )


_ABOUT_OWNERSHIP: Final = frozenset({"TransferOwnership", "ConfirmOwnership"})
_ROW_OF_FAILURE: Final[dict[tuple[StrEnum, StrEnum], Row]] = {
    (SourceState.STOPPED, SourceState.ABORTED): (SourceState.STOPPED, SourceEvent.FAULT),
    (SourceState.COMMITTED, SourceState.ABORTED): (SourceState.COMMITTED, SourceEvent.JOURNAL_FAILED),
    (SourceState.COMMITTED, SourceState.HELD): (SourceState.COMMITTED, SourceEvent.OWNERSHIP_LOST),
    (SourceState.ABORTED, SourceState.HELD): (SourceState.ABORTED, SourceEvent.OWNERSHIP_LOST),
    (DestinationState.READY, DestinationState.DISCARDED): (DestinationState.READY, DestinationEvent.JOURNAL_FAILED),
    (DestinationState.COMMITTED, DestinationState.READY): (
        DestinationState.COMMITTED,
        DestinationEvent.JOURNAL_FAILED,
    ),
    (DestinationState.COMMITTED, DestinationState.RUNNING): (DestinationState.COMMITTED, DestinationEvent.RESUMED),
    (DestinationState.COMMITTED, DestinationState.DISCARDED): (
        DestinationState.COMMITTED,
        DestinationEvent.RESUME_FAILED,
    ),
}
"""Rows whose event comes from an outcome, by the states before and after it."""


class Destination:
    """The moves of the destination host."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def begin(self) -> DestinationSide:
        """Nothing of the guest is known."""
        return DestinationSide(
            0, _at_rest(DestinationState.DISCARDED), (), Guest.NONE, fresh=False, ran=False, marked=False, holds=False
        )

    def moves(self, side: DestinationSide) -> Iterator[Move]:
        """Everything that can happen next on the destination."""
        if side.guest in ALIVE and not self._model.calm:
            dead = side._replace(guest=Guest.DEAD, holds=False, writes=False, undo=False)
            yield Move("the VMM dies", dead, fault=True)
        if side.down:
            yield self._take("the daemon restarts", side._replace(down=False), DestinationEvent.RESTART)
            return
        if side.attempt:
            state = self._model.destination_state_of(side.journal)
            died = side._replace(memory=_at_rest(state), fresh=False, undo=False)
            if self._model.fleet is None:
                yield self._take("the daemon dies and restarts", died, DestinationEvent.RESTART, fault=True)
            else:
                yield Move("the daemon dies", died._replace(down=True), fault=True)
        if (effect := self._model.destination_at(side.memory).effect) is not None:
            for way in self._carry_out(side, effect):
                if not (self._model.calm and (way is NOT_WRITTEN or way.note in SILENT)):
                    yield self._done(side, _name(effect), way)
            return
        for attempt in range(side.attempt + 1, len(self._model.epochs) + 1):
            yield from self._hello(side, attempt)
        if side.attempt:
            yield from self._events(side)
            if self._model.fleet is not None:
                yield from _tells_store(self._model.fleet, side)

    def _hello(self, side: DestinationSide, attempt: int) -> Iterator[Move]:
        needs = Message.HELLO.bit(attempt)
        label = f"hears HELLO of attempt {attempt}"
        if side.state is DestinationState.DISCARDED:
            memory = _at_rest(DestinationState.LOADING)
            yield Move(
                label,
                DestinationSide(
                    attempt,
                    memory,
                    (Decision.BEGIN,),
                    Guest.EMPTY,
                    fresh=True,
                    ran=side.ran,
                    marked=False,
                    holds=False,
                    writes=self._maps_shared,
                    changed=side.changed,
                ),
                needs=needs,
            )
        elif (event := self._model.newer_epoch(side.state)) is not None:
            yield self._take(label, side, event)._replace(needs=needs)

    @property
    def _maps_shared(self) -> bool:
        """Whether a VMM that may not run yet can write to memory that was handed over."""
        return self._model.handed_over is not None and not self._model.handed_over.private

    def _events(self, side: DestinationSide) -> Iterator[Move]:
        if side.state is DestinationState.LOADING and side.guest is Guest.EMPTY:
            whole = side._replace(guest=Guest.HALTED, changed=side.changed or self._maps_shared)
            yield Move("has the whole state", whole, needs=Message.STATE.bit(side.attempt))
        complete = side.state is DestinationState.LOADING and side.guest is Guest.HALTED
        if complete or (side.state is DestinationState.DISCARDED and side.fresh):
            yield self._take("has loaded", side, DestinationEvent.LOADED)
        if side.fresh:
            yield self._take("finds the link lost", side, DestinationEvent.LINK_LOST)
            yield self._take("passes its limit", side, DestinationEvent.LIMIT)
        if side.state is not DestinationState.LOADING:
            yield self._take("waited long enough", side, DestinationEvent.READY_TIMEOUT)
        if not self._model.calm:
            yield self._take("has a fault", side, DestinationEvent.FAULT, fault=True)
            yield self._take("is cancelled", side, DestinationEvent.CANCEL, fault=True)
        for message, event in DESTINATION_HEARS.items():
            for epoch in set(self._model.epochs):
                if self._model.counts(self._model.epoch(side.attempt), epoch):
                    yield self._take(f"hears {message.name}({epoch})", side, event)._replace(needs=message.bit(epoch))

    def _take(self, label: str, side: DestinationSide, event: DestinationEvent, *, fault: bool = False) -> Move:
        one = self._model.destination_at(side.memory)
        try:
            one.take(event)
        except IllegalEventError as error:
            return Move(f"{label}: {event}", side, wrong=f"{ILLEGAL}: {error}")
        after = side._replace(memory=one.memory)
        return Move(f"{label}: {event} -> {one.state}", after, fault=fault, row=(side.state, event))

    def _done(self, side: DestinationSide, label: str, way: Done) -> Move:
        one = self._model.destination_at(side.memory)
        try:
            one.done(way.outcome)
        except IllegalEventError as error:
            return Move(label + way.note, side, wrong=f"{ILLEGAL}: {error}")
        after = side._replace(**way.changes, memory=one.memory)
        row = None if one.state is side.state else _ROW_OF_FAILURE.get((side.state, one.state))
        return _moved(label, after, way, row)

    def _carry_out(self, side: DestinationSide, effect: effects.DestinationEffect) -> Iterator[Done]:
        epoch = self._model.epoch(side.attempt)
        match effect:
            case effects.Journal(decision=decision):
                yield Done(changes={"journal": _append(side.journal, decision)})
                yield NOT_WRITTEN
            case effects.TakeLock() if side.guest not in ALIVE:
                yield Done(failed(""), note=": no VMM")
            case effects.TakeLock():
                yield from _lock(self._model.fleet, DESTINATION_HOST, side)
            case effects.LookAtGuest():
                yield Done(self._seen(side), note=f": {side.guest}")
                if side.guest is Guest.RUNS:
                    yield Done(failed(""), note=": silence", fault=True)
            case effects.WriteMark():
                yield Done(changes={"marked": self._model.marks is Marks.DAEMON})
                yield NOT_WRITTEN
            case effects.WithdrawMark():
                yield Done(changes={"marked": False})
                yield NOT_WRITTEN
            case effects.ResumeGuest():
                yield from _resume(side, self._model.handed_over)
            case effects.EndGuest():
                undone = side.undo and not side.ran and (self._model.handed_over or HandedOver()).puts_back
                # A VMM that is ended because it did not answer is one that died, and so is one that counts as that.
                died = side.guest in (Guest.DEAD, Guest.RUNS) or self._counts_as_ran(side)
                changes = {
                    "guest": Guest.DEAD if died else Guest.NONE, "holds": False, "writes": False,
                    "changed": side.changed and not undone, "undo": False,
                }  # fmt: skip
                yield Done(Outcome(self._whether_it_ran(side)), changes)
                if side.guest in ALIVE:
                    yield Done(Outcome(Result.UNKNOWN), note=": it does not end", fault=True)
            case effects.DestroyGuest():
                gone = Guest.DEAD if side.guest is Guest.DEAD else Guest.NONE
                yield Done(changes={"guest": gone, "holds": False, "writes": False})
            case effects.SendReady():
                yield Done(sends=Message.READY.bit(epoch), breaks=_told(Decision.READY, side.journal))
            case effects.SendNo():
                yield Done(sends=Message.NO.bit(epoch))
            case effects.SendRunning():
                yield Done(sends=Message.RUNNING.bit(epoch), breaks=_told(Decision.COMMIT, side.journal))
            case effects.SendDiscarded():
                yield Done(sends=Message.DISCARDED.bit(epoch), breaks=_told(Decision.DISCARD, side.journal))
            case effects.SendOpen():
                yield Done()
            case effects.ConfirmOwnership():
                yield from _confirmed(self._model.fleet or Rules(), DESTINATION_HOST, {}, {})

    def _counts_as_ran(self, side: DestinationSide) -> bool:
        return self._model.handed_over is not None and self._model.handed_over.counts and side.changed_for_good

    def _seen(self, side: DestinationSide) -> Outcome:
        """What a look at the VMM finds."""
        if side.guest is Guest.RUNS:
            return Outcome(Result.RUNS)
        if side.guest not in ALIVE:
            return failed("")
        return Outcome(Result.STANDS if self._counts_as_ran(side) else Result.WAITS)

    def _whether_it_ran(self, side: DestinationSide) -> Result:
        """What the marks say once the process is gone."""
        if self._counts_as_ran(side):
            return Result.RUNS
        if self._model.marks is Marks.NONE and not side.fresh:
            return self._model.presumes
        ran = side.marked if self._model.marks is Marks.DAEMON else side.ran
        return Result.RUNS if ran else Result.NEVER_RAN


def _tells_store(rules: Rules, side: DestinationSide) -> Iterator[Move]:
    """What the destination tells the store of its own accord, also late: that the guest runs here, and that those of
    earlier attempts were discarded."""
    if side.guest is Guest.RUNS:
        yield Move("settles", side, store=rules.settle(side.attempt))
    discarded = side.state is DestinationState.DISCARDED and Decision.DISCARD in side.journal
    for attempt in range(1, side.attempt + discarded):
        yield Move(f"gives the guest of attempt {attempt} back", side, store=rules.give_back(attempt))


def _resume(side: DestinationSide, handed_over: HandedOver | None) -> Iterator[Done]:
    """The ways in which a resume can end. Where memory was handed over, what the VMM wrote while it loaded goes into it
    first."""
    shared = {} if handed_over is None else {"writes": True, "changed": True, "undo": side.undo or not side.changed}
    runs = {**shared, "guest": Guest.RUNS, "ran": True, "undo": False}
    match side.guest:
        case Guest.RUNS:
            yield Done(note=": runs already")
        case Guest.HALTED:
            yield Done(changes=runs)
            yield Done(failed(""), note=" fails")
            yield Done(failed(""), runs, note=": the answer is lost", fault=True)
            if handed_over is not None:
                yield Done(failed(""), shared, note=" fails, and the memory is changed")
                dead = {"guest": Guest.DEAD, "holds": False, "changed": True, "undo": False}
                yield Done(failed(""), dead, note=": the VMM dies, and the memory is changed", fault=True)
        case Guest.EMPTY:
            yield Done(wrong=INCOMPLETE)
        case _:
            yield Done(failed(""), note=": no VMM")


def _append(journal: Journal, decision: Decision) -> Journal:
    """The same decision twice says what it said once."""
    return journal if journal[-1] is decision else (*journal, decision)


def _told(decision: Decision, journal: Journal) -> str:
    """The rule that is broken when this is told now, or nothing."""
    return "" if decision in journal else NOT_JOURNALED
