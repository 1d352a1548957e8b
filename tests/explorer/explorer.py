"""Every interleaving of the two hand-over machines, a bad network, crashes and restarts, breadth first.

    source side  --moves-->                                  <--moves--  destination side
    (attempt, state, tasks,   \\                            /   (attempt, state, tasks,
     journal, guest)           `-->  messages ever sent  <-'     journal, guest)

The network is the set of messages ever sent. Each of them may be delivered at any time, any number of times, in any
order, or never: loss, duplication, delay and reordering without a bound, and no message is ever out of the way. A
machine's actions become *tasks* that its daemon carries out one at a time, so that a crash falls between any two, and
the other side moves between any two. A crash keeps the journal and the guest (a VMM outlives its daemon); what was in
memory is gone, and the daemon comes up with RESTART. Timers, faults and the operator act whenever they can. A VMM may
die at any time. After an abort the source tries again with the next epoch, and everything of the first is still in
the network.

Nothing here repeats a rule of the tables: the explorer only dispatches, as a daemon does, and watches the guests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple, TypeAlias

from protocol.errors import RemoteProtocolError
from protocol.handover import (
    DESTINATION,
    SOURCE,
    Action,
    Decision,
    DestinationEvent,
    DestinationState,
    DestinationTable,
    IllegalEventError,
    Machine,
    SourceEvent,
    SourceState,
    SourceTable,
    check_epoch,
    destination_state_of,
    source_state_of,
)

MAX_ATTEMPTS: Final = 3


class Message(IntEnum):
    """What the network carries. HELLO and STATE belong to a connection (an attempt), the rest names an epoch."""

    HELLO = 0
    STATE = 1
    READY = 2
    NO = 3
    COMMIT = 4
    ABORT = 5
    RUNNING = 6
    DISCARDED = 7

    def bit(self, number: int) -> int:
        """The bit of this message for attempt or epoch ``number``."""
        return 1 << (self + len(Message) * (number - 1))


NET_BITS: Final = len(Message) * MAX_ATTEMPTS


class Guest(StrEnum):
    """A guest process on one side, as it is and not as its daemon believes."""

    NONE = "none"
    """There is no process."""
    EMPTY = "empty"
    """Its state has not arrived in full."""
    HALTED = "halted"
    """Complete and stopped."""
    RUNS = "runs"
    DEAD = "dead"
    """Its VMM died."""


class Chore(StrEnum):
    """Tasks of the daemons beside the machines' actions."""

    SEND_STATE = "send-state"
    """The last pages, the devices and STATE_END, after the stop."""
    RESUME_AGAIN = "resume-again"
    """RESUME_GUEST by a restarted daemon, which does not remember whether the guest ran before."""


Task: TypeAlias = Action | Chore | DestinationEvent
Journal: TypeAlias = tuple[Decision, ...]
Row: TypeAlias = tuple[SourceState, SourceEvent] | tuple[DestinationState, DestinationEvent]


class SourceSide(NamedTuple):
    """The source host. ``fresh``: the daemon has not restarted since the attempt began, so its connection and its
    timers exist. ``asking``: the daemon tells its decision again and again."""

    attempt: int
    state: SourceState
    tasks: tuple[Task, ...]
    journal: Journal
    guest: Guest
    fresh: bool
    asking: bool


class DestinationSide(NamedTuple):
    """The destination host. ``attempt`` 0: it has not heard of the guest. ``ran``: the guest has run here."""

    attempt: int
    state: DestinationState
    tasks: tuple[Task, ...]
    journal: Journal
    guest: Guest
    fresh: bool
    ran: bool


class Guard(IntEnum):
    """What must be true of the destination for a move of the source: what an operator made sure of."""

    NONE = 0
    RUNS_THERE = 1
    DISCARDED_THERE = 2


SideT: TypeAlias = SourceSide | DestinationSide


class Move(NamedTuple):
    """One step of one side.

    ``needs`` is the message that it takes (0: none), ``sends`` what it adds to the network. ``fault`` marks what no
    progress may depend on: crashes, failures, the operator and the retry. ``wrong`` names a rule that the step
    itself breaks. ``row`` is the table's row that decided it.
    """

    label: str
    after: SideT
    needs: int = 0
    sends: int = 0
    fault: bool = False
    guard: Guard = Guard.NONE
    wrong: str = ""
    row: Row | None = None


