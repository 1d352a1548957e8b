"""What a broken or hostile source sends over a data channel is a named error, and nothing of it is written."""

from __future__ import annotations

import asyncio
import os
import socket
import tracemalloc

import lz4.block
import numpy as np
import pytest
import xxhash

from migrated.base.errors import LinkLostError
from migrated.vmm.memory import WORDS_PER_PAGE
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest import PAGE_SIZE
from protocol.messages import Encoding
from protocol.pages import Runs, pack_runs
from protocol.versions import CAPABILITIES, MAJOR
from tests.migrated.page_paths import HUGE, WAIT_S, content_of, noise, path, run


def pages_message(runs: Runs, encoding: Encoding = "plain", digest: int = 0) -> messages.Pages:
    return messages.Pages(encoding=encoding, runs=pack_runs(runs), digest=digest)


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
