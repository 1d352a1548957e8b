"""Which pages are zero, found without reading those that are not to their end."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from migrated.vmm.memory import Words
from protocol.pages import Indices, runs_of

LONG_RUNS: Final = 8
"""Pages in up to this many runs are best looked at in place, run by run; in more, they are gathered first."""
_TESTED_WORDS: Final = 8
"""Words of a page that are looked at first: one cache line. Most pages in use show there that they are not zero."""


def _any_bit(words: Words) -> npt.NDArray[np.bool_]:
    """Return which rows are not all zero, shape (n,)."""
    found: npt.NDArray[np.bool_] = np.bitwise_or.reduce(words, axis=1) != 0
    return found


def nonzero_heads(words: Words) -> npt.NDArray[np.bool_]:
    """Return which pages are known by their first cache line not to be zero, shape (n,); ``words`` has shape (n,
    512)."""
    return _any_bit(words[:, :_TESTED_WORDS])


def nonzero_at(words: Words, places: Indices) -> npt.NDArray[np.bool_]:
    """Return which of some rows, shape (n,), are not zero, shape (n,): as ``nonzero`` does, for rows that are far
    apart."""
    found = _any_bit(words[:, :_TESTED_WORDS][places])
    unknown = np.flatnonzero(~found)
    if len(unknown):
        found[unknown] = _any_bit(words[places[unknown]])
    return found


def nonzero(words: Words) -> npt.NDArray[np.bool_]:
    """Return which pages are not zero, shape (n,). They are read in place: zero memory is never copied, memory in use
    only where it is needed. ``words`` has shape (n, 512)."""
    found = nonzero_heads(words)
    if found.all():
        return found
    unknown = runs_of(np.flatnonzero(~found))
    if len(unknown) > LONG_RUNS:
        return _any_bit(words)
    for start, count in unknown.tolist():
        found[start : start + count] = _any_bit(words[start : start + count])
    return found
