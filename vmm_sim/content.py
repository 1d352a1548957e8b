"""The content of guest pages: a closed form of (seed, page, generation), vectorised over pages.

A page is 512 words, ``key(seed, page, generation) * table``: one multiplication per word. Key and table are odd, so
every word depends on page and generation, and the result does not compress.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE: Final = 4096
WORDS: Final = PAGE_SIZE // 8
LINE_WORDS: Final = 8
"""A delta write changes one cache line of a page."""

U64 = np.uint64
Words = NDArray[np.uint64]
Pages = NDArray[np.int64]

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """One step of the splitmix64 generator, as a hash of ``value`` (64 bits in, 64 bits out)."""
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _splitmix64_array(z: Words) -> Words:
    z = z + U64(_GOLDEN)
    z ^= z >> U64(30)
    z *= U64(0xBF58476D1CE4E5B9)
    z ^= z >> U64(27)
    z *= U64(0x94D049BB133111EB)
    z ^= z >> U64(31)
    return z


def _odd_table() -> Words:
    return _splitmix64_array(np.arange(WORDS, dtype=np.uint64)) | U64(1)


TABLE: Final[Words] = _odd_table()


class Content:
    """Page content of one guest.

    Generation 0 is the boot content (all zero when ``zero_boot``). Of the later ones about 1 in 64 is an all-zero
    page, as guests zero pages that they free.
    """

    def __init__(self, seed: int, *, zero_boot: bool) -> None:
        self._seed = splitmix64(seed & _MASK)
        self._zero_boot = zero_boot

    def keys(self, pages: Pages, generations: Pages, *, zero_pages: bool = True) -> Words:
        """The multiplier of each page (0 for an all-zero page); ``pages`` and ``generations`` are 1-D, equal length."""
        mixed = _splitmix64_array(pages.astype(np.uint64) ^ U64(self._seed))
        mixed = _splitmix64_array(mixed ^ (generations.astype(np.uint64) * U64(_GOLDEN)))
        keys = mixed | U64(1)
        if zero_pages:
            keys[((mixed >> U64(58)) == 0) & (generations > 0)] = 0
        if self._zero_boot:
            keys[generations == 0] = 0
        return keys

    def lines(self, pages: Pages) -> Pages:
        """First word of the one cache line that delta writes change in each page."""
        mixed = _splitmix64_array(pages.astype(np.uint64) ^ U64(splitmix64(self._seed)))
        return (mixed % U64(WORDS // LINE_WORDS)).astype(np.int64) * LINE_WORDS


def fill(keys: Words, out: Words) -> None:
    """Write the pages of ``keys`` (n) to ``out`` (n, 512)."""
    np.multiply(keys[:, None], TABLE, out=out)


def fill_bytes(key: int, out: memoryview, first_row: int) -> None:
    """Fill ``out`` (whole words) with the stream of ``key``, from page-sized row ``first_row`` on."""
    words = np.frombuffer(out, dtype=np.uint64)
    rows = -(-len(words) // WORDS)
    index = np.arange(first_row, first_row + rows, dtype=np.uint64)
    keys = _splitmix64_array(index ^ U64(splitmix64(key))) | U64(1)
    whole = len(words) // WORDS
    fill(keys[:whole], words[: whole * WORDS].reshape(whole, WORDS))
    if whole < rows:
        np.multiply(keys[whole], TABLE[: len(words) - whole * WORDS], out=words[whole * WORDS :])
