"""What both simulated daemons share: a journal that outlives them, and a hand-over that takes one event at a time.

The dispatch is the daemons': an action is carried out when the one before it is done, a decision that cannot be
journaled is not told, and a COMMIT or READY that cannot be journaled becomes JOURNAL_FAILED.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, TypeVar

from protocol.handover import Action, Decision, IllegalEventError, Machine
from scripts.proof.kernel import Process, Steps
from scripts.proof.network import Channel

STEP_NS: Final = 20_000
"""What a daemon needs for an action by itself; a crash can fall into it."""
JOURNAL_NS: Final = 60_000

StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT", bound=StrEnum)


@dataclass
class Attempt:
    """What a journal knows of one attempt."""

    migration_id: str
    epoch: int
    decisions: list[Decision] = field(default_factory=lambda: [Decision.BEGIN])
    closed: bool = False


class Actor(ABC, Generic[StateT, EventT]):
    """One side of one epoch, carried out by one life of a daemon.

    Args:
        process: the daemon.
        attempt: its journal.
        machine: its rules.
        journal_failed: the event for a decision that cannot be journaled.
    """

    def __init__(
        self, process: Process, attempt: Attempt, machine: Machine[StateT, EventT], journal_failed: EventT
    ) -> None:
        self.process = process
        self.world = process.world
        self.host = process.host
        self.attempt = attempt
        self.machine = machine
        self._journal_failed = journal_failed
        self._queue: deque[tuple[EventT, Channel | None, str]] = deque()
        self._busy = False

    @property
    def idle(self) -> bool:
        """Nothing is being carried out and nothing waits."""
        return not self._busy and not self._queue

    def take(self, event: EventT, reply: Channel | None = None, why: str = "") -> None:
        """Something happened; answers go to ``reply``."""
        self._queue.append((event, reply, why))
        self._pump()

    def _pump(self) -> None:
        while self._queue and not self._busy:
            event, reply, why = self._queue.popleft()
            before = self.machine.state
            try:
                actions = self.machine.take(event)
            except IllegalEventError as error:
                self.world.require(False, f"honest daemons never break the hand-over: {error}")
                raise
            if before is not self.machine.state:
                self.world.say(self.host.name, f"{before} -> {self.machine.state}: {event} {why}".rstrip())
            self._busy = True
            self.process.start(self._carry_out(event, actions, reply))

    def _carry_out(self, event: EventT, actions: tuple[Action, ...], reply: Channel | None) -> Steps:
        pending = deque(actions)
        unproved = False
        while pending:
            action = pending.popleft()
            if unproved and action in (Action.SEND_NO, Action.SEND_DISCARDED):
                continue
            if action.startswith("journal-"):
                yield JOURNAL_NS
                if not self.host.disk_full:
                    self.attempt.decisions.append(Decision(action.removeprefix("journal-")))
                    continue
                self.world.say(self.host.name, f"{action} fails")
                if action is Action.JOURNAL_COMMIT or action is Action.JOURNAL_READY:
                    pending = deque(self.machine.take(self._journal_failed))
                unproved = action is Action.JOURNAL_DISCARD
            else:
                yield STEP_NS
                yield from self.act(action, reply)
        self._busy = False
        self.settled(event)
        self._pump()

    @abstractmethod
    def act(self, action: Action, reply: Channel | None) -> Steps:
        """Carry one action out."""

    @abstractmethod
    def settled(self, event: EventT) -> None:
        """All actions of an event are done."""
