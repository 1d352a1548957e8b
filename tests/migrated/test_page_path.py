"""The way of pages between two memories: real channels over socket pairs, real memfds, real threads.

source memfd -> PageSender -> socket pair x channels -> PageReceiver -> destination memfd
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import Any

import lz4.block
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from migrated.base.errors import LinkLostError, MigrationError
from migrated.destination.decoding import allowed_encodings
from migrated.destination.pages import PageReceiver, RoundReceived
from migrated.destination.states import ArrivedState, ArrivingStates
from migrated.link.data import DataChannel
from migrated.link.sockets import Agreed, Connection, Wire
from migrated.source import pages as source_pages
from migrated.source.encoding import BatchEncoder, DeltaCache, EncodingTotals, LinkSpeed
from migrated.source.pages import OutgoingState, PageSender, Sent
from migrated.vmm import memory as memory_module
from migrated.vmm.memory import WORDS_PER_PAGE, FileRegion, MappedMemory
from migrated.vmm.seam import StateBounds
from protocol import messages
from protocol.digest import MemoryDigest
from protocol.errors import ErrorCode, ProtocolError, RemoteProtocolError
from protocol.frames import MAX_PAYLOAD_BYTES
from protocol.guest import PAGE_SIZE
from protocol.messages import Encoding
from protocol.pages import NO_RUNS, Runs, pack_runs, runs_of, split_runs
from protocol.versions import CAPABILITIES, MAJOR

WAIT_S = 30.0
MIB_PAGES = 256
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


# Section: what arrives is what was sent

PAGES = 700
writes = st.tuples(
    st.sampled_from(["noise", "text", "touch", "zero", "stride"]),
    st.integers(0, PAGES - 1),
    st.integers(1, 400),
    st.integers(0, 1000),
)


def write(memory: MappedMemory, kind: str, start: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Write pages as a guest would. Returns their numbers."""
    pages = np.arange(start, min(start + count, PAGES))
    if kind == "stride":
        pages = pages[::3]
    if kind == "zero":
        memory.words[pages] = 0
    elif kind == "text":
        memory.words[pages] = 0
        memory.words[pages, seed % WORDS_PER_PAGE] = seed + 1
    elif kind == "touch":
        memory.words[pages, seed % WORDS_PER_PAGE] ^= np.uint64(seed + 1)
    else:
        memory.words[pages] = noise(len(pages), seed)
    return pages


@settings(max_examples=50, deadline=None)
@given(
    rounds=st.lists(st.lists(writes, min_size=1, max_size=5), min_size=1, max_size=5),
    channels=st.integers(1, 3),
    compression=st.sampled_from(["plain", "zstd", "lz4"]),
    cache_pages=st.one_of(st.none(), st.integers(1, 800)),
    digest=st.booleans(),
    announce=st.booleans(),
)
async def test_any_rounds_in_any_encoding_leave_equal_memories(
    rounds: list[list[tuple[str, int, int, int]]],
    channels: int,
    compression: Encoding,
    cache_pages: int | None,
    digest: bool,
    announce: bool,
) -> None:
    cache = DeltaCache(cache_pages * PAGE_SIZE) if cache_pages is not None else None
    async with path(PAGES, channels, digest=digest) as both:
        both.send_with(lambda: BatchEncoder(compression, 1, cache, slow_link()), announce=announce)
        for changes in rounds:
            dirty = np.unique(np.concatenate([write(both.source.guest, *change) for change in changes]))
            sent, received = await both.round(runs_of(dirty))
            assert sent.normal_pages + sent.zero_pages == len(dirty)
            assert (received.normal_pages, received.zero_pages) == (sent.normal_pages, sent.zero_pages)
            both.assert_equal()


async def test_the_record_of_encodings_adds_up() -> None:
    async with path(PAGES, 2) as both:
        cache = DeltaCache(PAGES * PAGE_SIZE)
        both.send_with(lambda: BatchEncoder("lz4", 1, cache, slow_link()))
        memory = both.source.guest
        memory.words[:] = noise(PAGES, 1)
        first, _ = await both.round(run(0, PAGES))
        memory.words[:, 7] += np.uint64(1)
        second, received = await both.round(run(0, PAGES))
        both.assert_equal()
        assert first.encodings["plain"].page_bytes == PAGES * PAGE_SIZE
        assert second.encodings["xor-lz4"].page_bytes == PAGES * PAGE_SIZE
        assert second.encodings["xor-lz4"].wire_bytes == received.payload_bytes
        assert second.wire_bytes * 20 < first.wire_bytes
        assert both.sender is not None
        total = EncodingTotals()
        for totals in both.sender.encodings.values():
            total.add(totals)
        assert total.page_bytes == 2 * PAGES * PAGE_SIZE
        assert total.wire_bytes <= first.wire_bytes + second.wire_bytes


