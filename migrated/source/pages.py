"""Sending guest memory: one thread per data channel takes batches of a round until none is left.

    runs -> batches -> | gather, zero test, encode, hash, send | x channels -> BARRIER on every channel

Pages are read once into a staging buffer; what is hashed is what is sent. A page that the guest writes meanwhile is
dirty again and travels again in a later round, and only its last version counts. In the first round some channel looks
ahead of the batches for memory that is densely used and announces it, so that the destination can populate it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from migrated.errors import LinkLostError
from migrated.link.data import DataChannel
from migrated.source.encoding import BatchEncoder, EncodedBatch, EncodingTotals
from migrated.vmm.memory import WORDS_PER_PAGE, GuestMemory
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.guest import PAGE_SIZE
from protocol.messages import MAX_RUNS_BYTES
from protocol.pages import RUN_BYTES, Indices, Runs, count_pages, indices_of, pack_runs, runs_of, split_runs

BATCH_PAGES: Final = 256
"""Pages per frame: 1 MiB, which stays in a core's cache from the gather to the send."""
HUGE_PAGES: Final = 512
"""Pages in a huge page: the grain of announcements."""
_ANNOUNCED_AT_ONCE: Final = 32
_LOOK_AHEAD_BATCHES: Final = 128
_TESTED_WORDS: Final = 8
"""Words of a page that the look ahead reads: one cache line. Most pages in use show there that they are not zero."""
_DEVICE_CHUNK_BYTES: Final = 1 << 20
_MAX_RUNS: Final = MAX_RUNS_BYTES // RUN_BYTES


@dataclass(slots=True)
class Sent:
    """What a piece of work put on the wire."""

    normal_pages: int = 0
    zero_pages: int = 0
    wire_bytes: int = 0
    digest_delta: int = 0
    encodings: dict[str, EncodingTotals] = field(default_factory=dict)

    def add(self, other: Sent) -> None:
        """Sum up."""
        self.normal_pages += other.normal_pages
        self.zero_pages += other.zero_pages
        self.wire_bytes += other.wire_bytes
        self.digest_delta += other.digest_delta
        for name, totals in other.encodings.items():
            self.encodings.setdefault(name, EncodingTotals()).add(totals)


Job: TypeAlias = Callable[["_Worker", Sent], None]


@dataclass(slots=True)
class _Work:
    """Jobs shared by all channels, and the barrier that each sends when none is left."""

    jobs: deque[Job]
    barrier: int | None
    round_number: int
    done: asyncio.Future[Sent]
    open_channels: int
    total: Sent = field(default_factory=Sent)


