"""The two hosts as the explorer sees them: which moves each can make next, driven by the executors that ship.

    (attempt, executor's memory, journal, guest, lock, ...)  --event or outcome of an effect-->  the same, a step later

A move is one event that an idle executor takes, one outcome of the effect that it waits for, a crash, or a message on
its way (``scripts.proof.hosts``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple, TypeAlias

from protocol import answers
from protocol.blackout import DestinationBudget, SourceBudget
from protocol.effects import Result
from protocol.errors import RemoteProtocolError
from protocol.executor import DestinationExecutor, Memory, SourceExecutor
from protocol.handover import (
    DESTINATION,
    SOURCE,
    Decision,
    DestinationEvent,
    DestinationState,
    DestinationTable,
    SourceEvent,
    SourceState,
    SourceTable,
    check_epoch,
    destination_state_of,
    source_state_of,
)
from scripts.proof.store import Rules, StoreStep

MAX_ATTEMPTS: Final = 3

ILLEGAL: Final = "a legal peer caused an illegal event"
INCOMPLETE: Final = "I4: the destination runs an incomplete guest"
NOT_JOURNALED: Final = "I5: a decision is told that the journal does not hold"
NOT_THE_OWNER: Final = "O1: the source runs a guest of which the fleet's store said that it is not its own"
LOCK_KEPT: Final = "I8: COMMIT is told while the source keeps the ownership lock: the destination would stay stopped"


class Message(IntEnum):
    """A message on the network. HELLO and STATE belong to a connection (an attempt), the others name an epoch."""

    HELLO = 0
    STATE = 1
    READY = 2
    NO = 3
    COMMIT = 4
    ABORT = 5
    RUNNING = 6
    DISCARDED = 7
    TRANSFER = 8
    """To the fleet's store: make the destination the owner."""

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


ALIVE: Final = frozenset({Guest.EMPTY, Guest.HALTED, Guest.RUNS})


class Marks(StrEnum):
    """The evidence by which a daemon that finds no VMM knows whether its guest ran."""

    VMM = "vmm"
    """A log that the VMM itself writes before its vCPUs run: exact."""
    DAEMON = "daemon"
    """The daemon's own mark, written before it asks the VMM to run the guest."""
    NONE = "none"
    """Nothing: a restarted daemon presumes."""


@dataclass(frozen=True)
class HandedOver:
    """What drivers promise of memory that goes from one VMM to another as it is. A mutant breaks one promise.

    Attributes:
        private: until its guest is resumed, nothing that the new VMM writes reaches the memory.
        puts_back: a daemon that let it reach the memory puts back what was there, once it has ended a VMM whose guest
            did not run.
        counts: where that cannot be done any more, the guest counts as one that ran.
    """

    private: bool = True
    puts_back: bool = True
    counts: bool = True


Journal: TypeAlias = tuple[Decision, ...]
Row: TypeAlias = tuple[SourceState, SourceEvent] | tuple[DestinationState, DestinationEvent]


class SourceSide(NamedTuple):
    """The source host.

    Attributes:
        memory: of the executor.
        fresh: the daemon has not restarted since the attempt began, so its connection and its timers exist.
        sending: the guest is stopped and its last state is not sent yet.
        holds: the guest's process holds the ownership lock.
        down: the daemon is dead and not restarted yet; only in a fleet, where others act on it.
        told_no: the fleet's store said that the guest is not this host's.
        reclaims, asks: what the daemon still has to tell the store, and to ask it.
    """

    attempt: int
    memory: Memory[SourceState]
    journal: Journal
    guest: Guest
    fresh: bool
    sending: bool
    holds: bool
    down: bool = False
    told_no: bool = False
    reclaims: bool = False
    asks: bool = False

    @property
    def state(self) -> SourceState:
        """The hand-over's state."""
        return self.memory.state


