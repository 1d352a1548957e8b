"""Every interleaving of the two sides of the hand-over, a bad network, crashes and restarts, breadth first.

    source side  --moves-->                                  <--moves--  destination side
    (attempt, executor,       \\                            /   (attempt, executor,
     journal, guest, lock)     `-->  messages ever sent  <-'     journal, guest, lock)

The network is the set of messages ever sent. Each of them may be delivered at any time, any number of times, in any
order, or never: loss, duplication, delay and reordering without a bound, and no message is ever out of the way. The
executors that ship (``protocol.executor``) give their effects one at a time, so that a crash falls between any two,
and the other side moves between any two. A crash keeps the journal, the marks and the guest (a VMM outlives its
daemon); what was in memory is gone, and the daemon comes up with RESTART. Timers, faults and the operator act whenever
they can. A VMM may die at any time. After an abort the source tries again with the next epoch, and everything of the
first is still in the network.

Where memory is handed over and not copied, the destination's VMM has the memory that the source's guest runs in. What
it writes before it may run must not be in there when the source goes on, whoever dies on the way.

In a fleet there is a third party, its store (``scripts.proof.store``): requests to it are lost, answered too late or
carried out late; an operator fences hosts at any moment, before it is true as well; and a third host starts the guest
as soon as the store lets it and the operator's word is true. A dead daemon then stays dead for a while.

The explorer watches the guests. Nobody here relies on the ownership lock to keep two guests apart (it need not be on a
directory that both hosts share): only the order in which it is taken and let go of is watched. A model of its own
(``scripts.proof.store.SharedLock``) has a lock that all hosts share and operators whose word is not true: what keeps
the guest from running twice, or from running again as it was once, is then the lock with the fencing token in it.

The module is longer than others because moves, rules and the search share how a state is packed into an integer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocol.handover import Decision, DestinationState, SourceState
from scripts.proof.hosts import Destination, Source
from scripts.proof.model import (
    NET_BITS,
    DestinationSide,
    Guard,
    Guest,
    Message,
    Model,
    Move,
    Row,
    SideT,
    SourceSide,
)
from scripts.proof.store import DESTINATION_HOST, SOURCE_HOST, Owned, Rules

TWO_RUN: Final = "I1: two hosts run the guest"
UNCOMMITTED: Final = "I2: the destination runs without a COMMIT in the source's journal"
TAKEN_BACK: Final = "I3: the source runs after COMMIT although the destination can still run the guest"
ROLLED_BACK: Final = "I3: the source runs an older copy of a guest that has run on the destination"
WITHDRAWN: Final = "I6: the destination runs although it voted or answered that it never will"
NO_COPY: Final = "I7: no complete copy of the guest is left"
UNLOCKED: Final = "I8: a guest runs without its ownership lock"
BOTH_LOCK: Final = "I8: both sides need the ownership lock at once: one of them would stay stopped"
BOTH_WRITE: Final = "M1: two VMMs write the same memory"
CHANGED: Final = "M2: the source runs on memory that another VMM has changed"
OVERTAKEN: Final = "O2: a host runs the guest as it was before a third host ran it"
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
    """Result of an exploration: sizes, time (seconds), the rows of the tables that it used and the first violation,
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


class _Store:
    """The states of the fleet's store, numbered, and what moves make of them."""

    def __init__(self) -> None:
        self.states: list[Owned] = []
        self._number: dict[Owned, int] = {}
        self._after: dict[tuple[int, int], int | None] = {}
        self.first = self.intern(Owned())

    def intern(self, owned: Owned) -> int:
        """The number of a state."""
        number = self._number.get(owned)
        if number is None:
            number = self._number[owned] = len(self.states)
            self.states.append(owned)
        return number

    def after(self, move: Move, number: int) -> int | None:
        """The state after a move, None where it cannot be made. A move lives as long as the exploration."""
        if move.store is None:
            return number
        key = (id(move), number)
        if key not in self._after:
            owned = move.store(self.states[number])
            self._after[key] = None if owned is None else self.intern(owned)
        return self._after[key]


SIDE_BITS: Final = 13
SIDE_MASK: Final = (1 << SIDE_BITS) - 1
NET_MASK: Final = (1 << NET_BITS) - 1
DESTINATION_SHIFT: Final = NET_BITS
SOURCE_SHIFT: Final = NET_BITS + SIDE_BITS
STORE_SHIFT: Final = NET_BITS + 2 * SIDE_BITS


