"""The common part of both simulated daemons: a journal that outlives them, and a hand-over that takes one event at a
time.

The executor that ships says what is done and what follows; here effects only take time, and may be cut short by a
crash.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, TypeAlias, TypeVar

from protocol import effects
from protocol.effects import DONE, Outcome, failed
from protocol.executor import Executor
from protocol.handover import Decision, IllegalEventError
from scripts.proof.kernel import Call, Process, Steps
from scripts.proof.network import Channel

STEP_NS: Final = 20_000
"""Time that a daemon needs for an effect by itself; a crash can fall into it."""
WRITE_NS: Final = 60_000
"""Time to write a line in the journal or a mark."""

StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT", bound=StrEnum)
EffectT = TypeVar("EffectT")
Deed: TypeAlias = Generator[int | Callable[[Call], None], None, Outcome]
"""Carries an effect out, like ``Steps``, and returns how it ended."""


@dataclass
class Attempt:
    """The entries of a journal on one attempt."""

    migration_id: str
    epoch: int
    decisions: list[Decision] = field(default_factory=lambda: [Decision.BEGIN])
    closed: bool = False


class Actor(ABC, Generic[StateT, EventT, EffectT]):
    """One side of one epoch, carried out by one life of a daemon.

    Args:
        process: the daemon.
        attempt: its journal.
        core: the executor.
    """

    def __init__(self, process: Process, attempt: Attempt, core: Executor[StateT, EventT, EffectT]) -> None:
        self.process = process
        self.world = process.world
        self.host = process.host
        self.attempt = attempt
        self.core = core
        self._queue: deque[tuple[EventT, Channel | None, str]] = deque()
        self._busy = False

    @property
    def state(self) -> StateT:
        """The hand-over's state."""
        return self.core.state

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
            before = self.core.state
            self._legal(lambda event=event, why=why: self.core.take(event, why or None))  # type: ignore[misc]  # bound per event
            self._say(before, f"{event} {why}".rstrip())
            self._busy = True
            self.process.start(self._drive(event, reply))

    def _drive(self, event: EventT, reply: Channel | None) -> Steps:
        while (effect := self.core.effect) is not None:
            before = self.core.state
            outcome = yield from self._timed(effect, reply)
            self._legal(lambda outcome=outcome: self.core.done(outcome))  # type: ignore[misc]  # bound per outcome
            self._say(before, f"{type(effect).__name__} {outcome.result}")
        self._busy = False
        self.settled(event)
        self._pump()

    def _timed(self, effect: EffectT, reply: Channel | None) -> Deed:
        if isinstance(effect, effects.Journal | effects.WriteMark | effects.WithdrawMark):
            yield WRITE_NS
            if self.host.disk_full:
                self.world.say(self.host.name, f"{effect} fails")
                return failed("the disk is full")
            if isinstance(effect, effects.Journal):
                self.attempt.decisions.append(effect.decision)
            return DONE
        yield STEP_NS
        return (yield from self.carry_out(effect, reply))

    def _legal(self, deed: Callable[[], object]) -> None:
        try:
            deed()
        except IllegalEventError as error:
            self.world.require(False, f"honest daemons never break the hand-over: {error}")
            raise

    def _say(self, before: StateT, why: str) -> None:
        if before is not self.core.state:
            self.world.say(self.host.name, f"{before} -> {self.core.state}: {why}")

    @abstractmethod
    def carry_out(self, effect: EffectT, reply: Channel | None) -> Deed:
        """Carry one effect out that is not written down."""

    @abstractmethod
    def settled(self, event: EventT) -> None:
        """All that an event asked for is done."""
