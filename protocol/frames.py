"""The frame: a fixed header, a small msgpack map (``meta``) and raw payload bytes.

    0      4   5    6     8        12          16         24      28         32           36
    | MGRD | v | type | flags | meta_len | payload_len | sequence | round | meta_crc | header_crc |  meta …  | payload …

All integers are big endian. ``meta_crc`` is CRC-32 over the meta, ``header_crc`` over header bytes 0 to 31: the header
is checked by itself, so that no damaged length is ever believed and waited for. Every length is checked against its
limit on the header too, before anything is allocated. The payload carries no checksum of its own here: page payloads
are covered by the memory digest (``protocol/digest.py``), device states by a digest in their meta.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError

MAGIC: Final = b"MGRD"
HEADER: Final = struct.Struct("!4sBBHIIQIII")
HEADER_BYTES: Final = HEADER.size
MAX_META_BYTES: Final = 64 << 10
MAX_PAYLOAD_BYTES: Final = 4 << 20
DEFAULT_PAYLOAD_BYTES: Final = 1 << 20

_HEADER_CRC_OFFSET: Final = 32


@dataclass(frozen=True, slots=True)
class Header:
    """A decoded frame header.

    Attributes:
        type: message type number, see ``protocol.messages``.
        meta_bytes: length of the msgpack map.
        payload_bytes: length of the raw payload.
        sequence: number of the frame on its channel and direction, from 0, without gaps.
        round: pre-copy round the frame belongs to, 0 outside rounds.
        meta_crc: CRC-32 of the meta as the header says it; ``check_meta`` compares it.
    """

    type: int
    meta_bytes: int
    payload_bytes: int
    sequence: int
    round: int
    meta_crc: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame. ``meta`` is still packed: ``protocol.messages.decode`` turns it into a message."""

    type: int
    meta: bytes
    payload: bytes
    sequence: int
    round: int


def pack_header(
    version: int, frame_type: int, meta: bytes, payload_bytes: int, sequence: int, round_number: int = 0
) -> bytes:
    """Return the 36 header bytes for a frame.

    Raises:
        LocalProtocolError: a length is beyond what any peer accepts.
    """
    if len(meta) > MAX_META_BYTES or not 0 <= payload_bytes <= MAX_PAYLOAD_BYTES:
        raise LocalProtocolError(
            f"frame type {frame_type} with {len(meta)} meta bytes and {payload_bytes} payload bytes is too large"
        )
    sequence &= 2**64 - 1
    head = HEADER.pack(
        MAGIC, version, frame_type, 0, len(meta), payload_bytes, sequence, round_number, zlib.crc32(meta), 0
    )[:_HEADER_CRC_OFFSET]
    return head + zlib.crc32(head).to_bytes(4, "big")


def unpack_header(data: bytes | bytearray | memoryview, version: int, max_payload_bytes: int) -> Header:
    """Decode and check the first 36 bytes of a frame. No field is used before the checksum is verified.

    Raises:
        RemoteProtocolError: wrong magic, version, checksum or flags, or a length beyond its limit.
    """
    head = bytes(data[:HEADER_BYTES])
    (
        magic,
        got_version,
        frame_type,
        flags,
        meta_bytes,
        payload_bytes,
        sequence,
        round_number,
        meta_crc,
        header_crc,
    ) = HEADER.unpack(head)
    if magic != MAGIC:
        raise RemoteProtocolError(f"the stream does not continue with a frame: magic {magic!r}, expected {MAGIC!r}")
    if got_version != version:
        raise RemoteProtocolError(f"frame version {got_version}, but version {version} was agreed", ErrorCode.VERSION)
    if zlib.crc32(head[:_HEADER_CRC_OFFSET]) != header_crc:
        raise RemoteProtocolError("a frame header is damaged: its checksum does not match", ErrorCode.CORRUPT)
    if flags:
        raise RemoteProtocolError(f"frame type {frame_type} has unknown flags {flags:#06x}")
    if meta_bytes > MAX_META_BYTES:
        raise RemoteProtocolError(
            f"frame type {frame_type} claims {meta_bytes} meta bytes, the limit is {MAX_META_BYTES}",
            ErrorCode.TOO_LARGE,
        )
    if payload_bytes > max_payload_bytes:
        raise RemoteProtocolError(
            f"frame type {frame_type} claims {payload_bytes} payload bytes, the agreed limit is {max_payload_bytes}",
            ErrorCode.TOO_LARGE,
        )
    return Header(frame_type, meta_bytes, payload_bytes, sequence, round_number, meta_crc)


def check_meta(meta: bytes | bytearray | memoryview, header: Header) -> None:
    """Compare the CRC in the header with the meta bytes as received.

    Raises:
        RemoteProtocolError: they differ.
    """
    if zlib.crc32(meta) != header.meta_crc:
        raise RemoteProtocolError(
            f"frame {header.sequence} of type {header.type} is damaged: the checksum of its meta does not match",
            ErrorCode.CORRUPT,
        )


class SequenceCheck:
    """Accepts the frames of one direction of one channel in order and names the first gap or repeat."""

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected

    def accept(self, sequence: int) -> None:
        """Advance by one frame.

        Raises:
            RemoteProtocolError: ``sequence`` is not the next one.
        """
        if sequence != self.expected:
            raise RemoteProtocolError(f"frame number {sequence} arrived, expected {self.expected}")
        self.expected += 1


class FrameParser:
    """Bytes in, whole frames out, for channels with small frames (the control channel).

    Data channels read headers and payloads with exact reads straight into their place and use ``unpack_header`` and
    ``check_meta`` directly. After the first error the parser stays failed: there is no way to find the next frame.

    Args:
        version: agreed protocol version.
        max_payload_bytes: agreed payload limit.
        first_sequence: number of the first frame expected here, when earlier ones were read by other means.
    """

    def __init__(self, version: int, max_payload_bytes: int = DEFAULT_PAYLOAD_BYTES, first_sequence: int = 0) -> None:
        self._version = version
        self._max_payload_bytes = max_payload_bytes
        self._buffer = bytearray()
        self._sequence = SequenceCheck(first_sequence)
        self._failed: RemoteProtocolError | None = None

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Add bytes and yield the frames that are complete now.

        Raises:
            RemoteProtocolError: the stream is damaged; raised again on every later call.
        """
        if self._failed is not None:
            raise self._failed
        self._buffer += data
        try:
            while (frame := self._next()) is not None:
                yield frame
        except RemoteProtocolError as error:
            self._failed = error
            self._buffer.clear()
            raise

    def receive_eof(self) -> None:
        """Say that the stream ended.

        Raises:
            RemoteProtocolError: it ended in the middle of a frame.
        """
        if self._failed is None and self._buffer:
            place = "header" if len(self._buffer) < HEADER_BYTES else "body"
            raise RemoteProtocolError(
                f"the connection ended inside the {place} of frame {self._sequence.expected} "
                f"after {len(self._buffer)} bytes"
            )

    def _next(self) -> Frame | None:
        if len(self._buffer) < HEADER_BYTES:
            return None
        header = unpack_header(self._buffer, self._version, self._max_payload_bytes)
        meta_end = HEADER_BYTES + header.meta_bytes
        end = meta_end + header.payload_bytes
        if len(self._buffer) < end:
            return None
        meta = bytes(self._buffer[HEADER_BYTES:meta_end])
        check_meta(meta, header)
        self._sequence.accept(header.sequence)
        payload = bytes(self._buffer[meta_end:end])
        del self._buffer[:end]
        return Frame(header.type, meta, payload, header.sequence, header.round)