@dataclass(frozen=True)
class Model:
    """What is explored: the tables and the rules beside them. A mutant replaces one of these.

    Attributes:
        epochs: the epoch of each attempt, at most MAX_ATTEMPTS of them.
        marks: a VMM leaves a mark before it lets its guest run, from which a restarted daemon that finds no VMM
            knows which of RESUMED and RESUME_FAILED is true; without marks it presumes what ``presumes`` says.
    """

    source: SourceTable = field(default_factory=lambda: SOURCE)
    destination: DestinationTable = field(default_factory=lambda: DESTINATION)
    source_state_of: Callable[[Iterable[Decision]], SourceState] = source_state_of
    destination_state_of: Callable[[Iterable[Decision]], DestinationState] = destination_state_of
    check_epoch: Callable[[int, int], bool] = check_epoch
    epochs: tuple[int, ...] = (1, 2)
    marks: bool = True
    presumes: DestinationEvent = DestinationEvent.RESUME_FAILED

    def epoch(self, attempt: int) -> int:
        """The epoch that messages of this attempt name."""
        return self.epochs[attempt - 1]

    def counts(self, current: int, received: int) -> bool:
        """Whether a message of epoch ``received`` gets as far as the machine."""
        try:
            return self.check_epoch(current, received)
        except RemoteProtocolError:
            return False


SENDS: Final[dict[Task, Message]] = {
    Action.SEND_COMMIT: Message.COMMIT,
    Action.ASK_OUTCOME: Message.COMMIT,
    Action.SEND_ABORT: Message.ABORT,
    Action.SEND_READY: Message.READY,
    Action.SEND_NO: Message.NO,
    Action.SEND_RUNNING: Message.RUNNING,
    Action.SEND_DISCARDED: Message.DISCARDED,
}
JOURNALS: Final[dict[Task, Decision]] = {
    action: Decision(action.removeprefix("journal-")) for action in Action if "journal-" in action
}
NO_EFFECT: Final = frozenset({Action.REFUSE, Action.SEND_OPEN})

SOURCE_HEARS: Final = {
    Message.READY: (SourceEvent.READY_IN_TIME, SourceEvent.READY_LATE),
    Message.NO: (SourceEvent.NO,),
    Message.RUNNING: (SourceEvent.RUNNING,),
    Message.DISCARDED: (SourceEvent.DISCARDED,),
}
DESTINATION_HEARS: Final = {Message.COMMIT: DestinationEvent.COMMIT, Message.ABORT: DestinationEvent.ABORT}


