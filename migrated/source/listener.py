"""The reader of the control channel on the source: it hands each message of the destination to the code that waits for
it."""

from __future__ import annotations

import asyncio

import structlog

from migrated.base.errors import CancelledByOperatorError, DocumentError, LinkLostError, MigrationError
from migrated.link.control import ControlChannel, Received
from migrated.observe.progress import Acknowledged
from migrated.record.model import DestinationHalf
from migrated.record.received import read_received
from migrated.source.interruption import Interruption
from migrated.source.ledger import OutgoingLedger
from migrated.source.switchover import Happened, Item
from protocol import messages
from protocol.handover import SourceEvent

log = structlog.get_logger()


class Listener:
    """Reads the control channel of one attempt.

    Args:
        ledger: gets the destination's half of the record.
        interruption: is told when the destination gives up, or the channel is lost.
        inbox: gets what concerns the hand-over.

    Attributes:
        acknowledged: figures that the destination reported, for operators.
        reported: set when its half of the record came, or will not come any more.
        time_ask: the newest TIME_ASK that came while the guest ran, to be answered at the stop; None before.
    """

    def __init__(self, ledger: OutgoingLedger, interruption: Interruption, inbox: asyncio.Queue[Item]) -> None:
        self.acknowledged = Acknowledged()
        self.reported = asyncio.Event()
        self.time_ask: Received | None = None
        self._ledger = ledger
        self._interruption = interruption
        self._inbox = inbox
        self._reported_once = False
        self._round_done: dict[int, asyncio.Future[messages.RoundDone]] = {}
        """Of rounds that were announced and are not acknowledged, by number."""

    def round_done(self, number: int) -> asyncio.Future[messages.RoundDone]:
        """A future whose result is the acknowledgement of a round that has just been announced."""
        future = self._round_done[number] = asyncio.get_running_loop().create_future()
        return future

    async def listen(self, control: ControlChannel) -> None:
        """Read until the channel is lost; its loss is an event for the hand-over."""
        try:
            while True:
                received = await control.receive()
                self._note(received.message)
                match received.message:
                    case messages.RoundDone(round=number) if (done := self._round_done.pop(number, None)) is not None:
                        if not done.done():  # nobody waits for it any more
                            done.set_result(received.message)
                    case messages.Report():
                        await self._take_report(received.payload)
                    case messages.No(reason=reason, cause=cause) if self._interruption.undisturbed:
                        kind = CancelledByOperatorError if cause == "cancelled" else MigrationError
                        self._give_up(kind(f"the destination gave up: {reason}"))
                    case messages.TimeAsk() if self._interruption.undisturbed:
                        self.time_ask = received
                    case message if self._interruption.undisturbed and self._interruption.error is None:
                        self._give_up(MigrationError(f"the destination sent {message.TYPE.name} out of turn"))
                    case messages.RoundDone():
                        pass  # a round of the blackout: the vote will say whether it is there
                    case _:
                        self._inbox.put_nowait(received)
        except LinkLostError as error:
            self._give_up(error)
            self._inbox.put_nowait(Happened(SourceEvent.LINK_LOST, f"the connection was lost: {error}"))

    def _give_up(self, error: MigrationError) -> None:
        """End the rounds with an error, in the middle of one too; without effect once the guest is stopped."""
        if self._interruption.undisturbed:
            self._interruption.end(error, SourceEvent.FAULT)
        self.reported.set()

    def _note(self, message: messages.Message) -> None:
        """Keep the figures that the destination reports, for operators."""
        said = self.acknowledged
        match message:
            case messages.RoundDone(round=number, bytes=received_bytes):
                update: dict[str, object] = {"rounds": number, "received_bytes": said.received_bytes + received_bytes}
            case messages.Ready(elapsed_ns=elapsed_ns):
                update = {"vote": "ready", "counted_ns": elapsed_ns}
            case messages.No():
                update = {"vote": "no"}
            case _:
                return
        self.acknowledged = said.model_copy(update=update)

    async def _take_report(self, payload: bytes) -> None:
        if self._reported_once:
            log.warning("the destination's half of the record came again, and is not taken")
            return
        self._reported_once = True
        try:
            self._ledger.half = await asyncio.to_thread(read_received, DestinationHalf, payload, "half of the record")
        except DocumentError as error:
            log.warning("the destination's half of the record is not taken", reason=str(error))
        self.reported.set()
