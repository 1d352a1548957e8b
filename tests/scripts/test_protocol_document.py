"""docs/protocol.md is enough for a second implementation: its example can be followed by hand."""

from __future__ import annotations

import re
import zlib

import numpy as np
import xxhash

from protocol.frames import FrameParser
from protocol.messages import MESSAGES, Commit, Hello, Pages, RoundDone, ZeroPages, decode
from protocol.pages import indices_of, unpack_runs
from protocol.versions import MAJOR, unpack_preface
from scripts.documents import protocol as protocol_document


def test_every_field_has_a_meaning_and_no_meaning_is_left_over() -> None:
    fields = {
        f"{model.__name__}.{name}" for model in (*MESSAGES, *protocol_document.PARTS) for name in model.model_fields
    }
    assert set(protocol_document.MEANINGS) == fields
    assert set(protocol_document.DIRECTIONS) == {model.TYPE.name for model in MESSAGES}


def example() -> list[bytes]:
    """The dumps of the document, read back from its text alone."""
    text = protocol_document.DOCUMENT.read_text(encoding="utf-8").partition("<!-- example begin -->")[2]
    dumps = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [[re.match(r" *\d+  ((?:[0-9a-f]{2} ?)+)", line) for line in dump.splitlines()] for dump in dumps]
    return [b"".join(bytes.fromhex(line[1]) for line in dump if line) for dump in lines]


def test_the_example_can_be_followed_by_hand() -> None:
    preface, *frames = example()
    assert unpack_preface(preface).major == MAJOR
    messages = []
    payload = bytes([0x11]) * 4096 + bytes([0x22]) * 4096 + bytes([0x33]) * 4096
    for raw in frames:
        assert zlib.crc32(raw[36:]) == int.from_bytes(raw[28:32], "big")
        assert zlib.crc32(raw[:32]) == int.from_bytes(raw[32:36], "big")
        whole = raw + payload[: int.from_bytes(raw[12:16], "big")]
        parser = FrameParser(MAJOR, first_sequence=int.from_bytes(raw[16:24], "big"))
        (frame,) = parser.receive(whole)
        messages.append(decode(frame.type, frame.meta))
    assert isinstance(messages[0], Hello)
    assert isinstance(messages[-1], Commit)

    pages = next(message for message in messages if isinstance(message, Pages))
    zero = next(message for message in messages if isinstance(message, ZeroPages))
    done = next(message for message in messages if isinstance(message, RoundDone))
    assert indices_of(unpack_runs(pages.runs, 8)).tolist() == [1, 2, 5]
    assert indices_of(unpack_runs(zero.runs, 8)).tolist() == [0, 7]
    assert pages.digest == xxhash.xxh3_64_intdigest(payload)
    assert done.digest == digest_by_the_document(pages.digest, [1, 2, 5])


def digest_by_the_document(batch_hash: int, pages: list[int]) -> int:
    """The section on the memory digest, word for word."""

    def scramble(x: int) -> int:
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 % 2**64
        return x ^ x >> 32

    total = 0
    for slot, page in enumerate(pages):
        entry = scramble((batch_hash + slot * 0x9E3779B97F4A7C15) % 2**64) | 1
        total += scramble(entry ^ (page + 1) * 0xC2B2AE3D27D4EB4F % 2**64)
    return total % 2**64


def test_the_digest_constants_are_odd() -> None:
    """An even factor would lose bits."""
    constants = (0xD6E8FEB86659FD93, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
    assert np.all(np.array(constants, np.uint64) & np.uint64(1))
    for constant in constants:
        assert f"{constant:X}" in protocol_document.DOCUMENT.read_text(encoding="utf-8")