class Source:
    """The moves of the source host."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def begin(self) -> SourceSide:
        """The guest runs and nothing was tried yet."""
        return SourceSide(0, SourceState.ABORTED, (), (), Guest.RUNS, False, False)

    def moves(self, side: SourceSide) -> Iterator[Move]:
        """Everything that can happen next on the source."""
        if side.guest in (Guest.RUNS, Guest.HALTED) and side.attempt:
            yield Move("the VMM dies", side._replace(guest=Guest.DEAD), fault=True)
        if side.attempt:
            state = self._model.source_state_of(side.journal)
            restarted = side._replace(state=state, tasks=(), fresh=False, asking=False)
            yield self._take("the daemon dies and restarts", restarted, SourceEvent.RESTART, fault=True)
        if side.tasks:
            yield self._task(side)
            if side.tasks[0] in JOURNALS:
                yield self._journal_fails(side)
            return
        if side.asking:
            yield Move("asks again", side, sends=Message.COMMIT.bit(self._model.epoch(side.attempt)))
        if side.state is SourceState.ABORTED and side.guest is Guest.RUNS and side.attempt < len(self._model.epochs):
            attempt = side.attempt + 1
            begun = SourceSide(attempt, SourceState.RUNNING, (), (Decision.BEGIN,), Guest.RUNS, True, False)
            yield Move(f"begins attempt {attempt}", begun, sends=Message.HELLO.bit(attempt), fault=True)
        if side.attempt:
            yield from self._events(side)

    def _events(self, side: SourceSide) -> Iterator[Move]:
        if side.state is SourceState.RUNNING:
            yield self._take("stops the guest", side, SourceEvent.STOP, chores=(Chore.SEND_STATE,))
        if side.fresh:
            yield self._take("finds the link lost", side, SourceEvent.LINK_LOST)
            if side.state is not SourceState.RUNNING:
                yield self._take("passes its deadline", side, SourceEvent.DEADLINE)
        yield self._take("has a fault", side, SourceEvent.FAULT, fault=True)
        yield self._take("is cancelled", side, SourceEvent.CANCEL, fault=True)
        if side.state is SourceState.COMMITTED:
            for event, guard in (
                (SourceEvent.RESOLVE_RUN_HERE, Guard.DISCARDED_THERE),
                (SourceEvent.RESOLVE_DISCARD, Guard.RUNS_THERE),
            ):
                yield self._take("is resolved", side, event, fault=True)._replace(guard=guard)
        for message, events in SOURCE_HEARS.items():
            for epoch in set(self._model.epochs):
                if self._model.counts(self._model.epoch(side.attempt), epoch):
                    for event in events:
                        yield self._take(f"hears {message.name}({epoch})", side, event)._replace(
                            needs=message.bit(epoch)
                        )

    def _take(
        self, label: str, side: SourceSide, event: SourceEvent, *, fault: bool = False, chores: tuple[Task, ...] = ()
    ) -> Move:
        machine = Machine("source", self._model.source, side.state)
        try:
            actions = machine.take(event)
        except IllegalEventError as error:
            return Move(f"{label}: {event}", side, wrong=f"{ILLEGAL}: {error}")
        asking = side.asking and machine.state is SourceState.COMMITTED
        after = side._replace(state=machine.state, tasks=side.tasks + actions + chores, asking=asking)
        return Move(f"{label}: {event} -> {machine.state}", after, fault=fault, row=(side.state, event))

    def _journal_fails(self, side: SourceSide) -> Move:
        """Without COMMIT in the journal nothing that follows it happens; what the destination proved stays true."""
        task, *rest = side.tasks
        label = f"{task} fails"
        if task is not Action.JOURNAL_COMMIT:
            return Move(label, side._replace(tasks=tuple(rest)), fault=True)
        return self._take(label, side._replace(tasks=()), SourceEvent.JOURNAL_FAILED, fault=True)

    def _task(self, side: SourceSide) -> Move:
        task, *rest = side.tasks
        after = side._replace(tasks=tuple(rest))
        match task:
            case Action.STOP_GUEST:
                after = after._replace(guest=Guest.HALTED if side.guest is Guest.RUNS else side.guest)
            case Action.RESUME_GUEST:
                after = after._replace(guest=Guest.RUNS if side.guest is Guest.HALTED else side.guest)
            case Action.RETIRE_GUEST:
                after = after._replace(guest=Guest.NONE)
            case Chore.SEND_STATE:
                sends = 0 if side.guest is Guest.DEAD else Message.STATE.bit(side.attempt)
                return Move(str(task), after, sends=sends)
            case Action.ASK_OUTCOME:
                after = after._replace(asking=True)
            case _ if task in JOURNALS:
                after = after._replace(journal=_append(side.journal, JOURNALS[task]))
            case _ if task not in SENDS and task not in NO_EFFECT:
                return Move(str(task), side, wrong=f"{ILLEGAL}: the source cannot {task}")
        return Move(str(task), after, sends=_sends(task, self._model.epoch(side.attempt)))


class Destination:
    """The moves of the destination host."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def begin(self) -> DestinationSide:
        """Nothing of the guest is known."""
        return DestinationSide(0, DestinationState.DISCARDED, (), (), Guest.NONE, False, False)

    def moves(self, side: DestinationSide) -> Iterator[Move]:
        """Everything that can happen next on the destination."""
        if side.guest in (Guest.RUNS, Guest.HALTED, Guest.EMPTY):
            yield Move("the VMM dies", side._replace(guest=Guest.DEAD), fault=True)
        if side.attempt:
            restarted = side._replace(state=self._model.destination_state_of(side.journal), tasks=(), fresh=False)
            yield self._take("the daemon dies and restarts", restarted, DestinationEvent.RESTART, fault=True)
        if side.tasks:
            yield from self._task(side)
            if side.tasks[0] in JOURNALS:
                yield self._journal_fails(side)
            if not isinstance(side.tasks[0], DestinationEvent):
                return
            # Another event may get in between a resume and the report of its result.
        for attempt in range(side.attempt + 1, len(self._model.epochs) + 1):
            yield from self._hello(side, attempt)
        if side.attempt:
            yield from self._events(side)

    def _hello(self, side: DestinationSide, attempt: int) -> Iterator[Move]:
        """A newer epoch says that the source took the older one back."""
        needs = Message.HELLO.bit(attempt)
        label = f"hears HELLO of attempt {attempt}"
        if side.state is DestinationState.DISCARDED:
            begun = DestinationSide(
                attempt, DestinationState.LOADING, (), (Decision.BEGIN,), Guest.EMPTY, True, side.ran
            )
            yield Move(label, begun, needs=needs)
        elif side.state in (DestinationState.LOADING, DestinationState.READY):
            yield self._take(label, side, DestinationEvent.ABORT)._replace(needs=needs)

    def _events(self, side: DestinationSide) -> Iterator[Move]:
        if side.state is DestinationState.LOADING and side.guest is Guest.EMPTY:
            yield Move("has the whole state", side._replace(guest=Guest.HALTED), needs=Message.STATE.bit(side.attempt))
        complete = side.state is DestinationState.LOADING and side.guest is Guest.HALTED
        if complete or (side.state is DestinationState.DISCARDED and side.fresh):
            yield self._take("has loaded", side, DestinationEvent.LOADED)
        if side.fresh:
            yield self._take("finds the link lost", side, DestinationEvent.LINK_LOST)
            yield self._take("passes its limit", side, DestinationEvent.LIMIT)
        if side.state is not DestinationState.LOADING:
            yield self._take("waited long enough", side, DestinationEvent.READY_TIMEOUT)
        yield self._take("has a fault", side, DestinationEvent.FAULT, fault=True)
        yield self._take("is cancelled", side, DestinationEvent.CANCEL, fault=True)
        for message, event in DESTINATION_HEARS.items():
            for epoch in set(self._model.epochs):
                if self._model.counts(self._model.epoch(side.attempt), epoch):
                    yield self._take(f"hears {message.name}({epoch})", side, event)._replace(needs=message.bit(epoch))

    def _take(self, label: str, side: DestinationSide, event: DestinationEvent, *, fault: bool = False) -> Move:
        machine = Machine("destination", self._model.destination, side.state)
        try:
            actions: tuple[Task, ...] = machine.take(event)
        except IllegalEventError as error:
            return Move(f"{label}: {event}", side, wrong=f"{ILLEGAL}: {error}")
        if event is DestinationEvent.RESTART:
            actions = tuple(Chore.RESUME_AGAIN if task is Action.RESUME_GUEST else task for task in actions)
        after = side._replace(state=machine.state, tasks=actions + side.tasks)
        return Move(f"{label}: {event} -> {machine.state}", after, fault=fault, row=(side.state, event))

    def _journal_fails(self, side: DestinationSide) -> Move:
        """What is not journaled is not told, and neither READY nor COMMIT counts without its record."""
        task, *rest = side.tasks
        label = f"{task} fails"
        match task:
            case Action.JOURNAL_READY | Action.JOURNAL_COMMIT:
                event = DestinationEvent.JOURNAL_FAILED
                return self._take(label, side._replace(tasks=()), event, fault=True)
            case Action.JOURNAL_DISCARD:
                rest = [each for each in rest if each not in (Action.SEND_NO, Action.SEND_DISCARDED)]
        return Move(label, side._replace(tasks=tuple(rest)), fault=True)

    def _task(self, side: DestinationSide) -> Iterator[Move]:
        task, *rest = side.tasks
        after = side._replace(tasks=tuple(rest))
        match task:
            case DestinationEvent():
                yield self._take("reports", after, task)
            case Action.RESUME_GUEST | Chore.RESUME_AGAIN:
                yield from self._resume(after, task)
            case Action.DESTROY_GUEST:
                gone = Guest.DEAD if side.guest is Guest.DEAD else Guest.NONE
                yield Move(str(task), after._replace(guest=gone))
            case _ if task in JOURNALS:
                yield Move(str(task), after._replace(journal=_append(side.journal, JOURNALS[task])))
            case _ if task in SENDS or task in NO_EFFECT:
                yield Move(str(task), after, sends=_sends(task, self._model.epoch(side.attempt)))
            case _:
                yield Move(str(task), side, wrong=f"{ILLEGAL}: the destination cannot {task}")

    def _resume(self, side: DestinationSide, task: Task) -> Iterator[Move]:
        def then(event: DestinationEvent) -> DestinationSide:
            return side._replace(tasks=(event, *side.tasks))

        match side.guest:
            case Guest.RUNS:
                yield Move(f"{task}: runs already", then(DestinationEvent.RESUMED))
            case Guest.HALTED:
                yield Move(str(task), then(DestinationEvent.RESUMED)._replace(guest=Guest.RUNS, ran=True))
                yield Move(f"{task}: fails", then(DestinationEvent.RESUME_FAILED))
            case Guest.EMPTY:
                yield Move(str(task), side, wrong=INCOMPLETE)
            case _:
                truth = DestinationEvent.RESUMED if side.ran else DestinationEvent.RESUME_FAILED
                restarted = task is Chore.RESUME_AGAIN
                yield Move(
                    f"{task}: no VMM", then(self._model.presumes if restarted and not self._model.marks else truth)
                )


