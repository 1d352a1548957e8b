"""The pages of an encoded batch: decoded into staging, never into more than the run table announced.

The payload comes from another host, so nothing in it is trusted: every decoder is bounded by the size that the run
table gives, and short, long or damaged content is a named error before a page is written.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, get_args

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest import PAGE_SIZE
from protocol.messages import Encoding

CAPABILITY_OF: Final[dict[Encoding, str]] = {"zstd": "zstd", "lz4": "lz4", "xor-lz4": "xor-delta"}
"""The capability that allows an encoding; ``plain`` needs none."""


def allowed_encodings(capabilities: Collection[str]) -> frozenset[Encoding]:
    """The encodings that may come when these capabilities are in force."""
    encodings: tuple[Encoding, ...] = get_args(Encoding)
    return frozenset(name for name in encodings if name not in CAPABILITY_OF or CAPABILITY_OF[name] in capabilities)


def check_encoding(encoding: Encoding, allowed: Collection[Encoding], payload_bytes: int, pages: int) -> None:
    """Check what the header says of a batch, before its payload is read.

    Raises:
        RemoteProtocolError: an encoding that was not agreed on, or a payload that is not the pages' size (plain) or
            not smaller (encoded).
    """
    if encoding not in allowed:
        raise RemoteProtocolError(
            f"a batch comes with encoding {encoding}, which was not agreed on", ErrorCode.UNEXPECTED
        )
    page_bytes = pages * PAGE_SIZE
    if encoding == "plain" and payload_bytes != page_bytes:
        raise RemoteProtocolError(
            f"a plain batch of {pages} pages has {payload_bytes} payload bytes, expected {page_bytes}"
        )
    if encoding != "plain" and not 0 < payload_bytes < page_bytes:
        raise RemoteProtocolError(
            f"a batch of {pages} pages with encoding {encoding} has {payload_bytes} payload bytes: it must have some, "
            f"and fewer than {page_bytes}"
        )


def decode(encoding: Encoding, payload: memoryview, out: npt.NDArray[np.uint64]) -> None:
    """Decode a payload over ``out``, shape (n, 512), contiguous. For ``xor-lz4`` it holds the pages as they are now.

    Raises:
        RemoteProtocolError: the payload is damaged, or its content is not n pages. ``out`` is then as it was.
    """
    expected = out.nbytes
    content = _unpack_zstd(payload, expected) if encoding == "zstd" else _unpack_lz4(payload, expected, encoding)
    if len(content) != expected:
        raise _damaged(encoding, f"its content has {len(content)} bytes, expected {expected}")
    words = np.frombuffer(content, np.uint64).reshape(out.shape)
    if encoding == "xor-lz4":
        np.bitwise_xor(out, words, out=out)
    else:
        np.copyto(out, words)


def _unpack_lz4(payload: memoryview, expected: int, encoding: Encoding) -> bytes:
    try:
        content: bytes = lz4.block.decompress(payload, uncompressed_size=expected)
    except (lz4.block.LZ4BlockError, ValueError, OverflowError) as error:
        raise _damaged(encoding, str(error)) from error
    return content


def _unpack_zstd(payload: memoryview, expected: int) -> bytes:
    try:
        # The frame's own word for its size is what the library allocates: check it first.
        announced = zstandard.frame_content_size(payload)
        if announced != expected:
            raise _damaged("zstd", f"it announces {announced} bytes of content, expected {expected}")
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=expected, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, OverflowError) as error:
        raise _damaged("zstd", str(error)) from error


def _damaged(encoding: Encoding, reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"a batch with encoding {encoding} cannot be decoded: {reason}", ErrorCode.CORRUPT)
