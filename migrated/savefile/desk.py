"""The tools of one save: the unfinished file, the guest's memory, the threads that bring the one into the other."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from migrated.base.threads import in_thread, made_in_thread
from migrated.environment import Environment
from migrated.savefile.writer import FileSink, SaveWriter
from migrated.settings.parameters import MigrationParameters
from migrated.source.encoding import encoder_factory
from migrated.source.ledger import OutgoingLedger
from migrated.source.offer import Offer, hello_of
from migrated.source.pages import PageSender, Sent
from migrated.source.session import Tracking
from migrated.source.transfer import Transfer
from migrated.vmm.handed_over import NoDirtyLog
from migrated.vmm.memory import GuestMemory
from migrated.vmm.seam import VmmGuest
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.messages import Message
from protocol.pages import Runs
from protocol.versions import CAPABILITIES

SCHEME = "file:"
"""Of the URI that stands for a file, as QEMU spells it."""


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """An operator's request to save a guest.

    Attributes:
        path: the file.
        ends_guest: end the guest once the file is safe; else it goes on.
        force: replace a saved guest that is there.
    """

    path: Path
    ends_guest: bool
    force: bool

    @property
    def uri(self) -> str:
        """The file as a URI."""
        return f"{SCHEME}{self.path}"


class RoundBook:
    """Takes the announcement of each round in place of a destination, and acknowledges it once it is in the file.

    Attributes:
        in_blackout: the guest stands still: nothing waits for the disk any more.
    """

    def __init__(self, writer: SaveWriter, digest: MemoryDigest) -> None:
        self.in_blackout = False
        self._writer = writer
        self._digest = digest
        self._closed: dict[int, asyncio.Future[messages.RoundDone]] = {}
        self._writing: asyncio.Future[object] | None = None

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Close the round that the message announces."""
        del payload  # an announcement has none
        if isinstance(message, messages.RoundEnd):
            self._closed[message.round] = asyncio.ensure_future(self._close(message.round))

    def acknowledged(self, number: int) -> asyncio.Future[messages.RoundDone]:
        """A future whose result is the acknowledgement of a round that was announced."""
        return self._closed.pop(number)

    async def _close(self, number: int) -> messages.RoundDone:
        await self._write(partial(self._writer.append, messages.Barrier(round=number), (), number))
        if not self.in_blackout:
            # A round counts as over when little of it is left to flush: then the last one meets an idle disk.
            await self._write(self._writer.checkpoint)
        return messages.RoundDone(round=number, bytes=0, digest=self._digest.value)

    async def _write(self, call: Callable[[], object]) -> None:
        """Write in a thread. Whoever is cancelled does not wait for the disk: the guest may stand still.
        ``end`` does."""
        self._writing = asyncio.ensure_future(in_thread(call))
        await asyncio.shield(self._writing)

    async def end(self) -> None:
        """Wait until nothing is written any more."""
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Desk:
    """All objects that writing one guest needs."""

    offer: Offer
    writer: SaveWriter
    book: RoundBook
    memory: GuestMemory
    tracking: Tracking
    digest: MemoryDigest
    transfer: Transfer

    async def send_pages(self, runs: Runs) -> Sent:
        """Write a round, and its barrier."""
        sent = await self.transfer.send_round(runs)
        await self.book.acknowledged(self.transfer.round)
        return sent


async def open_desk(
    env: Environment,
    vmm: VmmGuest,
    offer: Offer,
    order: SaveOrder,
    parameters: MigrationParameters,
    ledger: OutgoingLedger,
    undo: contextlib.AsyncExitStack,
    *,
    tracked: bool,
) -> Desk:
    """Make the file, map the guest's memory, begin to track its writes, start the threads.

    Args:
        undo: gets the calls that undo it all.
        tracked: whether the guest runs while its memory is written.

    Raises:
        SaveFileError, VmmError: something cannot be had.
    """
    description, save_id = offer.description, bytes.fromhex(ledger.migration_id)
    writer = await made_in_thread(
        SaveWriter.abandon, SaveWriter, order.path, save_id, platform.machine(), description.pages
    )
    undo.push_async_callback(asyncio.to_thread, writer.abandon)
    hello = hello_of(env, offer, parameters, ledger.migration_id, ledger.epoch, shared=False)
    await in_thread(writer.append, hello)
    memory = await vmm.memory()
    undo.push_async_callback(asyncio.to_thread, memory.release)
    log = await vmm.start_dirty_log(parameters.dirty_tracking) if tracked else NoDirtyLog()
    tracking = Tracking(vmm, log)
    undo.push_async_callback(tracking.end)
    digest = MemoryDigest(description.pages)
    sender = PageSender(
        memory,
        [FileSink(writer, number) for number in range(parameters.channels)],
        digest,
        encoder_factory(parameters, CAPABILITIES),
        log.clear if tracked and not vmm.needs_fence else None,
    )
    undo.push_async_callback(sender.stop)
    sender.pace(parameters.max_bandwidth_bytes_per_s)
    sender.start()
    book = RoundBook(writer, digest)
    undo.push_async_callback(book.end)
    transfer = Transfer(vmm, description, memory, log, sender, book, ledger)
    return Desk(offer, writer, book, memory, tracking, digest, transfer)
