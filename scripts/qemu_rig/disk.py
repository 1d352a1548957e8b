"""The guest's disk: a log that shows where the guest ran, and data whose every word is known.

    lane 0 | lane 1 | ... lane 63 | data
    records "log NUMBER CLOCK_NS INCARNATION" of 512 bytes, 8192 in a lane, then the lane begins again

The guest writes each record into the lane of the incarnation that it runs under, which it asks of its QEMU every time.
Record numbers go on over a move. Two copies that ran would both write the same numbers, each into its own lane, so
neither could hide the other. (Layout and content as in guest_init.c.)
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from scripts.basics import MIB

_SECTOR: Final = 512
_LANES: Final = 64
_LANE_BYTES: Final = 8192 * _SECTOR
_DATA_BEGIN: Final = _LANES * _LANE_BYTES
_PAGE_WORDS: Final = 512
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_RECORD: Final = re.compile(rb"log (\d+) (\d+) (\d+)\n")


@dataclass(frozen=True, slots=True, order=True)
class Record:
    """One record of the log: its number, the guest's clock, and under which incarnation it was written."""

    number: int
    guest_ns: int
    incarnation: int


def make_disk(path: Path, data_mib: int = 0) -> None:
    """Make an image with an empty log and so much data. The file has holes where the log is not written yet.

    The data go to the disk itself, not only into the host's page cache, so that a guest can read them past it.
    """
    with path.open("wb") as file:
        file.truncate(_DATA_BEGIN)
        file.seek(_DATA_BEGIN)
        file.write(expected_data(data_mib).tobytes())
        file.flush()
        os.fsync(file.fileno())


def expected_data(data_mib: int) -> npt.NDArray[np.uint64]:
    """Return the contents of the data disk: one row for each page of 4096 bytes."""
    pages = np.arange(data_mib * MIB // 4096, dtype=np.uint64)
    words = np.arange(_PAGE_WORDS, dtype=np.uint64)
    content = _scattered(pages << np.uint64(32))[:, None] + (words - np.uint64(1))[None, :] * _STEP
    content[:, 0] = pages
    content[:, 1] = 0
    return content


def read_log(path: Path) -> list[Record]:
    """All records that are in the log, by number, then clock."""
    records = []
    with path.open("rb") as file:
        for lane in range(_LANES):
            file.seek(lane * _LANE_BYTES)
            content = file.read(_LANE_BYTES)
            records += [Record(*(int(part) for part in found.groups())) for found in _RECORD.finditer(content)]
    return sorted(records)


def written_twice(records: list[Record]) -> list[int]:
    """Record numbers that more than one incarnation has written: two copies of the guest ran."""
    counts = Counter(record.number for record in records)
    return sorted(number for number, times in counts.items() if times > 1)


def _scattered(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
