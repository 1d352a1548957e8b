"""PAGEMAP_SCAN (Linux 6.7): which pages of a process are in which state; layouts as in include/uapi/linux/fs.h.

A scan looks at /proc/PID/pagemap, opened for reading. It can take note of written pages and write-protect them in one
step, so that no write between two scans is missed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from typing import Final

import numpy as np
import numpy.typing as npt

PAGEMAP_SCAN: Final = 0xC0606610

PM_SCAN_WP_MATCHING: Final = 1
"""Write-protect the pages that match. They must be registered for asynchronous write protection (``userfault``)."""
PM_SCAN_CHECK_WPASYNC: Final = 2
"""Fail with EPERM where memory is not registered for it, instead of passing it over."""

PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6

_ARGUMENT: Final = struct.Struct("=12Q")
_WALK_END: Final = 4
_HUGE_RANGES: Final = 1024
_ENTRIES_AT_ONCE: Final = 1 << 16
_ENTRY_HELD: Final = np.uint64(1 << 63 | 1 << 62)
"""Bits of an entry of pagemap: present, swapped."""
_ENTRY_OF_FILE: Final = np.uint64(1 << 61)
"""Bit of an entry of pagemap: it is a page of a file, or of shared memory."""
_NO_BIT: Final = np.uint64(0)

Vector = npt.NDArray[np.uint64]
"""Room for ranges that a scan finds: rows of (first address, end address, categories), shape (n, 3)."""
Ranges = npt.NDArray[np.uint64]
"""Rows of (first address, end address), ascending, shape (n, 2)."""


def make_vector(ranges: int) -> Vector:
    """Room for so many ranges in one call of the kernel."""
    return np.zeros((ranges, 3), np.uint64)


def scan(
    pagemap_fd: int,
    begin: int,
    end: int,
    vector: Vector,
    *,
    flags: int = 0,
    inverted: int = 0,
    all_of: int = 0,
    any_of: int = 0,
    returned: int,
) -> Ranges:
    """The ranges of pages between two addresses that match.

    Args:
        pagemap_fd: /proc/PID/pagemap of the process.
        begin, end: addresses in that process, multiples of the page size.
        vector: scratch memory; one for each thread that scans.
        flags: PM_SCAN_*.
        inverted, all_of, any_of: categories (PAGE_IS_*) as the kernel takes them: which are inverted first, which must
            all be set, and of which one must be.
        returned: categories that are told of; pages that differ in them are ranges of their own.

    Raises:
        OSError: the kernel lacks the call (ENOTTY), the process has ended (ESRCH), or memory is not registered (EPERM).
    """
    pieces: list[Ranges] = []
    while begin < end:
        argument = bytearray(
            _ARGUMENT.pack(
                _ARGUMENT.size,
                flags,
                begin,
                end,
                0,
                vector.ctypes.data,
                len(vector),
                0,  # no limit on the number of pages
                inverted,
                all_of,
                any_of,
                returned,
            )
        )
        filled = fcntl.ioctl(pagemap_fd, PAGEMAP_SCAN, argument, True)
        if filled:
            pieces.append(vector[:filled, :2].copy())
        if filled < len(vector):
            break  # all was walked, although the kernel may name an earlier end: where its own buffer was full last
        begin = _ARGUMENT.unpack(argument)[_WALK_END]
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.empty((0, 2), np.uint64)


def held(pagemap_fd: int, begin: int, end: int, vector: Vector) -> Ranges:
    """The ranges of pages between two addresses that are in memory or swapped out; pages that only share the kernel's
    page of zeros are left out. In private anonymous memory every other page reads as zero.

    Raises:
        OSError: the pagemap cannot be read.
    """
    return _held_but(pagemap_fd, begin, end, vector, PAGE_IS_PFNZERO, _NO_BIT)


def private_copies(pagemap_fd: int, begin: int, end: int, vector: Vector) -> Ranges:
    """The ranges of pages between two addresses of a private mapping of a file that the process has written, so that it
    has copies of its own there.

    Raises:
        OSError: the pagemap cannot be read.
    """
    return _held_but(pagemap_fd, begin, end, vector, PAGE_IS_FILE, _ENTRY_OF_FILE)


def _held_but(pagemap_fd: int, begin: int, end: int, vector: Vector, category: int, entry_bit: np.uint64) -> Ranges:
    """The ranges of pages that are in memory or swapped out and not of a category (PAGE_IS_*), which a bit in an entry
    of pagemap shows where the kernel cannot scan."""
    try:
        return scan(
            pagemap_fd,
            begin,
            end,
            vector,
            inverted=category,
            all_of=category,
            any_of=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            returned=PAGE_IS_PRESENT,
        )
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
    return _held_by_entries(pagemap_fd, begin, end, entry_bit)


def huge(pagemap_fd: int, begin: int, end: int) -> Ranges:
    """The ranges of pages between two addresses that are mapped as huge pages of a file or of shared memory.

    Raises:
        OSError: as for ``scan``.
    """
    kinds = PAGE_IS_HUGE | PAGE_IS_FILE
    return scan(pagemap_fd, begin, end, make_vector(_HUGE_RANGES), all_of=kinds, returned=PAGE_IS_HUGE)


def _held_by_entries(pagemap_fd: int, begin: int, end: int, without: np.uint64) -> Ranges:
    """The same on a kernel without PAGEMAP_SCAN: one entry of 8 bytes for each page. ``without``: a bit that the
    entries must not have."""
    pieces: list[Ranges] = []
    for first in range(begin // mmap.PAGESIZE, end // mmap.PAGESIZE, _ENTRIES_AT_ONCE):
        count = min(_ENTRIES_AT_ONCE, end // mmap.PAGESIZE - first)
        entries = np.frombuffer(os.pread(pagemap_fd, 8 * count, 8 * first), np.uint64)
        wanted = ((entries & _ENTRY_HELD) != 0) & ((entries & without) == 0)
        here = np.concatenate(([False], wanted, [False]))
        edges = np.flatnonzero(here[1:] != here[:-1]).reshape(-1, 2)
        pieces.append((edges + first).astype(np.uint64) * np.uint64(mmap.PAGESIZE))
    return np.concatenate(pieces) if pieces else np.empty((0, 2), np.uint64)


def protect(pagemap_fd: int, begin: int, end: int) -> None:
    """Write-protect every page between two addresses, those too that hold nothing: fills the page tables.

    Raises:
        OSError: as for ``scan``.
    """
    flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
    while begin < end:
        # Without room for ranges the kernel protects everything, whatever the masks say.
        argument = bytearray(_ARGUMENT.pack(_ARGUMENT.size, flags, begin, end, 0, 0, 0, 0, 0, PAGE_IS_WRITTEN, 0, 0))
        fcntl.ioctl(pagemap_fd, PAGEMAP_SCAN, argument, True)
        begin = _ARGUMENT.unpack(argument)[_WALK_END]