class Explorer:
    """One exploration of one model. A global state is one integer: store | source | destination | network."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._source = _Side(Source(model))
        self._destination = _Side(Destination(model))
        self._store = _Store()
        self._rules: dict[int, tuple[str, list[tuple[int, str]]]] = {}

    def run(self, *, only: frozenset[str] = frozenset(), max_states: int = 20_000_000) -> Exploration:
        """Explore breadth first up to the first violation, then check that every state leads to a good end.

        Args:
            only: the rules to watch; all when empty. A step that is wrong by itself is then refused by its daemon.

        Raises:
            RuntimeError: there are more than ``max_states`` states.
        """
        begin = time.monotonic()
        first = self._source.first << SOURCE_SHIFT | self._destination.first << DESTINATION_SHIFT
        first |= self._store.first << STORE_SHIFT
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
                broken = move.wrong or self._watched(move.breaks, only)
                if after in parents and not broken:
                    continue
                broken = broken or self._watched(self._broken(after), only)
                if broken:
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
        """The two sides of every state that was reached, each pair once for each state of the store."""
        return (self._pair(pair) for pair in self._rules)

    @staticmethod
    def _watched(rule: str, only: frozenset[str]) -> str:
        """The rule if it is one that is watched, else nothing."""
        return rule if not only or rule in only else ""

    def _steps(self, state: int, *, faults: bool = True) -> Iterator[tuple[int, str, Move]]:
        net, store = state & NET_MASK, state >> STORE_SHIFT
        source, destination = state >> SOURCE_SHIFT & SIDE_MASK, state >> DESTINATION_SHIFT & SIDE_MASK
        high = source << SOURCE_SHIFT
        for needs, sends, _, after, move in self._destination.moves(destination):
            if needs & ~net == 0 and (faults or not move.fault):
                stored = store if move.store is None else self._store.after(move, store)
                if stored is not None:
                    yield stored << STORE_SHIFT | high | after << DESTINATION_SHIFT | net | sends, "destination", move
        low = destination << DESTINATION_SHIFT
        for needs, sends, guard, after, move in self._source.moves(source):
            if needs & ~net == 0 and (faults or not move.fault) and (not guard or self._allows(guard, state)):
                stored = store if move.store is None else self._store.after(move, store)
                if stored is not None:
                    yield stored << STORE_SHIFT | after << SOURCE_SHIFT | low | net | sends, "source", move
        if faults and self._model.fleet is not None:
            rest = state & ((1 << STORE_SHIFT) - 1)
            for label, owned in self._others(self._model.fleet, state):
                move = Move(label, self._source.sides[source], fault=True)
                yield self._store.intern(owned) << STORE_SHIFT | rest, "others", move

    def _others(self, rules: Rules, state: int) -> Iterator[tuple[str, Owned]]:
        """What else can happen to the store: a delayed request arrives; a host is fenced, and the operator makes sure
        that it runs nothing, and will not before its daemon is restarted; a third host then starts the guest."""
        owned = self._store.states[state >> STORE_SHIFT]
        if owned.elsewhere:
            if rules.lock is not None:
                yield "the guest ends on the third host", owned._replace(elsewhere=False)
            return
        for attempt in range(1, len(self._model.epochs) + 1):
            after = rules.transfer(attempt, yes=True)(owned) if state & Message.TRANSFER.bit(attempt) else None
            if after is not None:
                yield f"a delayed TRANSFER({attempt}) arrives", after
        for host in {SOURCE_HOST, owned.ownership.owner} - owned.fenced:  # of another host it would mean nothing
            yield f"the {host} is fenced", owned._replace(fenced=owned.fenced | {host})
        here, there = self._pair(state >> DESTINATION_SHIFT)
        for host, still in ((SOURCE_HOST, _stands_still(here)), (DESTINATION_HOST, _stands_still(there))):
            if host in owned.fenced - owned.sure and still:
                yield f"the fence of the {host} is true now", owned._replace(sure=owned.sure | {host})
        for host in owned.fenced:
            yield f"the fence of the {host} is withdrawn", owned.without_fence(host)
        may_start = owned.fenced == owned.sure if rules.lock is None else not (here.holds or there.holds)
        if may_start and (after := rules.take(owned)) is not None:
            yield "a third host starts the guest", after

    def _allows(self, guard: int, state: int) -> bool:
        side = self._destination.sides[state >> DESTINATION_SHIFT & SIDE_MASK]
        owned = self._store.states[state >> STORE_SHIFT]
        # Who says that the guest is to run here withdraws the fence first, which says the contrary.
        run_here = not owned.elsewhere and SOURCE_HOST not in owned.fenced
        match guard:
            case Guard.RUNS_THERE:
                return side.guest is Guest.RUNS
            case Guard.DISCARDED_THERE:
                return Decision.DISCARD in side.journal and side.guest is not Guest.RUNS and run_here
            case Guard.ELSEWHERE:
                return owned.elsewhere
            case _:
                return run_here

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
        source = self._source.sides[pair >> SIDE_BITS & SIDE_MASK]
        destination = self._destination.sides[pair & SIDE_MASK]
        assert isinstance(source, SourceSide)
        assert isinstance(destination, DestinationSide)
        return source, destination

    def _rules_of(self, pair: int) -> tuple[str, list[tuple[int, str]]]:
        """Return the rule that a pair of sides breaks by itself (empty for none), and the messages that must not have
        been sent when it is in this state, each with the rule that they break."""
        source, destination = self._pair(pair)
        same = source.attempt == destination.attempt
        runs_here, runs_there = source.guest is Guest.RUNS, destination.guest is Guest.RUNS
        forbidden: list[tuple[int, str]] = []
        broken = ""
        owned = self._store.states[pair >> 2 * SIDE_BITS]
        elsewhere = owned.elsewhere or owned.overtaken
        if runs_here + runs_there + owned.elsewhere > 1:
            broken = TWO_RUN
        elif owned.overtaken and (runs_here or runs_there):
            broken = OVERTAKEN
        elif runs_here and destination.changed:
            broken = CHANGED
        elif runs_here and destination.writes:
            broken = BOTH_WRITE
        elif runs_here and destination.ran:
            broken = ROLLED_BACK
        elif runs_there and not (same and Decision.COMMIT in source.journal):
            broken = UNCOMMITTED
        elif runs_there and Decision.DISCARD in destination.journal:
            broken = WITHDRAWN
        elif elsewhere:
            broken = ""  # both hosts are fenced, or were, and what they hold does not count any more
        elif (source.guest is Guest.NONE and not destination.ran and not self._died_at_the_mark(destination)) or (
            destination.ran and destination.guest not in (Guest.RUNS, Guest.DEAD)
        ):
            broken = NO_COPY
        elif (runs_here and not source.holds) or (runs_there and not destination.holds):
            broken = UNLOCKED
        elif source.holds and destination.holds:
            broken = BOTH_LOCK
        never_there = same and (
            Decision.DISCARD in destination.journal or destination.guest in (Guest.NONE, Guest.DEAD)
        )
        if runs_here and source.attempt and not never_there:
            forbidden.append((Message.COMMIT.bit(self._model.epoch(source.attempt)), TAKEN_BACK))
        if runs_there:
            epoch = self._model.epoch(destination.attempt)
            forbidden.append((Message.NO.bit(epoch) | Message.DISCARDED.bit(epoch), WITHDRAWN))
        return broken, forbidden

    def _died_at_the_mark(self, destination: DestinationSide) -> bool:
        """A VMM that died between the daemon's mark and its first instruction is taken for one that ran: nobody can
        tell, and an older copy must not run. So is one that died with its copies of pages in the guest's memory."""
        return (destination.marked or destination.changed) and destination.guest is Guest.DEAD

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
        if self._model.fleet is not None:
            owned = self._store.states[state >> STORE_SHIFT]
            if owned.fenced or owned.overtaken or source.told_no:
                return True  # an operator has to decide
            if source.down or destination.down or source.reclaims or not self._key_is_true(owned, source, destination):
                return False
        if source.memory.steps or destination.memory.steps:
            return False
        if source.state is SourceState.ABORTED:
            return source.guest is Guest.RUNS and destination.state is DestinationState.DISCARDED
        if destination.guest is Guest.DEAD and destination.state in (
            DestinationState.COMMITTED,
            DestinationState.RUNNING,
        ):
            return source.state in (SourceState.COMMITTED, SourceState.RETIRED)
        # An operator may have seen that it runs where its daemon could not.
        known = destination.state is DestinationState.RUNNING or destination.memory.unsure
        return source.state is SourceState.RETIRED and known and destination.guest is Guest.RUNS

    def _key_is_true(self, owned: Owned, source: SourceSide, destination: DestinationSide) -> bool:
        """The key names the host that runs the guest, and only that."""
        runs = SOURCE_HOST if source.guest is Guest.RUNS else DESTINATION_HOST
        settled = owned.ownership.previous is None or destination.guest is Guest.DEAD
        return owned.ownership.owner == runs and settled

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
        owned = self._store.states[state >> STORE_SHIFT]
        store = "" if self._model.fleet is None else f" | store {_described(owned)}"
        return (
            f"{line:62} | source {source.state}, guest {source.guest} "
            f"| destination {destination.state}, guest {destination.guest}{store}"
        )


def _stands_still(side: SideT) -> bool:
    """Nothing can run the guest here before the daemon is restarted."""
    return side.guest is not Guest.RUNS and (side.down or side.guest in (Guest.DEAD, Guest.NONE))


def _described(owned: Owned) -> str:
    """The store's state for people."""
    key = owned.ownership
    previous = f" from {key.previous}" if key.previous else ""
    fenced = "".join(f", {host} fenced" for host in sorted(owned.fenced))
    return f"{key.owner}{previous}{fenced}"


def explore(model: Model | None = None, *, only: frozenset[str] = frozenset()) -> Exploration:
    """Explore a model, the real one by default, and watch all rules or some."""
    return Explorer(model or Model()).run(only=only)