def _append(journal: Journal, decision: Decision) -> Journal:
    """The same decision twice says what it said once."""
    return journal if journal[-1] is decision else (*journal, decision)


def _sends(task: Task, epoch: int) -> int:
    message = SENDS.get(task)
    return 0 if message is None else message.bit(epoch)


ILLEGAL: Final = "a legal peer caused an illegal event"
INCOMPLETE: Final = "I4: the destination runs an incomplete guest"
TWO_RUN: Final = "I1: both sides run the guest"
UNCOMMITTED: Final = "I2: the destination runs without a COMMIT in the source's journal"
TAKEN_BACK: Final = "I3: the source runs after COMMIT although the destination can still run the guest"
ROLLED_BACK: Final = "I3: the source runs an older copy of a guest that has run on the destination"
WITHDRAWN: Final = "I6: the destination runs although it voted or answered that it never will"
NO_COPY: Final = "I7: no complete copy of the guest is left"
STUCK: Final = "L1: no way leads to exactly one settled guest without a further fault"


@dataclass(frozen=True)
class Violation:
    """A broken rule and the shortest way to it, one line for each step."""

    rule: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.rule, *(f"{step:4}  {line}" for step, line in enumerate(self.trace, 1))])


@dataclass(frozen=True)
class Exploration:
    """What an exploration found: sizes, time (seconds), the rows of the tables that it used and the first violation,
    if any."""

    states: int
    transitions: int
    liveness_states: int
    seconds: float
    source_rows: frozenset[Row]
    destination_rows: frozenset[Row]
    violation: Violation | None


