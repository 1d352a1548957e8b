"""Framing of the API socket, shared by server and client.

    +----------------+-------------------+----------------+----------------+
    | meta_len (u32) | payload_len (u32) | msgpack map    | payload bytes  |      big endian
    +----------------+-------------------+----------------+----------------+

File descriptors ride with the first byte of a reply.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgpack

HEADER: Final = struct.Struct("!II")
MAX_META_BYTES: Final = 1 << 20
MAX_PAYLOAD_BYTES: Final = 1 << 30
MAX_FDS: Final = 4


class FrameError(Exception):
    """A frame that is too long or does not decode."""


def _reject_ext(code: int, _data: bytes) -> object:
    raise ValueError(f"extension type {code} is not allowed")


def check_header(header: bytes | bytearray | memoryview) -> tuple[int, int]:
    """``(meta_len, payload_len)`` of the 8 header bytes. Raises FrameError beyond the limits."""
    meta_len, payload_len = HEADER.unpack(header)
    if meta_len > MAX_META_BYTES or payload_len > MAX_PAYLOAD_BYTES:
        raise FrameError(
            f"A frame of {meta_len} meta and {payload_len} payload bytes is longer than"
            f" {MAX_META_BYTES} and {MAX_PAYLOAD_BYTES} allow."
        )
    return meta_len, payload_len


def decode_meta(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The msgpack map of a frame, arrays as tuples (as strict models want them). Raises FrameError."""
    try:
        meta = msgpack.unpackb(data, use_list=False, strict_map_key=True, ext_hook=_reject_ext)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.StackError) as error:
        raise FrameError(f"The frame's map does not decode: {type(error).__name__}.") from error
    if not isinstance(meta, dict):
        raise FrameError("The frame does not hold a map.")
    return meta


def encode_head(meta: dict[str, Any], payload_len: int) -> bytes:
    """Header and map of a frame; the payload follows on the wire."""
    body: bytes = msgpack.packb(meta)
    if len(body) > MAX_META_BYTES or payload_len > MAX_PAYLOAD_BYTES:
        raise FrameError(f"A frame of {len(body)} meta and {payload_len} payload bytes is too long to send.")
    return HEADER.pack(len(body), payload_len) + body
