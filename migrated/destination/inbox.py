"""The events of an incoming attempt, as items of one queue: the actor takes one at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

from migrated.destination.pages import RoundReceived
from migrated.destination.states import ArrivedState
from migrated.link.control import Received
from migrated.link.reply import Reply
from protocol.handover import DestinationEvent
from protocol.messages import NoCause


@dataclass(frozen=True, slots=True)
class RoundArrived:
    """A round is complete on every data channel."""

    number: int
    received: RoundReceived


@dataclass(frozen=True, slots=True)
class Broken:
    """A failure: the event that it means for the hand-over, and the reason."""

    event: DestinationEvent
    cause: NoCause
    reason: str | None


@dataclass(frozen=True, slots=True)
class OutcomeAsked:
    """The source tells its decision over a fresh connection."""

    decision: DestinationEvent
    reply: Reply


@dataclass(frozen=True, slots=True)
class LoadingDone:
    """Loading ended: the guest has been complete since this instant (monotonic, ns)."""

    at_ns: int


Item: TypeAlias = Received | RoundArrived | ArrivedState | Broken | OutcomeAsked | LoadingDone
Inbox: TypeAlias = asyncio.Queue[Item]