class DestinationSide(NamedTuple):
    """The destination host. ``attempt`` 0: it has not heard of the guest.

    Attributes:
        ran: the guest has run here.
        marked: the daemon's mark says that it did.
        down: the daemon is dead and not restarted yet; only in a fleet.
        writes: where memory is handed over: what the VMM writes from now on reaches it.
        changed: what it wrote while it loaded is in it.
        undo: its daemon has what was there before.
    """

    attempt: int
    memory: Memory[DestinationState]
    journal: Journal
    guest: Guest
    fresh: bool
    ran: bool
    marked: bool
    holds: bool
    down: bool = False
    writes: bool = False
    changed: bool = False
    undo: bool = False

    @property
    def changed_for_good(self) -> bool:
        """Whether what it wrote while it loaded is in the memory, and nobody can undo that."""
        return self.changed and not self.undo

    @property
    def state(self) -> DestinationState:
        """The hand-over's state."""
        return self.memory.state


SideT: TypeAlias = SourceSide | DestinationSide


class Guard(IntEnum):
    """A condition on others for a move of the source, which an operator has made sure of."""

    NONE = 0
    RUNS_THERE = 1
    DISCARDED_THERE = 2
    NOT_ELSEWHERE = 3
    ELSEWHERE = 4


class Move(NamedTuple):
    """One step of one side.

    ``needs`` is the message that it takes (0: none), ``sends`` what it adds to the network. ``fault`` marks what no
    progress may depend on: crashes, failures, the operator and the retry. ``wrong`` says why a daemon would refuse the
    step, ``breaks`` names a rule that it breaks by itself. ``row`` is the table's row that decided it. ``store`` is
    what it does to the fleet's store: the move can be made only where that is possible.
    """

    label: str
    after: SideT
    needs: int = 0
    sends: int = 0
    fault: bool = False
    guard: Guard = Guard.NONE
    wrong: str = ""
    breaks: str = ""
    row: Row | None = None
    store: StoreStep | None = None


@dataclass(frozen=True)
class Model:
    """The rules that are explored or simulated: the tables, the executors and the rules beside them. A mutant replaces
    one.

    The budgets are for the simulator: the explorer knows no time, and lets every deadline pass at any moment.

    Attributes:
        epochs: the epoch of each attempt, at most MAX_ATTEMPTS of them.
        marks: what a daemon that finds no VMM goes by.
        presumes: what it goes by without marks.
        handed_over: what holds for memory that is handed over; None where memory is copied.
        fleet: the rules of ownership in a fleet's store; None without one.
        calm: journals can be written, VMMs live and answer, and nobody cancels: what is explored without a fleet is
            left out.
    """

    source: SourceTable = field(default_factory=lambda: SOURCE)
    destination: DestinationTable = field(default_factory=lambda: DESTINATION)
    source_executor: type[SourceExecutor] = SourceExecutor
    destination_executor: type[DestinationExecutor] = DestinationExecutor
    source_budget: type[SourceBudget] = SourceBudget
    destination_budget: type[DestinationBudget] = DestinationBudget
    source_state_of: Callable[[Iterable[Decision]], SourceState] = source_state_of
    destination_state_of: Callable[[Iterable[Decision]], DestinationState] = destination_state_of
    newer_epoch: Callable[[DestinationState], DestinationEvent | None] = answers.newer_epoch
    check_epoch: Callable[[int, int], bool] = check_epoch
    epochs: tuple[int, ...] = (1, 2)
    marks: Marks = Marks.VMM
    presumes: Result = Result.NEVER_RAN
    handed_over: HandedOver | None = None
    fleet: Rules | None = None
    calm: bool = False

    def epoch(self, attempt: int) -> int:
        """The epoch that messages of this attempt name."""
        return self.epochs[attempt - 1]

    def counts(self, current: int, received: int) -> bool:
        """Whether a message of epoch ``received`` gets as far as the executor."""
        try:
            return self.check_epoch(current, received)
        except RemoteProtocolError:
            return False

    def source_at(self, memory: Memory[SourceState]) -> SourceExecutor:
        """The source's executor where it was."""
        one = self.source_executor(locks=True, fleet=self.fleet is not None, table=self.source)
        one.recall(memory)
        return one

    def destination_at(self, memory: Memory[DestinationState]) -> DestinationExecutor:
        """The destination's executor where it was."""
        one = self.destination_executor(locks=True, fleet=self.fleet is not None, table=self.destination)
        one.recall(memory)
        return one