class PageSender:
    """Moves pages and device states over the data channels of one migration.

    Args:
        memory: the guest's memory; every view of it is dropped by ``stop``.
        channels: joined data channels, owned from here on.
        digest: the source's running digest, None when it is off.
        encoder_of: makes the encoder of one channel's thread.
        announce: whether the peer takes EXTENTS.
    """

    def __init__(
        self,
        memory: GuestMemory,
        channels: list[DataChannel],
        digest: MemoryDigest | None,
        encoder_of: Callable[[], BatchEncoder],
        *,
        announce: bool = False,
    ) -> None:
        self._memory = memory
        self._announce = announce
        self._batch_pages = min(BATCH_PAGES, *(channel.max_payload_bytes // PAGE_SIZE for channel in channels))
        self._channels = channels
        self._digest = digest
        self._loop = asyncio.get_running_loop()
        self._workers = [_Worker(self, channel, encoder_of()) for channel in channels]
        self._failure: Exception | None = None
        self._current: _Work | None = None
        self._lock = threading.Lock()
        self.encodings: dict[str, EncodingTotals] = {}

    def start(self) -> None:
        """Start the threads."""
        for worker in self._workers:
            worker.thread.start()

    @property
    def words(self) -> npt.NDArray[np.uint64]:
        """Guest memory as u64, shape (pages, 512)."""
        return self._memory.words

    @property
    def digest(self) -> MemoryDigest | None:
        """The running digest."""
        return self._digest

    def pace(self, bytes_per_s: int) -> None:
        """Cap all channels together; 0 lifts the cap. Takes effect at once."""
        share = bytes_per_s // len(self._channels)
        for channel in self._channels:
            channel.pace(max(share, 1) if bytes_per_s else 0)

    async def send_round(self, number: int, runs: Runs) -> Sent:
        """Send the pages of the runs and a barrier on every channel.

        Raises:
            LinkLostError: a channel is gone.
        """
        batches = split_runs(runs, self._batch_pages)
        jobs = [_page_job(batch, number) for batch in batches]
        if self._announce and number == 1:
            jobs = _looking_ahead(runs, batches, jobs)
        return await self._do(deque(jobs), number, number)

    async def send_device(self, state: messages.DeviceState, data: bytes | bytearray | memoryview) -> Sent:
        """Send one device state in pieces over all channels. ``state`` is the meta of its first piece."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        pieces = range(0, len(view), _DEVICE_CHUNK_BYTES) if len(view) else (0,)
        jobs: deque[Job] = deque(_device_job(state, view, offset) for offset in pieces)
        return await self._do(jobs, None, 0)

    async def _do(self, jobs: deque[Job], barrier: int | None, round_number: int) -> Sent:
        if self._failure is not None:
            raise LinkLostError(str(self._failure)) from self._failure
        work = _Work(jobs, barrier, round_number, self._loop.create_future(), len(self._workers))
        self._current = work
        for worker in self._workers:
            worker.inbox.put(work)
        sent = await work.done
        if self._digest is not None:
            self._digest.add(sent.digest_delta)
        for name, totals in sent.encodings.items():
            self.encodings.setdefault(name, EncodingTotals()).add(totals)
        return sent

    async def stop(self) -> None:
        """End the threads and close the channels; idempotent."""
        for worker in self._workers:
            worker.inbox.put(None)
        for channel in self._channels:
            channel.interrupt()
        for worker in self._workers:
            if worker.thread.ident is not None:
                await asyncio.to_thread(worker.thread.join)
        for channel in self._channels:
            channel.close()
        self._workers.clear()
        self._channels = []

    def finished(self, work: _Work, sent: Sent) -> None:
        """A worker ran out of jobs (called in its thread)."""
        with self._lock:
            work.total.add(sent)
            work.open_channels -= 1
            last = work.open_channels == 0
        if last:
            self._loop.call_soon_threadsafe(_resolve, work.done, work.total)

    def failed(self, work: _Work, error: Exception) -> None:
        """A worker broke (called in its thread): nothing more can be sent."""
        self._failure = self._failure or error
        work.jobs.clear()
        self._loop.call_soon_threadsafe(_fail, work.done, error)


def _resolve(future: asyncio.Future[Sent], value: Sent) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Sent], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # Whoever waits sees it; when nobody does any more, the attempt has ended for another reason.
        future.exception()


class _Worker:
    """One channel's thread and its staging memory, reused for every batch."""

    def __init__(self, owner: PageSender, channel: DataChannel, encoder: BatchEncoder) -> None:
        self.owner = owner
        self.channel = channel
        self.encoder = encoder
        self.inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self.stage: npt.NDArray[np.uint64] = np.empty((BATCH_PAGES, WORDS_PER_PAGE), np.uint64)
        self.spare: npt.NDArray[np.uint64] = np.empty((BATCH_PAGES, WORDS_PER_PAGE), np.uint64)
        self.thread = threading.Thread(target=self._run, name=f"data-channel-{channel.number}", daemon=True)

    def _run(self) -> None:
        while (work := self.inbox.get()) is not None:
            sent = Sent()
            try:
                while True:
                    try:
                        job = work.jobs.popleft()
                    except IndexError:
                        break
                    job(self, sent)
                if work.barrier is not None:
                    barrier = messages.Barrier(round=work.barrier)
                    sent.wire_bytes += self.channel.send(barrier, round_number=work.round_number)
                self.owner.finished(work, sent)
            except Exception as error:  # whatever ends this thread must end the attempt, which would wait for ever
                self.owner.failed(work, error)
                return
            finally:
                del work

    def send_pages(self, runs: Runs, round_number: int, sent: Sent) -> None:
        """Read, classify, hash, encode and send one batch."""
        indices = indices_of(runs)
        staged, nonzero = self._gather(runs, indices)
        zero_pages = indices[~nonzero]
        digest = self.owner.digest
        if len(zero_pages):
            sent.zero_pages += len(zero_pages)
            if digest is not None:
                sent.digest_delta += digest.set_zero(zero_pages)
            self.encoder.zeroed(zero_pages)
            zero_runs = runs_of(zero_pages)
            for begin in range(0, len(zero_runs), _MAX_RUNS):
                zero = messages.ZeroPages(runs=pack_runs(zero_runs[begin : begin + _MAX_RUNS]))
                sent.wire_bytes += self.channel.send(zero, round_number=round_number)
            runs, indices = runs_of(indices[nonzero]), indices[nonzero]
        if not len(indices):
            return
        sent.normal_pages += len(indices)
        for batch in self.encoder.encode(indices, staged, round_number, sent.encodings):
            self._send_batch(batch, runs if batch.indices is indices else runs_of(batch.indices), round_number, sent)

    def _send_batch(self, batch: EncodedBatch, runs: Runs, round_number: int, sent: Sent) -> None:
        digest = self.owner.digest
        batch_hash = 0
        if digest is not None:
            batch_hash = xxhash.xxh3_64_intdigest(batch.pages.data)
            sent.digest_delta += digest.set_pages(batch.indices, batch_hash)
        message = messages.Pages(encoding=batch.encoding, runs=pack_runs(runs), digest=batch_hash)
        begin_ns = time.perf_counter_ns()
        wire_bytes = self.channel.send(message, batch.payload, round_number)
        self.encoder.sent(wire_bytes, time.perf_counter_ns() - begin_ns)
        sent.wire_bytes += wire_bytes

    def announce(self, granules: Runs, sent: Sent) -> None:
        """Look at runs of huge pages and announce those in which no page is zero."""
        words = self.owner.words
        dense: list[Indices] = []
        for start, count in granules.tolist():
            first, pages = start * HUGE_PAGES, count * HUGE_PAGES
            heads = np.bitwise_or.reduce(words[first : first + pages, :_TESTED_WORDS], axis=1) != 0
            dense.append(start + np.flatnonzero(heads.reshape(count, HUGE_PAGES).all(axis=1)))
        found = runs_of(np.concatenate(dense))
        if len(found):
            extents = messages.Extents(runs=pack_runs(found * HUGE_PAGES))
            sent.wire_bytes += self.channel.send(extents, round_number=1)

    def _gather(self, runs: Runs, indices: Indices) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Copy the batch into staging. Returns the non-zero pages, shape (n, 512), and which of all pages they are."""
        words = self.owner.words
        if len(runs) == 1:
            # A long run is tested in place: zero memory is then never copied.
            start, count = runs[0].tolist()
            source = words[start : start + count]
            nonzero = np.bitwise_or.reduce(source, axis=1) != 0
            staged = self.stage[: int(nonzero.sum())]
            if len(staged) == count:
                np.copyto(staged, source)
            elif len(staged):
                np.take(words, indices[nonzero], axis=0, out=staged, mode="clip")
            return staged, nonzero
        staged = self.stage[: len(indices)]
        np.take(words, indices, axis=0, out=staged, mode="clip")
        nonzero = np.bitwise_or.reduce(staged, axis=1) != 0
        kept = int(nonzero.sum())
        if kept < len(indices):
            np.compress(nonzero, staged, axis=0, out=self.spare[:kept])
            staged = self.spare[:kept]
        return staged, nonzero


def _page_job(runs: Runs, round_number: int) -> Job:
    def job(worker: _Worker, sent: Sent) -> None:
        worker.send_pages(runs, round_number, sent)

    return job


def _announce_job(granules: Runs) -> Job:
    def job(worker: _Worker, sent: Sent) -> None:
        worker.announce(granules, sent)

    return job


def _looking_ahead(runs: Runs, batches: list[Runs], jobs: list[Job]) -> list[Job]:
    """Put the announcement of every stretch of memory some batches before its first batch."""
    first = -(-runs[:, 0] // HUGE_PAGES)
    counts = runs.sum(axis=1) // HUGE_PAGES - first
    granules = np.column_stack((first, counts))[counts > 0]
    stretches = split_runs(granules, _ANNOUNCED_AT_ONCE)
    batch_starts = [int(batch[0, 0]) for batch in batches]
    places = np.searchsorted(batch_starts, [int(s[0, 0]) * HUGE_PAGES for s in stretches]) - _LOOK_AHEAD_BATCHES
    ahead: list[Job] = []
    done = 0
    for stretch, place in zip(stretches, np.maximum(places, 0).tolist(), strict=True):
        ahead += jobs[done:place]
        done = max(done, place)
        ahead.append(_announce_job(stretch))
    return ahead + jobs[done:]


def _device_job(state: messages.DeviceState, view: memoryview, offset: int) -> Job:
    def job(worker: _Worker, sent: Sent) -> None:
        piece = view[offset : offset + _DEVICE_CHUNK_BYTES]
        sent.wire_bytes += worker.channel.send(state.model_copy(update={"offset": offset}), [piece])

    return job


def total_pages(runs: Runs) -> int:
    """Pages in the runs (0 for none)."""
    return count_pages(runs) if len(runs) else 0
