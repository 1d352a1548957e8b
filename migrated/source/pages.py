"""Sending guest memory: one thread per data channel takes batches of a round until none is left.

    runs -> stretches -> | zero test, batches -> gather, encode, hash, send | x channels -> BARRIER on every channel

Pages are read once into a staging buffer, so the hash is of exactly the bytes that are sent. A page that the guest
writes meanwhile is dirty again and travels again in a later round, and only its last version counts; one that it wrote
between the collect and the reading is cleared in the dirty log just before it is read, so it does not travel twice. A
round of a few pages, as an idle guest's last one, is sent in the event loop, sooner than threads would be woken. In
the first round some channel looks ahead for memory that is densely used and announces it, so that the destination can
populate it. The module is longer than others because sender and worker threads share one protocol of jobs, barriers and
failures.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import xxhash

from migrated.base.errors import LinkLostError
from migrated.base.threads import in_thread
from migrated.link.data import FrameSink
from migrated.source.encoding import BatchEncoder, EncodedBatch, EncodingTotals
from migrated.source.zero_test import LONG_RUNS, nonzero, nonzero_at, nonzero_heads
from migrated.vmm.memory import WORDS_PER_PAGE, GuestMemory, Words, drop_views
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.guest import PAGE_SIZE
from protocol.messages import MAX_RUNS_BYTES
from protocol.pages import RUN_BYTES, Indices, Runs, count_pages, indices_of, pack_runs, runs_of, split_runs

BATCH_PAGES: Final = 512
"""Most pages per frame: 2 MiB. Smaller ones stay nearer to the core, but cost more frames than that saves."""
HUGE_PAGES: Final = 512
"""Pages in a huge page: the grain of announcements."""
_ANNOUNCED_AT_ONCE: Final = 32
_LOOK_AHEAD_PAGES: Final = 32768
_STRETCH_PAGES: Final = 2048
"""Most pages that a channel takes at a time: few frames for zero pages, and still work for every channel."""
_LEAST_PAGES: Final = 128
"""Fewest, when there is little to do: so that the channels share it."""
_DEVICE_CHUNK_BYTES: Final = 1 << 20
_MAX_RUNS: Final = MAX_RUNS_BYTES // RUN_BYTES
_FRAME_BYTES: Final = 1024
"""More than what a frame of few pages or of a device state has beyond its payload, with a barrier behind it."""


@dataclass(slots=True)
class Sent:
    """Pages and bytes that a piece of work put on the wire."""

    normal_pages: int = 0
    zero_pages: int = 0
    postponed_pages: int = 0
    """Pages that were dirty again before they were read: they travelled once, not twice."""
    wire_bytes: int = 0
    digest_delta: int = 0
    encodings: dict[str, EncodingTotals] = field(default_factory=dict)

    def add(self, other: Sent) -> None:
        """Sum up."""
        self.normal_pages += other.normal_pages
        self.zero_pages += other.zero_pages
        self.postponed_pages += other.postponed_pages
        self.wire_bytes += other.wire_bytes
        self.digest_delta += other.digest_delta
        for name, totals in other.encodings.items():
            self.encodings.setdefault(name, EncodingTotals()).add(totals)


@dataclass(frozen=True, slots=True)
class OutgoingState:
    """One device state to send. ``meta`` is that of its first piece."""

    meta: messages.DeviceState
    data: bytes | bytearray | memoryview


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
        clear_dirty: clears a run of pages (first, number) in the dirty log, just before they are read, and returns how
            many were dirty; None for a guest that needs a fence between the one and the other.
        announce: whether the peer takes EXTENTS.
    """

    def __init__(
        self,
        memory: GuestMemory,
        channels: Sequence[FrameSink],
        digest: MemoryDigest | None,
        encoder_of: Callable[[], BatchEncoder],
        clear_dirty: Callable[[int, int], int] | None,
        *,
        announce: bool = False,
    ) -> None:
        self.clear_dirty = clear_dirty
        self.memory = memory
        self._announce = announce
        self.batch_pages = min(BATCH_PAGES, *(channel.max_payload_bytes // PAGE_SIZE for channel in channels))
        self._channels = list(channels)
        self._digest = digest
        self._loop = asyncio.get_running_loop()
        self._workers = [_Worker(self, channel, encoder_of()) for channel in channels]
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._under_way = 0
        """Pieces of work that threads have not finished."""
        self.encodings: dict[str, EncodingTotals] = {}

    def start(self) -> None:
        """Start the threads."""
        for worker in self._workers:
            worker.thread.start()

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
        share = total_pages(runs) // (4 * len(self._channels))
        runs = self.memory.cut(runs)
        stretches = split_runs(runs, min(max(share, _LEAST_PAGES), _STRETCH_PAGES))
        jobs = [_page_job(stretch, number) for stretch in stretches]
        if self._announce and number == 1:
            jobs = _looking_ahead(runs, stretches, jobs)
        size_bytes = total_pages(runs) * PAGE_SIZE + _FRAME_BYTES * (len(jobs) + 1)
        return await self._do(deque(jobs), number, number, size_bytes)

    async def send_devices(self, states: Sequence[OutgoingState]) -> Sent:
        """Send device states in pieces over all channels."""
        jobs: deque[Job] = deque()
        size_bytes = 0
        for state in states:
            view = memoryview(state.data).cast("B") if len(state.data) else memoryview(b"")
            pieces = range(0, len(view), _DEVICE_CHUNK_BYTES) if len(view) else (0,)
            jobs.extend(_device_job(state.meta, view, offset) for offset in pieces)
            size_bytes += len(view) + _FRAME_BYTES * len(pieces)
        return await self._do(jobs, None, 0, size_bytes)

    async def _do(self, jobs: deque[Job], barrier: int | None, round_number: int, size_bytes: int) -> Sent:
        """Do jobs that send at most so many bytes, and then send a barrier if there is to be one."""
        if self._failure is not None:
            raise LinkLostError(str(self._failure)) from self._failure
        # A barrier goes over every channel; without one, waking more threads than there are jobs only costs time.
        workers = self._workers if barrier is not None else self._workers[: max(1, len(jobs))]
        work = _Work(jobs, barrier, round_number, self._loop.create_future(), len(workers))
        if self._fits_now(workers, size_bytes):
            sent = self._do_here(workers, work)
        else:
            with self._lock:
                self._under_way += 1
            for worker in workers:
                worker.inbox.put(work)
            sent = await work.done
        if self._digest is not None:
            self._digest.add(sent.digest_delta)
        for name, totals in sent.encodings.items():
            self.encodings.setdefault(name, EncodingTotals()).add(totals)
        return sent

    def _fits_now(self, workers: Sequence[_Worker], size_bytes: int) -> bool:
        """Whether so many bytes can be sent at once and without waiting, whichever of the workers sends them."""
        if not workers or self._under_way or not all(worker.encoder.quick for worker in workers):
            return False
        return all(size_bytes <= worker.channel.room_bytes() for worker in workers)

    def _do_here(self, workers: Sequence[_Worker], work: _Work) -> Sent:
        """Do in the event loop what fits now, while all threads wait for work: waking them takes longer."""
        total = Sent()
        try:
            for worker in workers:
                total.add(worker.do(work))
        except Exception as error:
            drop_views(error)
            self._failure = error
            raise
        return total

    async def stop(self) -> None:
        """End the threads and close the channels; idempotent."""
        for worker in self._workers:
            worker.inbox.put(None)
        for channel in self._channels:
            channel.interrupt()
        try:
            await in_thread(self._join)
        finally:  # the daemon may end meanwhile
            for channel in self._channels:
                channel.close()
            self._workers.clear()
            self._channels = []

    def _join(self) -> None:
        for worker in self._workers:
            if worker.thread.ident is not None:
                worker.thread.join()

    def finished(self, work: _Work, sent: Sent) -> None:
        """A worker ran out of jobs (called in its thread)."""
        with self._lock:
            work.total.add(sent)
            work.open_channels -= 1
            last = work.open_channels == 0
            self._under_way -= last
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
        # A waiting caller raises it; when nobody waits any more, the attempt has ended for another reason.
        future.exception()


class _Worker:
    """One channel's thread and its staging memory, reused for every batch."""

    def __init__(self, owner: PageSender, channel: FrameSink, encoder: BatchEncoder) -> None:
        self.owner = owner
        self.channel = channel
        self.encoder = encoder
        self.inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self.stage: Words = np.empty((BATCH_PAGES, WORDS_PER_PAGE), np.uint64)
        self.spare: Words = np.empty((BATCH_PAGES, WORDS_PER_PAGE), np.uint64)
        self.thread = threading.Thread(target=self._run, name=f"data-channel-{channel.number}", daemon=True)

    def _run(self) -> None:
        while (work := self.inbox.get()) is not None:
            try:
                self.owner.finished(work, self.do(work))
            except Exception as error:  # otherwise the attempt would wait for ever for this thread
                drop_views(error)
                self.owner.failed(work, error)
                return
            finally:
                del work

    def do(self, work: _Work) -> Sent:
        """Take jobs until none is left, then send the barrier. Returns what was sent here."""
        sent = Sent()
        while True:
            try:
                job = work.jobs.popleft()
            except IndexError:
                break
            job(self, sent)
        if work.barrier is not None:
            barrier = messages.Barrier(round=work.barrier)
            sent.wire_bytes += self.channel.send(barrier, round_number=work.round_number)
        return sent

    def send_pages(self, runs: Runs, round_number: int, sent: Sent) -> None:
        """Read, classify, encode, hash and send a stretch."""
        if len(runs) > LONG_RUNS:
            self._send_copied(runs, round_number, sent)
            return
        memory, clear_dirty = self.owner.memory, self.owner.clear_dirty
        for start, count in runs.tolist():
            if clear_dirty is not None:
                sent.postponed_pages += clear_dirty(start, count)
            kept = np.array([[start, count]], np.int64)
            words = memory.mapped(start, count)
            if words is None:
                self._send_copied(kept, round_number, sent)
                continue
            used = nonzero(words)
            if not used.all():
                self._send_zero(start + np.flatnonzero(~used), round_number, sent)
                kept = runs_of(start + np.flatnonzero(used))
            for batch in split_runs(kept, self.owner.batch_pages):
                indices = indices_of(batch)
                staged = self.stage[: len(indices)]
                if len(batch) == 1:
                    first = int(batch[0, 0]) - start
                    np.copyto(staged, words[first : first + len(indices)])
                else:
                    np.take(words, indices - start, axis=0, out=staged, mode="clip")
                self._send_content(batch, indices, staged, round_number, sent)

    def _send_copied(self, runs: Runs, round_number: int, sent: Sent) -> None:
        """Send pages that are best copied one by one: many short runs, or memory in another process. Where they are
        mapped, only those that are not zero are copied."""
        memory = self.owner.memory
        for batch in split_runs(runs, self.owner.batch_pages):
            indices = indices_of(batch)
            first, last = int(indices[0]), int(indices[-1])
            words = memory.mapped(first, last - first + 1)
            if words is None:
                staged = self.stage[: len(indices)]
                memory.read(indices, staged)
                used = nonzero(staged)
            else:
                used = nonzero_at(words, indices - first)
            if not used.all():
                self._send_zero(indices[~used], round_number, sent)
                indices = indices[used]
                batch = runs_of(indices)
            if not len(indices):
                continue
            if words is not None:
                staged = self.stage[: len(indices)]
                memory.read(indices, staged)
            elif len(indices) < len(used):
                staged = np.compress(used, staged, axis=0, out=self.spare[: len(indices)])
            self._send_content(batch, indices, staged, round_number, sent)

    def _send_zero(self, pages: Indices, round_number: int, sent: Sent) -> None:
        sent.zero_pages += len(pages)
        if self.owner.digest is not None:
            sent.digest_delta += self.owner.digest.set_zero(pages)
        self.encoder.zeroed(pages)
        runs = runs_of(pages)
        for begin in range(0, len(runs), _MAX_RUNS):
            zero = messages.ZeroPages(runs=pack_runs(runs[begin : begin + _MAX_RUNS]))
            sent.wire_bytes += self.channel.send(zero, round_number=round_number)

    def _send_content(self, runs: Runs, indices: Indices, staged: Words, round_number: int, sent: Sent) -> None:
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
        dense: list[Indices] = []
        for start, count in granules.tolist():
            words = self.owner.memory.mapped(start * HUGE_PAGES, count * HUGE_PAGES)
            if words is not None:
                heads = nonzero_heads(words)
                dense.append(start + np.flatnonzero(heads.reshape(count, HUGE_PAGES).all(axis=1)))
        if dense and len(found := runs_of(np.concatenate(dense))):
            extents = messages.Extents(runs=pack_runs(found * HUGE_PAGES))
            sent.wire_bytes += self.channel.send(extents, round_number=1)


def _page_job(runs: Runs, round_number: int) -> Job:
    def job(worker: _Worker, sent: Sent) -> None:
        worker.send_pages(runs, round_number, sent)

    return job


def _announce_job(granules: Runs) -> Job:
    def job(worker: _Worker, sent: Sent) -> None:
        worker.announce(granules, sent)

    return job


def _looking_ahead(runs: Runs, stretches: list[Runs], jobs: list[Job]) -> list[Job]:
    """Put the announcement of memory some stretches before the one that sends it."""
    first = -(-runs[:, 0] // HUGE_PAGES)
    counts = runs.sum(axis=1) // HUGE_PAGES - first
    pieces = split_runs(np.column_stack((first, counts))[counts > 0], _ANNOUNCED_AT_ONCE)
    begins = [int(stretch[0, 0]) for stretch in stretches]
    # The stretch that holds a piece's first page is the last one that begins at or before it.
    places = np.searchsorted(begins, [int(piece[0, 0]) * HUGE_PAGES for piece in pieces], side="right") - 1
    lead = -(-_LOOK_AHEAD_PAGES // total_pages(stretches[0])) if stretches else 0
    ahead: list[Job] = []
    done = 0
    for piece, place in zip(pieces, np.maximum(places - lead, 0).tolist(), strict=True):
        ahead += jobs[done:place]
        done = max(done, place)
        ahead.append(_announce_job(piece))
    return ahead + jobs[done:]


def _device_job(state: messages.DeviceState, view: memoryview, offset: int) -> Job:
    def job(worker: _Worker, sent: Sent) -> None:
        piece = view[offset : offset + _DEVICE_CHUNK_BYTES]
        sent.wire_bytes += worker.channel.send(state.model_copy(update={"offset": offset}), [piece])

    return job


def total_pages(runs: Runs) -> int:
    """Pages in the runs (0 for none)."""
    return count_pages(runs) if len(runs) else 0
