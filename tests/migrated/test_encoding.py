"""Encodings by themselves: what is chosen, that it decodes to the same pages, and that damage is a named error."""

from __future__ import annotations

import tracemalloc

import lz4.block
import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from migrated.destination.decoding import allowed_encodings, check_encoding, decode
from migrated.settings.parameters import MigrationParameters
from migrated.source.encoding import BatchEncoder, DeltaCache, EncodingTotals, LinkSpeed, encoder_factory
from migrated.vmm.memory import WORDS_PER_PAGE
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest import PAGE_SIZE
from protocol.messages import Encoding
from protocol.versions import CAPABILITIES

MIB = 1 << 20
Pages = npt.NDArray[np.uint64]


def link_of(bytes_per_s: float) -> LinkSpeed:
    """A link whose speed is known already."""
    link = LinkSpeed()
    link.add(64 * MIB, int(64 * MIB / bytes_per_s * 1e9))
    return link


def slow() -> LinkSpeed:
    return link_of(1e6)


def text(count: int, seed: int = 1) -> Pages:
    """Pages that compress well, each different."""
    rows = np.zeros((count, WORDS_PER_PAGE), np.uint64)
    rows[:, ::16] = np.random.default_rng(seed).integers(1, 1 << 60, (count, WORDS_PER_PAGE // 16), np.uint64)
    return rows


def noise(count: int, seed: int = 1) -> Pages:
    """Pages that do not compress."""
    return np.random.default_rng(seed).integers(1, 1 << 63, (count, WORDS_PER_PAGE), np.uint64)


def numbers(count: int, first: int = 0) -> npt.NDArray[np.int64]:
    return np.arange(first, first + count, dtype=np.int64)


def decoded(encoding: Encoding, payload: list[memoryview], before: Pages) -> Pages:
    out = before.copy()
    if encoding == "plain":
        return np.frombuffer(b"".join(payload), np.uint64).reshape(out.shape)
    decode(encoding, memoryview(b"".join(payload)), out)
    return out


# Section: what is chosen


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_batch_that_compresses_travels_compressed_on_a_slow_link(compression: Encoding) -> None:
    encoder, pages = BatchEncoder(compression, link=slow()), text(64)
    totals: dict[str, EncodingTotals] = {}
    [batch] = encoder.encode(numbers(64), pages, 1, totals)
    assert batch.encoding == compression
    assert batch.wire_bytes < pages.nbytes // 4
    np.testing.assert_array_equal(decoded(batch.encoding, batch.payload, np.zeros_like(pages)), pages)
    booked = totals[compression]
    assert (booked.batches, booked.page_bytes, booked.wire_bytes) == (1, pages.nbytes, batch.wire_bytes)
    assert booked.ns > 0


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_an_incompressible_batch_travels_plain_and_its_attempt_is_booked(compression: Encoding) -> None:
    encoder, pages = BatchEncoder(compression, link=slow()), noise(64)
    totals: dict[str, EncodingTotals] = {}
    [batch] = encoder.encode(numbers(64), pages, 1, totals)
    assert batch.encoding == "plain"
    assert b"".join(batch.payload) == pages.tobytes()
    assert totals["plain"] == EncodingTotals(1, pages.nbytes, pages.nbytes, 0)
    assert (totals[compression].batches, totals[compression].wire_bytes) == (0, 0)
    assert totals[compression].ns > 0


def test_a_link_that_is_faster_than_the_codec_gets_plain_batches() -> None:
    encoder = BatchEncoder("zstd", 19, link=link_of(1e15))
    totals: dict[str, EncodingTotals] = {}
    [batch] = encoder.encode(numbers(64), text(64), 1, totals)
    assert batch.encoding == "plain"


def test_while_the_link_is_unknown_what_was_asked_for_is_tried() -> None:
    encoder = BatchEncoder("zstd")
    totals: dict[str, EncodingTotals] = {}
    encoder.sent(MIB, 1)  # into the socket's buffer: says nothing yet
    [batch] = encoder.encode(numbers(64), text(64), 1, totals)
    assert batch.encoding == "zstd"


def test_a_link_that_slows_down_is_noticed() -> None:
    link = link_of(1e12)
    assert not link.worth(MIB, 1_000_000)
    for _ in range(100):
        link.add(MIB, 10_000_000)
    assert link.worth(MIB, 1_000_000)
    assert not link.worth(-1, 1_000_000)


def test_what_loses_is_only_sampled_until_it_gains_again() -> None:
    encoder = BatchEncoder("lz4", link=slow())
    totals: dict[str, EncodingTotals] = {}
    for _ in range(8):
        encoder.encode(numbers(16), noise(16), 1, totals)
    spent_ns = totals["lz4"].ns
    [batch] = encoder.encode(numbers(16), text(16), 1, totals)
    assert batch.encoding == "plain"
    assert totals["lz4"].ns == spent_ns, "it was tried although it had lost every time"
    later = [encoder.encode(numbers(16), text(16), 1, totals)[0].encoding for _ in range(64)]
    assert "lz4" in later
    assert later[-1] == "lz4"


# Section: delta


def test_a_page_sent_before_travels_as_its_difference() -> None:
    encoder = BatchEncoder(cache=DeltaCache(MIB), link=slow())
    totals: dict[str, EncodingTotals] = {}
    pages = noise(64)
    [first] = encoder.encode(numbers(64), pages, 1, totals)
    assert first.encoding == "plain"
    changed = pages.copy()
    changed[:, 100:108] += np.uint64(1)
    [second] = encoder.encode(numbers(64), changed, 2, totals)
    assert second.encoding == "xor-lz4"
    assert second.wire_bytes * 20 < pages.nbytes
    np.testing.assert_array_equal(decoded("xor-lz4", second.payload, pages), changed)


def test_only_the_pages_in_the_cache_travel_as_a_difference() -> None:
    encoder = BatchEncoder("lz4", cache=DeltaCache(MIB), link=slow())
    totals: dict[str, EncodingTotals] = {}
    pages = noise(32)
    encoder.encode(numbers(16), pages[:16], 1, totals)
    mixed = np.random.default_rng(3).permutation(32)
    indices = np.sort(mixed[:24]).astype(np.int64)
    delta, rest = encoder.encode(indices, pages[indices], 2, totals)
    assert (delta.encoding, rest.encoding) == ("xor-lz4", "plain")
    assert set(delta.indices.tolist()) == {i for i in indices.tolist() if i < 16}
    assert set(rest.indices.tolist()) == {i for i in indices.tolist() if i >= 16}
    np.testing.assert_array_equal(rest.pages, pages[rest.indices])


def test_a_page_that_changed_wholly_travels_plain() -> None:
    encoder = BatchEncoder(cache=DeltaCache(MIB), link=slow())
    totals: dict[str, EncodingTotals] = {}
    encoder.encode(numbers(16), noise(16, 1), 1, totals)
    [batch] = encoder.encode(numbers(16), noise(16, 2), 2, totals)
    assert batch.encoding == "plain"


def test_a_page_sent_as_zero_is_forgotten() -> None:
    encoder = BatchEncoder(cache=DeltaCache(MIB), link=slow())
    totals: dict[str, EncodingTotals] = {}
    pages = noise(16)
    encoder.encode(numbers(16), pages, 1, totals)
    encoder.zeroed(numbers(8))
    delta, plain = encoder.encode(numbers(16), pages, 3, totals)
    assert delta.indices.tolist() == list(range(8, 16))
    assert plain.indices.tolist() == list(range(8))


def test_the_cache_is_bounded_and_keeps_what_is_sent_again_and_again() -> None:
    cache = DeltaCache(64 * PAGE_SIZE)
    hot, cold = numbers(16), numbers(256, 1000)
    delta = np.empty((256, WORDS_PER_PAGE), np.uint64)
    pages = noise(256)
    cache.exchange(hot, pages[:16], 2, delta)
    for round_number in range(3, 8):
        assert cache.exchange(hot, pages[:16], round_number, delta).all()
        hits = cache.exchange(cold + round_number * 256, pages, round_number, delta)
        assert not hits.any()
    assert cache.exchange(cold + 7 * 256, pages, 8, delta).sum() <= 48


round_contents = st.lists(
    st.dictionaries(st.integers(0, 63), st.one_of(st.just("zero"), st.integers(0, 1 << 32)), min_size=1, max_size=24),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(rounds=round_contents, slots=st.integers(1, 40))
def test_deltas_against_the_cache_always_give_the_page_that_was_sent(
    rounds: list[dict[int, object]], slots: int
) -> None:
    """Several encoders share a cache of any size; a receiver that only follows the frames has the same pages."""
    cache = DeltaCache(slots * PAGE_SIZE)
    encoders = [BatchEncoder(cache=cache, link=slow()) for _ in range(3)]
    held = np.zeros((64, WORDS_PER_PAGE), np.uint64)
    for round_number, contents in enumerate(rounds, 1):
        for turn, share in enumerate(np.array_split(np.array(sorted(contents), np.int64), 3)):
            encoder = encoders[(turn + round_number) % 3]
            zero = np.array([page for page in share.tolist() if contents[page] == "zero"], np.int64)
            if len(zero):
                held[zero] = 0
                encoder.zeroed(zero)
            kept = np.setdiff1d(share, zero)
            if not len(kept):
                continue
            pages = np.repeat(noise(1), len(kept), axis=0)
            pages[:, 5] = np.array([contents[page] for page in kept.tolist()], np.uint64)
            for batch in encoder.encode(kept, pages, round_number, {}):
                held[batch.indices] = decoded(batch.encoding, batch.payload, held[batch.indices])
            np.testing.assert_array_equal(held[kept], pages)


# Section: what is agreed on


def test_an_encoding_is_used_only_when_it_was_asked_for_and_agreed_on() -> None:
    asked = MigrationParameters(compression="zstd", xor_delta=True)

    def encodings(parameters: MigrationParameters, capabilities: set[str]) -> set[str]:
        encoder = encoder_factory(parameters, capabilities)()
        used: set[str] = set()
        for round_number in (1, 2, 3):
            batches = encoder.encode(numbers(16, 16 * (round_number // 3)), text(16), round_number, {})
            used |= {batch.encoding for batch in batches}
        return used

    assert encodings(asked, set(CAPABILITIES)) == {"zstd", "xor-lz4"}
    assert encodings(asked, {"zstd"}) == {"zstd"}
    assert encodings(asked, {"xor-delta"}) == {"plain", "xor-lz4"}
    assert encodings(asked, set()) == {"plain"}
    assert encodings(MigrationParameters(), set(CAPABILITIES)) == {"plain"}


def test_the_encodings_that_may_come_follow_the_capabilities() -> None:
    assert allowed_encodings(set()) == {"plain"}
    assert allowed_encodings({"zstd", "zero-runs"}) == {"plain", "zstd"}
    assert allowed_encodings(CAPABILITIES) == {"plain", "zstd", "lz4", "xor-lz4"}


@pytest.mark.parametrize(
    ("encoding", "payload_bytes", "code"),
    [
        ("lz4", 100, ErrorCode.UNEXPECTED),
        ("plain", 4 * PAGE_SIZE - 1, ErrorCode.MALFORMED),
        ("plain", 0, ErrorCode.MALFORMED),
        ("zstd", 4 * PAGE_SIZE, ErrorCode.MALFORMED),
        ("zstd", 0, ErrorCode.MALFORMED),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(encoding: Encoding, payload_bytes: int, code: ErrorCode) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        check_encoding(encoding, {"plain", "zstd"}, payload_bytes, 4)
    assert caught.value.code is code


# Section: damage


def packed(encoding: Encoding, content: bytes) -> bytes:
    if encoding == "zstd":
        return zstandard.ZstdCompressor().compress(content)
    result: bytes = lz4.block.compress(content, store_size=False)
    return result


ENCODED: list[Encoding] = ["zstd", "lz4", "xor-lz4"]


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("surplus_bytes", [-PAGE_SIZE, -1, 1, PAGE_SIZE])
def test_content_of_another_size_is_an_error_and_changes_nothing(encoding: Encoding, surplus_bytes: int) -> None:
    out = noise(4)
    before = out.copy()
    payload = packed(encoding, b"x" * (out.nbytes + surplus_bytes))
    with pytest.raises(RemoteProtocolError, match="cannot be decoded") as caught:
        decode(encoding, memoryview(payload), out)
    assert caught.value.code is ErrorCode.CORRUPT
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_decompression_bomb_does_not_get_more_memory_than_the_pages(encoding: Encoding) -> None:
    out = noise(4)
    bomb = packed(encoding, bytes(256 * MIB))
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="cannot be decoded"):
            decode(encoding, memoryview(bomb), out)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_a_zstd_frame_without_its_size_or_with_bytes_behind_it_is_refused() -> None:
    out = noise(4)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(out.nbytes))
    for payload in (silent, packed("zstd", bytes(out.nbytes)) + b"more"):
        with pytest.raises(RemoteProtocolError, match="cannot be decoded"):
            decode("zstd", memoryview(payload), out)


@settings(max_examples=150, deadline=None)
@given(encoding=st.sampled_from(ENCODED), data=st.binary(max_size=200))
def test_garbage_is_an_error_or_pages_and_nothing_else(encoding: Encoding, data: bytes) -> None:
    out = noise(1)
    before = out.copy()
    try:
        decode(encoding, memoryview(data), out)
    except RemoteProtocolError:
        np.testing.assert_array_equal(out, before)


@settings(max_examples=100, deadline=None)
@given(encoding=st.sampled_from(ENCODED), place=st.integers(0, 10_000), value=st.integers(1, 255))
def test_a_flipped_byte_is_an_error_or_pages_and_nothing_else(encoding: Encoding, place: int, value: int) -> None:
    pages = text(2)
    payload = bytearray(packed(encoding, pages.tobytes()))
    payload[place % len(payload)] ^= value
    out = np.zeros_like(pages)
    try:
        decode(encoding, memoryview(payload), out)
    except RemoteProtocolError:
        assert not out.any()
