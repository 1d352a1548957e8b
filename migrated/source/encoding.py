"""Encodings of a batch of pages: plain, compressed, or as the difference to what was sent before.

    batch -> pages in the delta cache -> XOR, lz4 -> gains? -> frame "xor-lz4"
          -> the others -> zstd or lz4 -> gains? -> frame "zstd" or "lz4", else "plain"

An encoding is chosen per batch by what it gains there: the time that the smaller payload saves on this link, as the
link was lately measured, must be more than encoding took. An encoding that loses several times in a row is only tried
on some batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from migrated.settings.parameters import MigrationParameters
from migrated.vmm.memory import WORDS_PER_PAGE
from protocol.guest import PAGE_SIZE
from protocol.messages import Encoding
from protocol.pages import Indices

Pages = npt.NDArray[np.uint64]

_MEMORY_BYTES: Final = 32 << 20
"""The link's speed is that of about the last so many bytes: far more than socket buffers swallow at once."""
_KNOWN_BYTES: Final = 16 << 20
"""Before this much was sent, socket buffers hide how slow the link is: every encoding asked for is tried."""
_LOSSES: Final = 4
_SAMPLE_EVERY: Final = 32
_NOBODY: Final = -1
_NEVER: Final = -2
"""Older than any round, also for the first one."""


@dataclass(slots=True)
class EncodingTotals:
    """Totals of one encoding: batches, bytes of pages in, bytes of payload out, time spent encoding (also on batches
    that did not gain)."""

    batches: int = 0
    page_bytes: int = 0
    wire_bytes: int = 0
    ns: int = 0

    def add(self, other: EncodingTotals) -> None:
        """Sum up."""
        self.batches += other.batches
        self.page_bytes += other.page_bytes
        self.wire_bytes += other.wire_bytes
        self.ns += other.ns


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """One frame to be: page numbers, shape (n,), contents, shape (n, 512), and the payload as byte views. Valid until
    the encoder's next call."""

    encoding: Encoding
    indices: Indices
    pages: Pages
    payload: list[memoryview]

    @property
    def wire_bytes(self) -> int:
        """Bytes of payload."""
        return sum(len(view) for view in self.payload)


