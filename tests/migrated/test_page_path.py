"""Pages and states between two memories arrive as they were sent, in every encoding.

source memfd -> PageSender -> socket pair x channels -> PageReceiver -> destination memfd
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from migrated.base.errors import LinkLostError, MigrationError
from migrated.link.data import DataChannel
from migrated.source.encoding import BatchEncoder, DeltaCache, EncodingTotals
from migrated.source.pages import OutgoingState
from migrated.vmm.memory import WORDS_PER_PAGE, MappedMemory
from protocol import messages
from protocol.errors import ProtocolError
from protocol.guest import PAGE_SIZE
from protocol.messages import Encoding
from protocol.pages import NO_RUNS, runs_of
from tests.migrated.page_paths import PAGES, WAIT_S, Path, data_channel, noise, path, run, slow_link

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


async def test_stopping_twice_leaves_no_thread_and_no_view() -> None:
    both = Path(4096, 2)
    both.send_with(announce=True)
    both.source.guest.words[:] = noise(1, 1)
    await both.round(run(0, 4096))
    assert both.sender is not None
    await both.sender.stop()
    await both.receiver.stop()
    await both.close()