class _Side:
    """The local states of one host, numbered, with their moves."""

    def __init__(self, host: Source | Destination) -> None:
        self._host = host
        self.sides: list[SideT] = []
        self._number: dict[SideT, int] = {}
        self._moves: list[list[tuple[int, int, int, int, Move]] | None] = []
        self.first = self._intern(host.begin())

    def _intern(self, side: SideT) -> int:
        number = self._number.get(side)
        if number is None:
            number = self._number[side] = len(self.sides)
            if number > SIDE_MASK:
                raise RuntimeError(f"more than {SIDE_MASK} local states on one side: the model is not bounded")
            self.sides.append(side)
            self._moves.append(None)
        return number

    def moves(self, number: int) -> list[tuple[int, int, int, int, Move]]:
        """(needs, sends, guard, number after, move) of each move of a local state."""
        known = self._moves[number]
        if known is None:
            known = self._moves[number] = [
                (move.needs, move.sends, move.guard, self._intern(move.after), move)
                for move in self._host.moves(self.sides[number])  # type: ignore[arg-type]  # a host gets its own sides
            ]
        return known

    def rows(self, taken: set[int]) -> frozenset[Row]:
        """The rows behind the moves whose ids are ``taken``."""
        moves = (move for known in self._moves for *_, move in known or ())
        return frozenset(move.row for move in moves if move.row is not None and id(move) in taken)