async def test_a_page_that_was_zero_in_between_is_no_difference_to_what_it_was_before() -> None:
    async with path(64, 2) as both:
        cache = DeltaCache(64 * PAGE_SIZE)
        both.send_with(lambda: BatchEncoder(cache=cache, link=slow_link()))
        for content in (noise(64, 1), 0, noise(64, 1), noise(64, 1)):
            both.source.guest.words[:] = content
            await both.round(run(0, 64))
            both.assert_equal()


async def test_a_round_without_pages_is_closed_like_any_other() -> None:
    async with path(16, 3) as both:
        both.send_with()
        sent, received = await both.round(NO_RUNS)
        assert (sent.normal_pages, received.normal_pages, received.barriers) == (0, 0, 3)


async def test_a_peer_that_takes_small_payloads_gets_small_batches() -> None:
    async with path(PAGES, 1) as both:
        near, far = socket.socketpair()
        both.channels[0].close()
        both.channels = [data_channel(near, 0, 16 * PAGE_SIZE)]
        receiving = data_channel(far, 0)
        both.send_with()
        both.source.guest.words[:100] = noise(100, 1)
        assert both.sender is not None
        sending = asyncio.ensure_future(both.sender.send_round(1, run(0, 100)))

        def read_all() -> list[int]:
            sizes: list[int] = []
            while True:
                header, message = receiving.read_header()
                if isinstance(message, messages.Barrier):
                    return sizes
                sizes.append(header.payload_bytes)
                receiving.read_into([memoryview(bytearray(header.payload_bytes))])

        sizes = await asyncio.to_thread(read_all)
        await sending
        receiving.close()
        assert max(sizes) == 16 * PAGE_SIZE
        assert sum(sizes) == 100 * PAGE_SIZE


async def test_a_page_written_before_it_was_read_travels_once() -> None:
    async with path(PAGES, 2) as both:
        both.send_with()
        both.source.guest.words[:] = noise(PAGES, 1)
        both.dirty = {5, 300, PAGES - 1}
        sent, _ = await both.round(run(0, PAGES))
        assert sent.postponed_pages == 3
        assert not both.dirty
        both.dirty = {1, 2}  # 1 is not part of the round: it must stay in the log
        await both.round(runs_of(np.arange(2, PAGES)))
        assert both.dirty == {1}
        scattered = runs_of(np.arange(0, PAGES, 2))
        both.dirty = {4, 5}
        await both.round(scattered)
        assert 5 in both.dirty
        both.assert_equal()


# Section: memory that is not used stays unused


@pytest.mark.parametrize("announce", [False, True])
async def test_holes_and_zero_pages_take_no_memory_on_the_destination(announce: bool) -> None:
    async with path(8 * HUGE, 2) as both:
        memory = both.source.guest
        both.send_with(announce=announce)
        memory.words[HUGE + 5 : 3 * HUGE] = noise(2 * HUGE - 5, 1)
        memory.words[4 * HUGE : 5 * HUGE] = 0  # touched, all zero
        memory.words[6 * HUGE : 6 * HUGE + 9 : 2] = noise(5, 2)
        assert both.source.backed_pages() == 3 * HUGE - 5 + 5
        sent, _ = await both.round(memory.data_runs())
        assert (sent.normal_pages, sent.zero_pages) == (2 * HUGE - 5 + 5, HUGE)
        both.assert_equal()
        assert both.destination.backed_pages() == 2 * HUGE - 5 + 5


