"""An offer as the source sent it, and the refusal that may answer it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from migrated.base.errors import GuestHereError, LinkLostError, NoRoomError
from migrated.destination.inbox import Broken, Inbox
from migrated.destination.origin import Origin
from migrated.destination.view import View
from migrated.link.control import ControlChannel
from migrated.observe.progress import Progress
from migrated.vmm.seam import Replacement
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest import PAGE_SIZE
from protocol.handover import DestinationEvent
from protocol.versions import SHARED

RefusalKind: TypeAlias = Literal["role", "busy", "room", "memory", "used", "owner", "epoch", "guest", "cordon"]
"""The reason of a refusal, as the metric counts it: this host's role, attempts under way, guests here, free memory, a
migration id or a guest that is another's, an epoch that cannot be, what is offered, or that this host is cordoned."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason for which an offer is not taken, as code, sentence and kind."""

    code: ErrorCode
    reason: str
    kind: RefusalKind

    @classmethod
    def because_of(cls, error: Exception) -> Refusal:
        """Return the refusal for an error that happened while the offer was taken."""
        code = ErrorCode.GUEST_MISMATCH
        if isinstance(error, RemoteProtocolError):
            code = error.code
        elif isinstance(error, GuestHereError):
            code = ErrorCode.GUEST_EXISTS
        return cls(code, str(error), "room" if isinstance(error, NoRoomError) else "guest")

    def tell(self, control: ControlChannel) -> None:
        """Send the refusal, if the channel still stands."""
        with contextlib.suppress(LinkLostError):
            control.send(messages.Refuse(code=int(self.code), reason=self.reason[:2000]))


@dataclass(frozen=True, slots=True)
class Offer:
    """A source's offer, with the objects that stay in use until the end of the attempt.

    Attributes:
        control: the session's control channel, started.
        hello: the offer.
        view: the operator's view of the attempt.
        inbox: events of the attempt, which wait here until the offer is taken.
        replacement: what an operator wants of the new VMM, when this daemon itself offers a guest that it has; None for
            an offer of another daemon.
    """

    control: ControlChannel
    hello: messages.Hello
    view: View
    inbox: Inbox = field(default_factory=asyncio.Queue)
    replacement: Replacement | None = None

    @property
    def memory(self) -> tuple[int, ...]:
        """Descriptors of the guest's memory, empty when it shall be copied."""
        return self.control.descriptors if SHARED in self.hello.capabilities else ()

    @property
    def promised_bytes(self) -> int:
        """Memory that the guest may still come to need, as far as can be told."""
        if self.memory:
            return 0
        memory_bytes = self.hello.guest.memory_bytes
        return memory_bytes - min(memory_bytes, self.view.tally.normal_pages * PAGE_SIZE)

    @property
    def origin(self) -> Origin:
        """The host that the guest comes from."""
        return Origin(self.control.peer, self.control.names)

    def cancel(self, reason: str) -> None:
        """Give the attempt up from this side."""
        self.inbox.put_nowait(Broken(DestinationEvent.CANCEL, "cancelled", reason))

    def guest_gone(self) -> None:
        """The incoming guest's process ended by itself."""
        self.inbox.put_nowait(Broken(DestinationEvent.FAULT, "fault", "the incoming guest's process ended"))

    def progress(self) -> Progress:
        """A snapshot while the offer is checked, or after it was refused."""
        return self.view.progress("negotiating", self.hello.limits, None)
