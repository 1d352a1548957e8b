"""The running digest of guest memory that both sides keep while pages move.

Each side remembers for every page a 64-bit *entry*: 0 for a page that is zero, else a mix of the XXH3-64 of the batch
that carried the page last and the page's slot in that batch. Equal entries mean that the page was last set by a batch
with the same content at the same place, so equal tables mean equal memory; a lost, stale or damaged page leaves a
different entry. The digest is the sum over all pages of the entry mixed with the page number, modulo 2^64, updated
with each batch, so that the whole costs one hash of each batch and 8 bytes per page, and nothing at the end.

It is an integrity check against faults, not a defence against an attacker: that is what TLS is for.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from protocol.pages import Indices

Entries: TypeAlias = npt.NDArray[np.uint64]

ALGORITHM: Final = "xxh3-frames"

_MASK: Final = (1 << 64) - 1
_SLOT: Final = np.uint64(0x9E3779B97F4A7C15)
_PAGE: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX: Final = np.uint64(0xD6E8FEB86659FD93)
_ONE: Final = np.uint64(1)
_SHIFT: Final = np.uint64(32)


def _scramble(value: Entries) -> Entries:
    value ^= value >> _SHIFT
    value *= _MIX
    value ^= value >> _SHIFT
    return value


class MemoryDigest:
    """The table and the running sum of one side.

    Threads may update it at the same time as long as no page is in two batches at once; each keeps its own sum with
    ``delta_of`` and adds it under the owner's lock (``add``).

    Args:
        total_pages: number of guest pages; the table takes 8 bytes each, untouched until used.
    """

    def __init__(self, total_pages: int) -> None:
        self.entries: Entries = np.zeros(total_pages, np.uint64)
        self._sum = 0

    @property
    def value(self) -> int:
        """The digest of the memory as it now is, 0 for all-zero memory."""
        return self._sum

    def add(self, delta: int) -> None:
        """Add a change that ``set_pages`` or ``set_zero`` returned."""
        self._sum = (self._sum + delta) & _MASK

    def set_pages(self, pages: Indices, batch_hash: int) -> int:
        """Record that a batch with this hash set these pages, in this order.

        Args:
            pages: page numbers, shape (n,), checked by the caller.
            batch_hash: XXH3-64 of the n pages' contents.

        Returns:
            The change of the digest.
        """
        slots = np.arange(len(pages), dtype=np.uint64)
        new = _scramble(np.uint64(batch_hash) + slots * _SLOT) | _ONE
        return self._replace(pages, new)

    def set_zero(self, pages: Indices) -> int:
        """Record that these pages are zero now. Returns the change of the digest."""
        if not self.entries[pages].any():
            return 0
        return self._replace(pages, np.zeros(len(pages), np.uint64))

    def _replace(self, pages: Indices, new: Entries) -> int:
        old = self.entries[pages]
        self.entries[pages] = new
        place = (pages.astype(np.uint64) + _ONE) * _PAGE
        change = _weigh(new, place) - _weigh(old, place)
        return int(change.sum(dtype=np.uint64))


def _weigh(entries: Entries, place: Entries) -> Entries:
    """Mix entries with the pages' places; an entry of 0 weighs 0."""
    weights: Entries = _scramble(entries ^ place) * (entries != 0)
    return weights