def mapped_pages(memory: MappedMemory) -> int:
    """How many pages of a mapping have an entry in the page tables: bit 63 in /proc/self/pagemap."""
    with pathlib.Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(memory.words.ctypes.data // PAGE_SIZE * 8)
        return int((np.frombuffer(pagemap.read(8 * memory.pages), np.uint64) >> np.uint64(63)).sum())


async def test_what_came_through_the_file_is_mapped_after_the_first_round_and_holes_stay_holes() -> None:
    async with path(8 * HUGE, 1) as both:
        memory = both.source.guest
        both.send_with()
        memory.words[HUGE : 3 * HUGE] = noise(2 * HUGE, 1)
        memory.words[5 * HUGE : 5 * HUGE + 40] = noise(40, 2)
        await both.round(memory.data_runs())
        await until(lambda: mapped_pages(both.destination.guest) >= 2 * HUGE + 40)
        assert both.destination.backed_pages() == 2 * HUGE + 40
        both.assert_equal()


async def test_nothing_is_mapped_ahead_once_the_guest_is_stopped() -> None:
    async with path(8 * HUGE, 1) as both:
        both.receiver.guest_stopped()
        both.send_with()
        both.source.guest.words[:] = noise(8 * HUGE, 1)
        await both.round(both.source.guest.data_runs())
        assert mapped_pages(both.destination.guest) == 0


async def test_pages_that_become_zero_are_given_back_where_they_are_many_in_a_row() -> None:
    async with path(PAGES, 1) as both:
        both.send_with()
        both.source.guest.words[:300] = noise(300, 1)
        await both.round(run(0, 300))
        both.source.guest.words[100:200] = 0
        both.source.guest.words[210:300:7] = 0
        await both.round(run(0, 300))
        both.assert_equal()
        assert both.destination.backed_pages() == 200
        both.source.guest.words[100:104] = noise(4, 2)
        both.source.guest.words[210:214] = noise(4, 3)
        await both.round(runs_of(np.array([100, 101, 102, 103, 210, 211, 212, 213])))
        both.assert_equal()
        assert both.destination.backed_pages() == 204


async def test_of_scattered_pages_only_those_travel_that_are_not_zero_to_their_end() -> None:
    async with path(PAGES, 2) as both:
        both.send_with()
        scattered = np.arange(1, PAGES, 3)
        both.source.guest.words[scattered] = noise(len(scattered), 1)
        both.source.guest.words[scattered[::5]] = 0
        both.source.guest.words[scattered[::10], -1] = 7  # only the last word of the page
        sent, received = await both.round(runs_of(scattered))
        zero = len(scattered[::5]) - len(scattered[::10])
        assert (sent.zero_pages, sent.normal_pages) == (zero, len(scattered) - zero)
        assert (received.zero_pages, received.normal_pages) == (zero, len(scattered) - zero)
        both.assert_equal()


async def test_announced_memory_that_turns_out_zero_is_given_back() -> None:
    async with path(2 * HUGE, 1) as both:
        channel = both.channels[0]
        channel.send(messages.Extents(runs=pack_runs(run(0, 2 * HUGE))), round_number=1)
        await until(lambda: both.destination.backed_pages() == 2 * HUGE)  # a thread of its own populates it
        channel.send(messages.ZeroPages(runs=pack_runs(run(0, HUGE))), round_number=1)
        channel.send(messages.Barrier(round=1), round_number=1)
        async with asyncio.timeout(WAIT_S):
            await both.rounds.get()
        assert both.destination.backed_pages() == HUGE
        assert not any(both.destination.content())


@pytest.mark.parametrize("possible", [False, True])
async def test_announced_memory_arrives_right_whether_or_not_it_can_be_populated(
    possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with path(8 * HUGE, 2) as both:
        if not possible:
            monkeypatch.setattr(both.destination.guest, "populate_huge", lambda *_run: False)
        both.send_with(announce=True)
        both.source.guest.words[3 : 7 * HUGE] = noise(7 * HUGE - 3, 1)
        await both.round(both.source.guest.data_runs())
        both.assert_equal()
        both.source.guest.words[::5, 9] += np.uint64(1)
        await both.round(runs_of(np.arange(0, 8 * HUGE, 5)))
        both.assert_equal()


async def test_only_huge_pages_without_a_zero_page_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with path(4 * HUGE, 2) as both:
        announced: list[list[int]] = []
        monkeypatch.setattr(both.receiver.populator, "expect", lambda runs: announced.extend(runs.tolist()))
        both.source.guest.words[:] = noise(4 * HUGE, 1)
        both.source.guest.words[2 * HUGE + 7] = 0
        both.send_with(announce=True)
        await both.round(run(0, 4 * HUGE))
        assert announced == [[0, 2 * HUGE], [3 * HUGE, HUGE]]
        both.assert_equal()


async def test_memory_that_is_announced_again_is_populated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with path(4 * HUGE, 1) as both:
        populated: list[tuple[int, int]] = []

        def populate(start: int, count: int) -> bool:
            populated.append((start, count))
            return True

        monkeypatch.setattr(both.destination.guest, "populate_huge", populate)
        for start in (0, 0, 0, 1):
            both.channels[0].send(messages.Extents(runs=pack_runs(run(start * HUGE, HUGE))), round_number=1)
        await until(lambda: (HUGE, HUGE) in populated)
        assert populated == [(0, HUGE), (HUGE, HUGE)]


async def test_memory_is_written_whole_also_when_the_kernel_takes_less_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    memory = Memory(8)
    try:
        memory.guest.write_new(3, np.frombuffer(content_of(2), np.uint64).reshape(2, WORDS_PER_PAGE))
        assert memory.content() == bytes(3 * PAGE_SIZE) + content_of(2) + bytes(3 * PAGE_SIZE)
    finally:
        memory.close()


def test_every_stretch_is_announced_before_its_batches_and_only_whole_huge_pages() -> None:
    runs = np.array([[3, 20_000], [30_000, 400], [40_960, 1024], [90_000, 5_000]], np.int64)
    batches = split_runs(runs, 256)
    jobs: list[Any] = [("batch", int(batch[0, 0])) for batch in batches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_pages, "_announce_job", lambda granules: ("announce", granules * HUGE))
        order: list[Any] = source_pages._looking_ahead(runs, batches, jobs)
    assert [job for job in order if job[0] == "batch"] == jobs
    announced = np.concatenate([extents for kind, extents in order if kind == "announce"])
    assert not (announced % HUGE).any()
    inside = [
        any(start >= first and start + count <= first + pages for first, pages in runs.tolist())
        for start, count in announced.tolist()
    ]
    assert all(inside)
    assert announced[:, 1].sum() == (19_968 - 512) + 1024 + 4_608
    seen: list[int] = []
    for kind, value in order:
        if kind == "announce":
            assert not any(first >= value[0, 0] for first in seen), "a stretch is announced after its own batches"
        else:
            seen.append(value)


def test_whether_the_host_has_shared_huge_pages(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "shmem_enabled"
    monkeypatch.setattr(memory_module, "_SHMEM_HUGE", setting)
    assert not memory_module.shared_huge_pages()
    for text, huge in (
        ("always within_size advise [never] deny force", False),
        ("always within_size advise never [deny] force", False),
        ("always within_size [advise] never deny force", True),
        ("[always] within_size advise never deny force", True),
    ):
        setting.write_text(text)
        assert memory_module.shared_huge_pages() is huge


# Section: without threads


async def test_a_few_pages_are_sent_without_threads_and_more_of_them_with() -> None:
    async with path(PAGES) as both:
        both.send_with()
        assert both.sender is not None
        sent_by: set[int | None] = set()
        send = DataChannel.send

        def noting(channel: DataChannel, *frame: Any, **options: Any) -> int:
            sent_by.add(threading.get_ident())
            return send(channel, *frame, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DataChannel, "send", noting)
            both.source.guest.words[3:6] = noise(3, 1)
            await both.round(run(3, 3))
            assert sent_by == {threading.get_ident()}
            both.assert_equal()
            sent_by.clear()
            both.source.guest.words[:100] = noise(100, 2)
            await both.round(run(0, 100))
        assert sent_by
        assert threading.get_ident() not in sent_by
        both.assert_equal()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


@pytest.mark.parametrize("pair", [tcp_pair, socket.socketpair])
def test_room_for_frames_is_room_that_nobody_waits_for(pair: Callable[[], tuple[socket.socket, socket.socket]]) -> None:
    near, far = pair()
    try:
        channel = data_channel(near, 0)
        at_first_bytes = channel.room_bytes()
        assert at_first_bytes > 8 * PAGE_SIZE
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(PAGE_SIZE))
        assert channel.room_bytes() == 0
        far.setblocking(False)
        deadline = time.monotonic() + WAIT_S
        while channel.room_bytes() < at_first_bytes and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                far.recv(1 << 20)
        # What it says there is room for goes without waiting: this would raise otherwise.
        assert channel.room_bytes() == at_first_bytes
        assert near.send(bytes(at_first_bytes)) == at_first_bytes
    finally:
        near.close()
        far.close()


def test_pages_that_take_long_to_encode_are_left_to_threads() -> None:
    assert BatchEncoder().quick
    assert BatchEncoder("lz4", cache=DeltaCache(1 << 20)).quick
    assert not BatchEncoder("zstd", 19).quick


# Section: device states


async def test_a_device_state_arrives_whole_over_several_channels() -> None:
    data = np.random.default_rng(1).bytes(5 * 1024 * 1024 + 17)
    async with path(16, 3) as both:
        both.send_with()
        assert both.sender is not None
        state = messages.DeviceState(
            order=0, name="disk", kind="non-iterable", final=True, offset=0, total_bytes=len(data),
            digest=xxhash.xxh3_64_intdigest(data), save_ns=1,
        )  # fmt: skip
        await both.sender.send_devices([OutgoingState(state, data)])
        async with asyncio.timeout(WAIT_S):
            arrived = await both.states.get()
        assert bytes(arrived.data) == data


# Section: what a broken or hostile source sends


def pages_message(runs: Runs, encoding: Encoding = "plain", digest: int = 0) -> messages.Pages:
    return messages.Pages(encoding=encoding, runs=pack_runs(runs), digest=digest)


def content_of(count: int) -> bytes:
    return noise(count, 1).tobytes()


def lz4_of(content: bytes) -> bytes:
    packed: bytes = lz4.block.compress(content, store_size=False)
    return packed


BOMB = lz4_of(bytes(64 << 20))
HOSTILE: dict[str, tuple[messages.Message, bytes, ErrorCode, str]] = {
    "a page outside the guest": (
        pages_message(run(15, 2)), content_of(2), ErrorCode.TOO_LARGE, "outside the guest's memory",
    ),
    "overlapping runs": (
        pages_message(np.array([[0, 4], [3, 2]])), content_of(6), ErrorCode.MALFORMED, "overlap",
    ),
    "descending runs": (
        pages_message(np.array([[8, 1], [3, 1]])), content_of(2), ErrorCode.MALFORMED, "overlap or descend",
    ),
    "an empty run": (
        pages_message(np.array([[1, 1], [2, 0]])), content_of(1), ErrorCode.MALFORMED, "empty run",
    ),
    "a run table of a broken length": (
        messages.Pages(encoding="plain", runs=b"123456789", digest=0), content_of(1), ErrorCode.MALFORMED, "run table",
    ),
    "a payload that is too short": (
        pages_message(run(0, 2)), content_of(1), ErrorCode.MALFORMED, "payload bytes, expected",
    ),
    "a payload that is too long": (
        pages_message(run(0, 1)), content_of(2), ErrorCode.MALFORMED, "payload bytes, expected",
    ),
    "a batch with another digest": (
        pages_message(run(0, 2), digest=1), content_of(2), ErrorCode.CORRUPT, "arrived damaged",
    ),
    "garbage instead of lz4": (
        pages_message(run(0, 2), "lz4"), b"\xff" * 999, ErrorCode.CORRUPT, "cannot be decoded",
    ),
    "garbage instead of zstd": (
        pages_message(run(0, 2), "zstd"), b"\xff" * 999, ErrorCode.CORRUPT, "cannot be decoded",
    ),
    "short content": (
        pages_message(run(0, 16), "lz4"), lz4_of(bytes(PAGE_SIZE)), ErrorCode.CORRUPT, "expected 65536",
    ),
    "a decompression bomb": (
        pages_message(run(0, 16), "lz4"), BOMB[: 16 * PAGE_SIZE - 1], ErrorCode.CORRUPT, "cannot be decoded",
    ),
    "a difference with another digest": (
        pages_message(run(0, 2), "xor-lz4", 1), lz4_of(bytes(2 * PAGE_SIZE)), ErrorCode.CORRUPT, "arrived damaged",
    ),
    "an encoded batch that is not smaller": (
        pages_message(run(0, 1), "lz4"), content_of(1), ErrorCode.MALFORMED, "fewer than",
    ),
    "zero pages with a payload": (
        messages.ZeroPages(runs=pack_runs(run(0, 1))), b"x", ErrorCode.MALFORMED, "payload bytes",
    ),
    "zero pages outside the guest": (
        messages.ZeroPages(runs=pack_runs(run(16, 1))), b"", ErrorCode.TOO_LARGE, "outside the guest's memory",
    ),
    "announced memory outside the guest": (
        messages.Extents(runs=pack_runs(run(0, 17))), b"", ErrorCode.TOO_LARGE, "outside the guest's memory",
    ),
    "a barrier of another round": (messages.Barrier(round=2), b"", ErrorCode.MALFORMED, "barrier for round 2"),
    "a message of the control channel": (messages.Commit(epoch=1), b"", ErrorCode.UNEXPECTED, "does not belong"),
    "the state of an unknown device": (
        messages.DeviceState(
            order=0, name="nic", kind="iterable", final=True, offset=0, total_bytes=1, digest=0, save_ns=0
        ),
        b"x", ErrorCode.MALFORMED, "which the guest lacks",
    ),
    "a damaged device state": (
        messages.DeviceState(
            order=0, name="disk", kind="non-iterable", final=True, offset=0, total_bytes=1, digest=0, save_ns=0
        ),
        b"x", ErrorCode.CORRUPT, "arrived damaged",
    ),
    "a device state beyond what was announced": (
        messages.DeviceState(
            order=0, name="disk", kind="non-iterable", final=True, offset=0, total_bytes=1 << 31, digest=0, save_ns=0
        ),
        b"x", ErrorCode.TOO_LARGE, "our VMM takes at most",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_frames_are_named_errors_and_write_nothing(name: str) -> None:
    message, payload, code, words = HOSTILE[name]
    async with path(16, 1) as both:
        round_number = 0 if isinstance(message, messages.DeviceState) else 1
        both.channels[0].send(message, [memoryview(payload)], round_number)
        failure = await both.failure()
        assert isinstance(failure, RemoteProtocolError)
        assert failure.code is code
        assert words in str(failure)
        assert both.destination.backed_pages() == 0
        assert os.fstat(both.destination.file).st_size == 16 * PAGE_SIZE


@pytest.mark.parametrize("encoding", ["zstd", "lz4", "xor-lz4"])
async def test_an_encoding_that_was_not_agreed_on_is_refused(encoding: Encoding) -> None:
    async with path(16, 1, capabilities=frozenset({"zero-runs"})) as both:
        both.channels[0].send(pages_message(run(0, 2), encoding), [memoryview(b"x" * 99)], 1)
        failure = await both.failure()
        assert isinstance(failure, RemoteProtocolError)
        assert failure.code is ErrorCode.UNEXPECTED
        assert "not agreed on" in str(failure)


async def test_a_batch_beyond_the_largest_payload_is_refused() -> None:
    async with path(2048, 1) as both:
        both.channels[0].send(pages_message(run(0, 1025), "lz4"), [memoryview(b"x" * 99)], 1)
        failure = await both.failure()
        assert isinstance(failure, RemoteProtocolError)
        assert failure.code is ErrorCode.TOO_LARGE


async def test_memory_announced_after_the_first_round_is_refused() -> None:
    async with path(16, 1) as both:
        both.channels[0].send(messages.Barrier(round=1), round_number=1)
        both.channels[0].send(messages.Extents(runs=pack_runs(run(0, 1))), round_number=2)
        failure = await both.failure()
        assert isinstance(failure, RemoteProtocolError)
        assert failure.code is ErrorCode.UNEXPECTED


async def test_memory_that_is_announced_without_agreement_is_refused() -> None:
    async with path(2 * HUGE, 1, capabilities=CAPABILITIES - {"extents"}) as both:
        both.channels[0].send(messages.Extents(runs=pack_runs(run(0, HUGE))), round_number=1)
        failure = await both.failure()
        assert isinstance(failure, RemoteProtocolError)
        assert failure.code is ErrorCode.UNEXPECTED
        assert "not agreed on" in str(failure)
        assert both.destination.backed_pages() == 0


async def test_no_more_memory_is_announced_than_there_is() -> None:
    async with path(HUGE, 1) as both:
        for _ in range(2):
            both.channels[0].send(messages.Extents(runs=pack_runs(run(0, HUGE))), round_number=1)
        failure = await both.failure()
        assert isinstance(failure, RemoteProtocolError)
        assert failure.code is ErrorCode.TOO_LARGE


async def test_a_few_bytes_of_zero_pages_take_no_more_memory_whatever_the_guest_has() -> None:
    """16 bytes that name all pages of a guest of 256 GiB, one of which holds something."""
    pages = (256 << 30) // PAGE_SIZE
    async with path(pages, 1) as both:
        both.channels[0].send(
            pages_message(run(5, 1), "plain", xxhash.xxh3_64_intdigest(content_of(1))), [memoryview(content_of(1))], 1
        )
        both.channels[0].send(messages.Barrier(round=1), round_number=1)
        _, received = await asyncio.wait_for(both.rounds.get(), WAIT_S)
        assert both.destination_digest is not None
        both.destination_digest.add(received.digest_delta)
        assert both.destination_digest.value != 0
        tracemalloc.start()
        try:
            both.channels[0].send(messages.ZeroPages(runs=pack_runs(run(0, pages))), round_number=2)
            both.channels[0].send(messages.Barrier(round=2), round_number=2)
            _, received = await asyncio.wait_for(both.rounds.get(), WAIT_S)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        both.destination_digest.add(received.digest_delta)
        assert both.destination_digest.value == 0
        assert received.zero_pages == pages
        assert peak_bytes < 16 << 20
        assert both.destination.backed_pages() == 1


async def test_a_round_names_each_page_as_zero_about_once() -> None:
    pages = 1 << 16
    async with path(pages, 1) as both:
        for _ in range(3):
            both.channels[0].send(messages.ZeroPages(runs=pack_runs(run(0, pages))), round_number=1)
        failure = await both.failure()
        assert isinstance(failure, RemoteProtocolError)
        assert failure.code is ErrorCode.TOO_LARGE
        assert "zero pages on one channel" in str(failure)


async def test_a_difference_to_a_page_that_never_travelled_is_one_to_zero() -> None:
    """The protocol says so; and looking at such a page must not populate its neighbours."""
    page = np.zeros(WORDS_PER_PAGE, np.uint64)
    page[3] = 5
    async with path(16, 1) as both:
        message = pages_message(run(4, 1), "xor-lz4", xxhash.xxh3_64_intdigest(page.tobytes()))
        both.channels[0].send(message, [memoryview(lz4_of(page.tobytes()))], 1)
        both.channels[0].send(messages.Barrier(round=1), round_number=1)
        async with asyncio.timeout(WAIT_S):
            await both.rounds.get()
        assert both.destination.content() == bytes(4 * PAGE_SIZE) + page.tobytes() + bytes(11 * PAGE_SIZE)
        assert both.destination.backed_pages() == 1


# Section: the end of a channel


async def test_a_lost_channel_ends_the_round_with_a_sentence() -> None:
    async with path(4096, 2) as both:
        both.send_with()
        both.source.guest.words[:] = noise(1, 1)
        both.channels[1].interrupt()
        assert both.sender is not None
        with pytest.raises((LinkLostError, MigrationError), match="data channel 1"):
            await both.sender.send_round(1, run(0, 4096))
        failure = await both.failure()
        assert isinstance(failure, MigrationError | ProtocolError)
        with pytest.raises(LinkLostError):
            await both.sender.send_round(2, run(0, 1))


async def test_an_error_that_is_kept_does_not_keep_guest_memory() -> None:
    """The receiver breaks in the middle of a batch that goes straight into guest memory."""
    async with path(16, 1) as both:
        both.send_with()
        both.source.guest.words[:] = noise(1, 1)
        await both.round(run(0, 16))
        message = pages_message(run(0, 2))
        head = messages.frame_head(MAJOR, message, 3, payload_bytes=2 * PAGE_SIZE, round_number=2)
        sock = both.channels[0]._wire.sock
        sock.sendall(head + content_of(1))  # and the second page never comes
        sock.shutdown(socket.SHUT_RDWR)
        failure = await both.failure()
        assert isinstance(failure, LinkLostError)
        await both.receiver.stop()
        both.destination.guest.release()
        assert failure.__traceback__ is not None


async def test_stopping_twice_leaves_no_thread_and_no_view() -> None:
    both = Path(4096, 2)
    both.send_with(announce=True)
    both.source.guest.words[:] = noise(1, 1)
    await both.round(run(0, 4096))
    assert both.sender is not None
    await both.sender.stop()
    await both.receiver.stop()
    await both.close()