class LinkSpeed:
    """The time per byte on one channel, measured by how long sends blocked."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._ns = 0.0
        self._total_bytes = 0

    def add(self, sent_bytes: int, ns: int) -> None:
        """A send of so many bytes took ``ns``."""
        kept = max(0.0, 1.0 - sent_bytes / _MEMORY_BYTES)
        self._bytes = self._bytes * kept + sent_bytes
        self._ns = self._ns * kept + ns
        self._total_bytes += sent_bytes

    def worth(self, saved_bytes: int, ns: int) -> bool:
        """Return whether it pays to spend ``ns`` on sending ``saved_bytes`` less."""
        if saved_bytes <= 0:
            return False
        return self._total_bytes < _KNOWN_BYTES or saved_bytes * self._ns > ns * self._bytes


class _Trial:
    """The choice whether an encoding is tried on the next batch: always while it gains, now and then once it does
    not."""

    def __init__(self) -> None:
        self._losses = 0
        self._skipped = 0

    def due(self) -> bool:
        if self._losses < _LOSSES:
            return True
        self._skipped += 1
        return self._skipped % _SAMPLE_EVERY == 0

    def judge(self, gained: bool) -> None:
        self._losses = 0 if gained else self._losses + 1


class DeltaCache:
    """The pages last sent, as far as they fit: direct-mapped, shared by all channels under one lock.

    A page in the cache is equal to the receiver's: every page that is sent goes through ``exchange`` or ``drop``, and a
    page is in one batch of a round only. A slot is given up for another page only when its own was not sent again in
    this or the last round; a page that was sent but once counts as not sent again.

    Args:
        capacity_bytes: memory for the pages; it is touched as it fills.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._slots = max(1, capacity_bytes // PAGE_SIZE)
        self._pages: Pages = np.empty((self._slots, WORDS_PER_PAGE), np.uint64)
        self._owner: npt.NDArray[np.int64] = np.full(self._slots, _NOBODY, np.int64)
        self._used: npt.NDArray[np.int32] = np.full(self._slots, _NEVER, np.int32)
        self._lock = threading.Lock()

    def exchange(self, indices: Indices, pages: Pages, round_number: int, delta: Pages) -> npt.NDArray[np.bool_]:
        """Keep the batch as the pages last sent, and get their difference to the pages sent before.

        Args:
            indices: page numbers, shape (n,), each once.
            pages: contents, shape (n, 512).
            round_number: of the round that the batch belongs to.
            delta: takes the XOR of the pages that were here, in order, in its first rows.

        Returns:
            Which pages of the batch were here, shape (n,).
        """
        slots = indices % self._slots
        with self._lock:
            hits: npt.NDArray[np.bool_] = self._owner[slots] == indices
            rows = np.flatnonzero(hits)
            if len(rows):
                out = delta[: len(rows)]
                np.take(self._pages, slots[rows], axis=0, out=out, mode="clip")
                np.bitwise_xor(out, pages if len(rows) == len(indices) else pages[rows], out=out)
                self._used[slots[rows]] = round_number
            new = np.flatnonzero(~hits & (self._used[slots] < round_number - 1))
            # Pages of one batch may share a slot: the first takes it.
            new = new[np.unique(slots[new], return_index=True)[1]]
            if len(new):
                self._owner[slots[new]] = indices[new]
                self._used[slots[new]] = round_number - 1
            kept = np.concatenate((rows, new)) if len(new) else rows
            self._pages[slots[kept]] = pages[kept]
        return hits

    def drop(self, indices: Indices) -> None:
        """Forget pages that were sent as zero pages: the cached ones are no longer equal to the receiver's."""
        slots = indices % self._slots
        with self._lock:
            stale = slots[self._owner[slots] == indices]
            self._owner[stale] = _NOBODY
            self._used[stale] = _NEVER


class BatchEncoder:
    """The encoder of one channel's thread.

    Args:
        compression: encoding of pages that do not travel as a difference.
        level: of zstd.
        cache: pages last sent; None without XOR delta.
        link: time per byte on the channel; ``sent`` keeps it up to date.
    """

    def __init__(
        self,
        compression: Encoding = "plain",
        level: int = 1,
        cache: DeltaCache | None = None,
        link: LinkSpeed | None = None,
    ) -> None:
        self._compression = compression
        self._zstd = zstandard.ZstdCompressor(level=level) if compression == "zstd" else None
        self._cache = cache
        self._link = link or LinkSpeed()
        self._compress_trial = _Trial()
        self._delta_trial = _Trial()
        self._delta: Pages = np.empty((0, WORDS_PER_PAGE), np.uint64)

    def encode(
        self, indices: Indices, pages: Pages, round_number: int, totals: dict[str, EncodingTotals]
    ) -> list[EncodedBatch]:
        """Encode one batch.

        Args:
            indices: page numbers, shape (n,), each once.
            pages: their contents, shape (n, 512), contiguous; must not change until the next call.
            round_number: of the round that the batch belongs to.
            totals: where encodings are booked, by name.

        Returns:
            One frame, or two when only part of the batch travels as a difference.
        """
        if self._cache is None:
            return [self._compress(indices, pages, totals)]
        if len(self._delta) < len(pages):
            self._delta = np.empty_like(pages)
        begin_ns = time.perf_counter_ns()
        hits = self._cache.exchange(indices, pages, round_number, self._delta)
        found = int(np.count_nonzero(hits))
        totals.setdefault("xor-lz4", EncodingTotals()).ns += time.perf_counter_ns() - begin_ns
        if not found or not self._delta_trial.due():
            return [self._compress(indices, pages, totals)]
        packed = self._try("xor-lz4", self._delta[:found], self._delta_trial, totals)
        if packed is None:
            return [self._compress(indices, pages, totals)]
        if found == len(indices):
            return [EncodedBatch("xor-lz4", indices, pages, packed)]
        return [
            EncodedBatch("xor-lz4", indices[hits], pages[hits], packed),
            self._compress(indices[~hits], pages[~hits], totals),
        ]

    @property
    def quick(self) -> bool:
        """Whether a few pages are encoded in no more time than it takes to wake a thread: zstd, at high levels, is
        not."""
        return self._zstd is None

    def zeroed(self, indices: Indices) -> None:
        """Note that pages were sent as zero pages."""
        if self._cache is not None:
            self._cache.drop(indices)

    def sent(self, wire_bytes: int, ns: int) -> None:
        """Note that sending so many bytes took ``ns``."""
        self._link.add(wire_bytes, ns)

    def _compress(self, indices: Indices, pages: Pages, totals: dict[str, EncodingTotals]) -> EncodedBatch:
        if self._compression != "plain" and self._compress_trial.due():
            packed = self._try(self._compression, pages, self._compress_trial, totals)
            if packed is not None:
                return EncodedBatch(self._compression, indices, pages, packed)
        plain = totals.setdefault("plain", EncodingTotals())
        plain.add(EncodingTotals(1, pages.nbytes, pages.nbytes))
        return EncodedBatch("plain", indices, pages, [pages.data.cast("B")])

    def _try(
        self, encoding: Encoding, pages: Pages, trial: _Trial, totals: dict[str, EncodingTotals]
    ) -> list[memoryview] | None:
        """The payload, or None when it does not gain."""
        begin_ns = time.perf_counter_ns()
        raw = pages.data.cast("B")
        packed: bytes = self._zstd.compress(raw) if encoding == "zstd" and self._zstd else _lz4(raw)
        spent_ns = time.perf_counter_ns() - begin_ns
        gained = self._link.worth(len(raw) - len(packed), spent_ns)
        trial.judge(gained)
        booked = totals.setdefault(encoding, EncodingTotals())
        booked.ns += spent_ns
        if not gained:
            return None
        booked.add(EncodingTotals(1, len(raw), len(packed)))
        return [memoryview(packed)]


def _lz4(raw: memoryview) -> bytes:
    packed: bytes = lz4.block.compress(raw, store_size=False)
    return packed


def encoder_factory(parameters: MigrationParameters, capabilities: Collection[str]) -> Callable[[], BatchEncoder]:
    """Return a function that makes the encoder of each channel, with the encodings that were asked for and agreed on.

    Args:
        parameters: ``compression``, ``compression_level``, ``xor_delta``, ``xor_delta_cache_bytes``.
        capabilities: in force, from WELCOME.
    """
    wanted = parameters.compression
    compression: Encoding = wanted if wanted != "none" and wanted in capabilities else "plain"
    delta = parameters.xor_delta and "xor-delta" in capabilities
    cache = DeltaCache(parameters.xor_delta_cache_bytes) if delta else None
    return lambda: BatchEncoder(compression, parameters.compression_level, cache)
