"""Frames: any chunking gives the same frames, and damage of any kind ends in a named error or in no frame at all."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from protocol.frames import (
    DEFAULT_PAYLOAD_BYTES,
    HEADER_BYTES,
    MAX_META_BYTES,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameParser,
    SequenceCheck,
    check_meta,
    pack_header,
    unpack_header,
)

VERSION = 2

bodies = st.lists(
    st.tuples(st.integers(0, 255), st.binary(max_size=40), st.binary(max_size=80), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=6,
)
flips = st.integers(1, 255)


def pack(frames: list[tuple[int, bytes, bytes, int]]) -> list[bytes]:
    return [
        pack_header(VERSION, kind, meta, len(payload), sequence, number) + meta + payload
        for sequence, (kind, meta, payload, number) in enumerate(frames)
    ]


def checked(head: bytes) -> bytes:
    """A header with its right checksum behind it, whatever it says."""
    return head + struct.pack("!I", zlib.crc32(head))


def expected(frames: list[tuple[int, bytes, bytes, int]]) -> list[Frame]:
    return [Frame(kind, meta, payload, at, number) for at, (kind, meta, payload, number) in enumerate(frames)]


def parse(stream: bytes) -> tuple[list[Frame], RemoteProtocolError | None]:
    """Every frame up to the end or the first error."""
    parser, frames = FrameParser(VERSION), []
    try:
        for frame in parser.receive(stream):
            frames.append(frame)  # noqa: PERF402 -- what came before an error counts
        parser.receive_eof()
    except RemoteProtocolError as error:
        return frames, error
    return frames, None


def test_header_is_laid_out_as_drawn() -> None:
    header = pack_header(VERSION, 34, b"\x80", 4096, 7, 3)
    body = b"MGRD" + struct.pack("!BBHIIQII", 2, 34, 0, 1, 4096, 7, 3, zlib.crc32(b"\x80"))
    assert header == body + struct.pack("!I", zlib.crc32(body))
    assert len(header) == HEADER_BYTES == 36


@given(bodies, st.lists(st.integers(0, 800), max_size=12))
def test_any_chunking_gives_the_same_frames(frames: list[tuple[int, bytes, bytes, int]], cuts: list[int]) -> None:
    stream = b"".join(pack(frames))
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    parser = FrameParser(VERSION)
    got = [frame for begin, end in pairwise(edges) for frame in parser.receive(stream[begin:end])]
    parser.receive_eof()
    assert got == expected(frames)


@given(bodies)
def test_byte_by_byte(frames: list[tuple[int, bytes, bytes, int]]) -> None:
    parser = FrameParser(VERSION)
    stream = b"".join(pack(frames))
    got = [frame for at in range(len(stream)) for frame in parser.receive(stream[at : at + 1])]
    assert got == expected(frames)


@given(bodies, st.integers(0, 10_000), flips)
def test_a_damaged_byte_spoils_no_frame_but_a_payload(
    frames: list[tuple[int, bytes, bytes, int]], place: int, flip: int
) -> None:
    packed = pack(frames)
    stream = bytearray(b"".join(packed))
    place %= len(stream)
    stream[place] ^= flip
    got, error = parse(bytes(stream))

    hit, begin = 0, 0
    while place >= begin + len(packed[hit]):
        begin += len(packed[hit])
        hit += 1
    assert got[:hit] == expected(frames)[:hit]
    if place < begin + HEADER_BYTES + len(frames[hit][1]):
        assert len(got) == hit, "a frame with a damaged header or meta got through"
        assert error is not None
    else:
        # The payload's own digest is in the meta; the frame layer hands it on.
        assert error is None
        assert [frame.meta for frame in got] == [meta for _, meta, _, _ in frames]


@given(st.binary(max_size=300))
def test_garbage_raises_only_remote_protocol_errors(data: bytes) -> None:
    frames, error = parse(data)
    assert frames == []
    assert (error is None) == (data == b"")


@given(bodies, st.integers(0, 10_000))
def test_a_cut_stream_is_named_at_its_end(frames: list[tuple[int, bytes, bytes, int]], cut: int) -> None:
    packed = pack(frames)
    stream = b"".join(packed)
    cut %= len(stream)
    got, error = parse(stream[:cut])
    assert got == expected(frames)[: len(got)]
    inside = cut - sum(map(len, packed[: len(got)]))
    if not inside:
        assert error is None
    else:
        assert error is not None
        place = "header" if inside < HEADER_BYTES else "body"
        assert f"inside the {place} of frame {len(got)} after {inside} bytes" in str(error)


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        ([0, 2], "frame number 2 arrived, expected 1"),
        ([0, 0], "frame number 0 arrived, expected 1"),
        ([1], "frame number 1 arrived, expected 0"),
    ],
)
def test_gaps_and_repeats_are_named(order: list[int], sentence: str) -> None:
    packed = pack([(1, b"", b"", 0)] * 3)
    _, error = parse(b"".join(packed[at] for at in order))
    assert sentence in str(error)


def test_sequence_check_stays_where_it_was_after_an_error() -> None:
    check = SequenceCheck()
    check.accept(0)
    with pytest.raises(RemoteProtocolError):
        check.accept(5)
    check.accept(1)
    assert check.expected == 2


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("meta", MAX_META_BYTES + 1, MAX_META_BYTES),
        ("meta", 2**32 - 1, MAX_META_BYTES),
        ("payload", DEFAULT_PAYLOAD_BYTES + 1, DEFAULT_PAYLOAD_BYTES),
        ("payload", 2**32 - 1, DEFAULT_PAYLOAD_BYTES),
    ],
)
def test_a_length_bomb_is_refused_on_the_header_alone(field: str, value: int, limit: int) -> None:
    lengths = (value, 0) if field == "meta" else (0, value)
    _, error = parse(checked(b"MGRD" + struct.pack("!BBHIIQII", VERSION, 1, 0, *lengths, 0, 0, 0)))
    assert error is not None
    assert error.code is ErrorCode.TOO_LARGE
    assert str(value) in str(error)
    assert str(limit) in str(error)


def test_the_agreed_payload_limit_counts_and_not_the_default() -> None:
    header = pack_header(VERSION, 1, b"", 2048, 0)
    assert unpack_header(header, VERSION, 2048).payload_bytes == 2048
    with pytest.raises(RemoteProtocolError, match="the agreed limit is 2047"):
        unpack_header(header, VERSION, 2047)


@pytest.mark.parametrize(
    ("offset", "code", "sentence"),
    [
        (0, ErrorCode.MALFORMED, "does not continue with a frame"),
        (4, ErrorCode.VERSION, "but version 2 was agreed"),
        (6, ErrorCode.CORRUPT, "a frame header is damaged"),
        (8, ErrorCode.CORRUPT, "a frame header is damaged"),
        (15, ErrorCode.CORRUPT, "a frame header is damaged"),
        (20, ErrorCode.CORRUPT, "a frame header is damaged"),
        (31, ErrorCode.CORRUPT, "a frame header is damaged"),
        (35, ErrorCode.CORRUPT, "a frame header is damaged"),
    ],
)
def test_each_header_fault_has_its_name(offset: int, code: ErrorCode, sentence: str) -> None:
    header = bytearray(pack_header(VERSION, 1, b"", 0, 0))
    header[offset] ^= 0x40
    _, error = parse(bytes(header))
    assert error is not None
    assert error.code is code
    assert sentence in str(error)


@pytest.mark.parametrize("flags", [1, 0x8000])
def test_flags_that_nobody_knows_are_refused(flags: int) -> None:
    _, error = parse(checked(b"MGRD" + struct.pack("!BBHIIQII", VERSION, 1, flags, 0, 0, 0, 0, 0)))
    assert error is not None
    assert "unknown flags" in str(error)


@given(st.integers(8, 15), flips)
def test_a_damaged_length_is_never_waited_for(place: int, flip: int) -> None:
    """The lengths are within their limits more often than not: without a checksum of its own the header would be
    believed, and the receiver would wait for bytes that nobody sends."""
    header = bytearray(pack_header(VERSION, 1, b"\x80", 4096, 0))
    header[place] ^= flip
    parser = FrameParser(VERSION)
    with pytest.raises(RemoteProtocolError, match="a frame header is damaged") as caught:
        list(parser.receive(bytes(header)))
    assert caught.value.code is ErrorCode.CORRUPT


def test_a_failed_parser_stays_failed() -> None:
    parser = FrameParser(VERSION)
    good = pack([(1, b"", b"", 0)])[0]
    with pytest.raises(RemoteProtocolError) as first:
        list(parser.receive(b"X" * HEADER_BYTES))
    with pytest.raises(RemoteProtocolError) as second:
        list(parser.receive(good))
    assert second.value is first.value


def test_this_side_never_packs_what_no_peer_accepts() -> None:
    assert pack_header(VERSION, 1, bytes(MAX_META_BYTES), MAX_PAYLOAD_BYTES, 2**64 - 1, 2**32 - 1)
    with pytest.raises(LocalProtocolError, match="is too large"):
        pack_header(VERSION, 1, bytes(MAX_META_BYTES + 1), 0, 0)
    with pytest.raises(LocalProtocolError, match="is too large"):
        pack_header(VERSION, 1, b"", MAX_PAYLOAD_BYTES + 1, 0)
    with pytest.raises(LocalProtocolError, match="is too large"):
        pack_header(VERSION, 1, b"", -1, 0)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_a_data_channel_can_check_header_and_meta_apart(meta: bytes, other: bytes) -> None:
    raw = pack_header(VERSION, 34, meta, 10, 3, 2)
    header = unpack_header(memoryview(raw), VERSION, 64)
    assert (header.type, header.meta_bytes, header.payload_bytes, header.sequence, header.round) == (
        34,
        len(meta),
        10,
        3,
        2,
    )
    check_meta(meta, header)
    if other != meta:
        with pytest.raises(RemoteProtocolError, match="checksum"):
            check_meta(other, header)
