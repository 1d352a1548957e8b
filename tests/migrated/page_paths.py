"""The way of pages between two memories, for tests: real channels over socket pairs, real memfds, real threads.

source memfd -> PageSender -> socket pair x channels -> PageReceiver -> destination memfd
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from migrated.destination.decoding import allowed_encodings
from migrated.destination.pages import PageReceiver, RoundReceived
from migrated.destination.states import ArrivedState, ArrivingStates
from migrated.link.data import DataChannel
from migrated.link.sockets import Agreed, Connection, Wire
from migrated.source import pages as source_pages
from migrated.source.encoding import BatchEncoder, LinkSpeed
from migrated.source.pages import PageSender, Sent
from migrated.vmm.memory import WORDS_PER_PAGE, FileRegion, MappedMemory
from migrated.vmm.seam import StateBounds
from protocol.digest import MemoryDigest
from protocol.frames import MAX_PAYLOAD_BYTES
from protocol.guest import PAGE_SIZE
from protocol.pages import Runs
from protocol.versions import CAPABILITIES, MAJOR

WAIT_S = 30.0
HUGE = source_pages.HUGE_PAGES


class Memory:
    """A guest's memory and a second look at its file."""

    def __init__(self, pages: int) -> None:
        fd = os.memfd_create("page-path", os.MFD_CLOEXEC)
        os.ftruncate(fd, pages * PAGE_SIZE)
        self.file = os.dup(fd)
        self.guest = MappedMemory([FileRegion(fd, pages)])

    def content(self) -> bytes:
        return os.pread(self.file, self.guest.pages * PAGE_SIZE, 0)

    def backed_pages(self) -> int:
        return os.fstat(self.file).st_blocks * 512 // PAGE_SIZE

    def close(self) -> None:
        self.guest.release()
        os.close(self.file)


def data_channel(sock: socket.socket, number: int, peer_max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> DataChannel:
    """A data channel over one end of a connection, as it is after JOIN."""
    return DataChannel(Connection(Wire(sock, None), Agreed(MAJOR, peer_max_payload_bytes)), number)


STATES = StateBounds({("disk", "non-iterable"): 8 << 20}, 8 << 20)


class Path:
    """Both ends over socket pairs. ``channels`` are the source's ends, for tests that send frames by hand."""

    def __init__(
        self, pages: int, channels: int = 2, *, digest: bool = True, capabilities: frozenset[str] = CAPABILITIES
    ) -> None:
        self.source, self.destination = Memory(pages), Memory(pages)
        self.source_digest = MemoryDigest(pages) if digest else None
        self.destination_digest = MemoryDigest(pages) if digest else None
        self.rounds: asyncio.Queue[tuple[int, RoundReceived]] = asyncio.Queue()
        self.states: asyncio.Queue[ArrivedState] = asyncio.Queue()
        self.failures: asyncio.Queue[Exception] = asyncio.Queue()
        self.receiver = PageReceiver(
            self.destination.guest,
            ArrivingStates(STATES),
            self.destination_digest,
            channels,
            allowed_encodings(capabilities),
            announced="extents" in capabilities,
            on_round=lambda number, received: self.rounds.put_nowait((number, received)),
            on_state=self.states.put_nowait,
            on_failure=lambda _number, error: self.failures.put_nowait(error),
        )
        self.channels: list[DataChannel] = []
        for number in range(channels):
            near, far = socket.socketpair()
            self.channels.append(data_channel(near, number))
            self.receiver.add_channel(data_channel(far, number))
        self.sender: PageSender | None = None
        self.dirty: set[int] = set()
        self.number = 0

    def send_with(self, encoder_of: Callable[[], BatchEncoder] = BatchEncoder, *, announce: bool = False) -> None:
        self.sender = PageSender(
            self.source.guest, self.channels, self.source_digest, encoder_of, self.clear_dirty, announce=announce
        )
        self.sender.start()

    def clear_dirty(self, start: int, count: int) -> int:
        cleared = {page for page in self.dirty if start <= page < start + count}
        self.dirty -= cleared
        return len(cleared)

    async def round(self, runs: Runs) -> tuple[Sent, RoundReceived]:
        """Send a round and wait until it has arrived, as the two stories do."""
        assert self.sender is not None
        self.number += 1
        sent = await self.sender.send_round(self.number, runs)
        async with asyncio.timeout(WAIT_S):
            arrived = asyncio.ensure_future(self.rounds.get())
            failed = asyncio.ensure_future(self.failures.get())
            await asyncio.wait({arrived, failed}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            arrived.cancel()
            raise failed.result()
        failed.cancel()
        number, received = arrived.result()
        assert number == self.number
        if self.destination_digest is not None:
            self.destination_digest.add(received.digest_delta)
        return sent, received

    async def failure(self) -> Exception:
        async with asyncio.timeout(WAIT_S):
            return await self.failures.get()

    def assert_equal(self) -> None:
        assert self.destination.content() == self.source.content()
        if self.source_digest is not None and self.destination_digest is not None:
            assert self.destination_digest.value == self.source_digest.value

    async def close(self) -> None:
        if self.sender is not None:
            await self.sender.stop()
        for channel in self.channels:
            channel.interrupt()
        await self.receiver.stop()
        for channel in self.channels:
            channel.close()
        self.source.close()
        self.destination.close()


@contextlib.asynccontextmanager
async def path(pages: int, channels: int = 2, **options: Any) -> AsyncIterator[Path]:
    made = Path(pages, channels, **options)
    try:
        yield made
    finally:
        await made.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""

    def wait() -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            os.sched_yield()

    await asyncio.to_thread(wait)


def noise(count: int, seed: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(1, 1 << 63, (count, WORDS_PER_PAGE), np.uint64)


def run(start: int, count: int) -> Runs:
    return np.array([[start, count]], np.int64)


def slow_link() -> LinkSpeed:
    """A link on which every saved byte counts."""
    link = LinkSpeed()
    link.add(64 << 20, 1 << 40)
    return link


PAGES = 700


def content_of(count: int) -> bytes:
    return noise(count, 1).tobytes()