SIDE_BITS: Final = 12
SIDE_MASK: Final = (1 << SIDE_BITS) - 1
NET_MASK: Final = (1 << NET_BITS) - 1
DESTINATION_SHIFT: Final = NET_BITS
SOURCE_SHIFT: Final = NET_BITS + SIDE_BITS


class Explorer:
    """One exploration of one model. A global state is one integer: source | destination | network."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._source = _Side(Source(model))
        self._destination = _Side(Destination(model))
        self._rules: dict[int, tuple[str, list[tuple[int, str]]]] = {}

    def run(self, *, only: frozenset[str] = frozenset(), max_states: int = 5_000_000) -> Exploration:
        """Explore breadth first up to the first violation, then check that every state leads to a good end.

        Args:
            only: the rules to watch; all when empty. A step that is wrong by itself is then refused by its daemon.

        Raises:
            RuntimeError: there are more than ``max_states`` states.
        """
        begin = time.monotonic()
        first = self._source.first << SOURCE_SHIFT | self._destination.first << DESTINATION_SHIFT
        parents: dict[int, int] = {first: first}
        queue = [first]
        taken: set[int] = set()
        transitions = 0
        violation = None
        for state in queue:
            for after, who, move in self._steps(state):
                transitions += 1
                taken.add(id(move))
                if move.wrong and only:
                    continue
                if after in parents and not move.wrong:
                    continue
                broken = move.wrong or self._broken(after)
                if broken and (not only or broken in only):
                    last = self._describe(f"{who:12} {move.label}", after)
                    violation = Violation(broken, (*self._trace(parents, state), last))
                    break
                parents[after] = state
                queue.append(after)
            if violation is not None:
                break
            if len(queue) > max_states:
                raise RuntimeError(f"more than {max_states} states: the model is not bounded")
        liveness_states = 0
        if violation is None and (not only or STUCK in only):
            liveness_states, violation = self._liveness(queue, parents)
        return Exploration(
            len(queue),
            transitions,
            liveness_states,
            time.monotonic() - begin,
            self._source.rows(taken),
            self._destination.rows(taken),
            violation,
        )

    def pairs(self) -> Iterator[tuple[SourceSide, DestinationSide]]:
        """The two sides of every state that was reached, each pair once."""
        return (self._pair(pair) for pair in self._rules)

    def _steps(self, state: int, *, faults: bool = True) -> Iterator[tuple[int, str, Move]]:
        net = state & NET_MASK
        source, destination = state >> SOURCE_SHIFT, state >> DESTINATION_SHIFT & SIDE_MASK
        high = source << SOURCE_SHIFT
        for needs, sends, _, after, move in self._destination.moves(destination):
            if needs & ~net == 0 and (faults or not move.fault):
                yield high | after << DESTINATION_SHIFT | net | sends, "destination", move
        low = destination << DESTINATION_SHIFT
        for needs, sends, guard, after, move in self._source.moves(source):
            if needs & ~net == 0 and (faults or not move.fault) and (not guard or self._allows(guard, destination)):
                yield after << SOURCE_SHIFT | low | net | sends, "source", move

    def _allows(self, guard: int, destination: int) -> bool:
        side = self._destination.sides[destination]
        if guard == Guard.RUNS_THERE:
            return side.guest is Guest.RUNS
        return Decision.DISCARD in side.journal and side.guest is not Guest.RUNS

    def _broken(self, state: int) -> str:
        """The rule that a state breaks, or nothing."""
        pair = state >> DESTINATION_SHIFT
        known = self._rules.get(pair)
        if known is None:
            known = self._rules[pair] = self._rules_of(pair)
        broken, forbidden = known
        if not broken:
            for bits, rule in forbidden:
                if state & bits:
                    return rule
        return broken

    def _pair(self, pair: int) -> tuple[SourceSide, DestinationSide]:
        source, destination = self._source.sides[pair >> SIDE_BITS], self._destination.sides[pair & SIDE_MASK]
        assert isinstance(source, SourceSide)
        assert isinstance(destination, DestinationSide)
        return source, destination

    def _rules_of(self, pair: int) -> tuple[str, list[tuple[int, str]]]:
        """What a pair of sides breaks by itself, and the messages that must not have been sent beside it."""
        source, destination = self._pair(pair)
        same = source.attempt == destination.attempt
        runs_here, runs_there = source.guest is Guest.RUNS, destination.guest is Guest.RUNS
        forbidden: list[tuple[int, str]] = []
        broken = ""
        if runs_here and runs_there:
            broken = TWO_RUN
        elif runs_here and destination.ran:
            broken = ROLLED_BACK
        elif runs_there and not (same and Decision.COMMIT in source.journal):
            broken = UNCOMMITTED
        elif runs_there and Decision.DISCARD in destination.journal:
            broken = WITHDRAWN
        elif (source.guest is Guest.NONE and not destination.ran) or (
            destination.ran and destination.guest not in (Guest.RUNS, Guest.DEAD)
        ):
            broken = NO_COPY
        never_there = same and (
            Decision.DISCARD in destination.journal or destination.guest in (Guest.NONE, Guest.DEAD)
        )
        if runs_here and source.attempt and not never_there:
            forbidden.append((Message.COMMIT.bit(self._model.epoch(source.attempt)), TAKEN_BACK))
        if runs_there:
            epoch = self._model.epoch(destination.attempt)
            forbidden.append((Message.NO.bit(epoch) | Message.DISCARDED.bit(epoch), WITHDRAWN))
        return broken, forbidden

    def _liveness(self, states: list[int], parents: dict[int, int]) -> tuple[int, Violation | None]:
        """Whether every state, with all that is in flight lost, can still end well without a further fault.

        Since the way to a good end stays open at every step, every fair run takes it.
        """
        origin: dict[int, int] = {}
        for state in states:
            origin.setdefault(state & ~NET_MASK, state)
        closure: dict[int, int] = {}
        before: dict[int, list[int]] = {}
        queue = []
        for state, whence in origin.items():
            if self._pair(state >> DESTINATION_SHIFT)[0].guest is not Guest.DEAD:
                closure[state] = whence
                queue.append(state)
        for state in queue:
            for after, _, _ in self._steps(state, faults=False):
                before.setdefault(after, []).append(state)
                if after not in closure:
                    closure[after] = closure[state]
                    queue.append(after)
        good = [state for state in queue if self._settled(state)]
        reached = set(good)
        for state in good:
            for earlier in before.get(state, ()):
                if earlier not in reached:
                    reached.add(earlier)
                    good.append(earlier)
        for state in queue:
            if state not in reached:
                whence = closure[state]
                lost = ("", "from here on everything in flight is lost and nothing else fails:")
                return len(queue), Violation(STUCK, (*self._trace(parents, whence), *lost, self._describe("", state)))
        return len(queue), None

    def _settled(self, state: int) -> bool:
        """One side runs the guest and both know; or the guest died with its VMM on the destination."""
        source, destination = self._pair(state >> DESTINATION_SHIFT)
        if source.tasks or destination.tasks:
            return False
        if source.state is SourceState.ABORTED:
            return source.guest is Guest.RUNS and destination.state is DestinationState.DISCARDED
        if destination.guest is Guest.DEAD and destination.state in (
            DestinationState.COMMITTED,
            DestinationState.RUNNING,
        ):
            return source.state in (SourceState.COMMITTED, SourceState.RETIRED)
        return (
            source.state is SourceState.RETIRED
            and destination.state is DestinationState.RUNNING
            and destination.guest is Guest.RUNS
        )

    def _trace(self, parents: dict[int, int], state: int) -> tuple[str, ...]:
        lines = []
        while parents[state] != state:
            before = parents[state]
            who, label = next((who, move.label) for after, who, move in self._steps(before) if after == state)
            lines.append(self._describe(f"{who:12} {label}", state))
            state = before
        return tuple(reversed(lines))

    def _describe(self, line: str, state: int) -> str:
        source, destination = self._pair(state >> DESTINATION_SHIFT)
        return (
            f"{line:62} | source {source.state}, guest {source.guest} "
            f"| destination {destination.state}, guest {destination.guest}"
        )


def explore(model: Model | None = None, *, only: frozenset[str] = frozenset()) -> Exploration:
    """Explore a model, the real one by default, and watch all rules or some."""
    return Explorer(model or Model()).run(only=only)
