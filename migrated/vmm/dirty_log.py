"""Finding the pages that a running guest wrote: two dirty logs behind one interface.

    collect() -> runs written since the last collect, and cleared in the same step
    clear(run) -> how many pages of a run were written, and cleared in the same step: it is about to be read anyway
    restore(runs)  puts pages back that were collected and could not be sent

``PagemapScanLog`` lets the kernel track (userfaultfd asynchronous write protection, collected with the PAGEMAP_SCAN
ioctl on the VMM's pagemap, Linux 6.7): no write can be missed. ``ByteMapLog`` reads a log that the VMM keeps in shared
memory, one byte per page. ioctl numbers and layouts: include/uapi/linux/fs.h.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from abc import ABC, abstractmethod
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from migrated.errors import VmmError
from protocol.guest import PAGE_SIZE
from protocol.pages import NO_RUNS, Runs, indices_of, runs_of

_PAGEMAP_SCAN: Final = 0xC0606610
_PM_SCAN_WP_MATCHING: Final = 1
_PM_SCAN_CHECK_WPASYNC: Final = 2
_PAGE_IS_WRITTEN: Final = 2
_PAGE_IS_PRESENT: Final = 8
_PAGE_IS_SWAPPED: Final = 16
_SCAN_ARGUMENT: Final = struct.Struct("=12Q")
_VECTOR_REGIONS: Final = 16384


class DirtyLog(ABC):
    """The set of pages written since it was last collected. One caller at a time; ``collect`` may run in a thread."""

    mode: Literal["pagemap-scan", "logged"]

    def __init__(self) -> None:
        self._restored: list[Runs] = []

    def collect(self) -> Runs:
        """Return and clear the pages written since the last call, with those that were put back. Shape (n, 2)."""
        found = self._collect()
        if not self._restored:
            return found
        pieces = [indices_of(runs) for runs in (found, *self._restored) if len(runs)]
        self._restored.clear()
        return runs_of(np.unique(np.concatenate(pieces))) if pieces else NO_RUNS

    def restore(self, runs: Runs) -> None:
        """Put pages back that were collected but not sent: the next ``collect`` returns them again."""
        if len(runs):
            self._restored.append(runs)

    @abstractmethod
    def clear(self, start: int, count: int) -> int:
        """Clear the pages of a run that will be read after this. Returns how many had been written since the last
        collect. Several threads may call it at once for different runs, but not beside ``collect``."""

    @abstractmethod
    def _collect(self) -> Runs: ...

    @abstractmethod
    def close(self) -> None:
        """Release descriptors and mappings. Tracking itself ends in the VMM."""


class PagemapScanLog(DirtyLog):
    """Dirty pages from the kernel.

    Args:
        pagemap_fd: the VMM's own /proc/self/pagemap, owned from here on.
        address: where guest memory is mapped in the VMM.
        pages: size of guest memory.
        present_only: the VMM tracks writes without marking pages that hold nothing: a page counts as written only
            when it holds something. Holes then cost neither time nor page tables.
    """

    mode: Literal["pagemap-scan", "logged"] = "pagemap-scan"

    def __init__(self, pagemap_fd: int, address: int, pages: int, present_only: bool) -> None:
        super().__init__()
        self._fd = pagemap_fd
        self._any_of = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED if present_only else 0
        self._start = address
        self._end = address + pages * PAGE_SIZE
        self._vector: npt.NDArray[np.uint64] = np.zeros((_VECTOR_REGIONS, 3), np.uint64)

    def clear(self, start: int, count: int) -> int:
        vector: npt.NDArray[np.uint64] = np.empty((min(count, _VECTOR_REGIONS), 3), np.uint64)
        begin = self._start + start * PAGE_SIZE
        edges = self._scan(begin, begin + count * PAGE_SIZE, vector)
        return sum(int((piece[:, 1] - piece[:, 0]).sum()) for piece in edges) // PAGE_SIZE

    def _collect(self) -> Runs:
        pieces = self._scan(self._start, self._end, self._vector)
        if not pieces:
            return NO_RUNS
        edges = (np.concatenate(pieces) - np.uint64(self._start)) // np.uint64(PAGE_SIZE)
        runs = edges.astype(np.int64)
        runs[:, 1] -= runs[:, 0]
        return runs

    def _scan(self, begin: int, end: int, vector: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.uint64]]:
        """Get and clear what was written between two addresses: pieces of (first, end) addresses, shape (n, 2)."""
        pieces: list[npt.NDArray[np.uint64]] = []
        while begin < end:
            argument = bytearray(
                _SCAN_ARGUMENT.pack(
                    _SCAN_ARGUMENT.size,
                    _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC,
                    begin,
                    end,
                    0,
                    vector.ctypes.data,
                    len(vector),
                    0,  # no limit on pages
                    0,  # no inverted categories
                    _PAGE_IS_WRITTEN,
                    self._any_of,
                    _PAGE_IS_WRITTEN,
                )
            )
            try:
                filled = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument, True)
            except OSError as error:
                raise VmmError(
                    f"the pages that the guest wrote cannot be read ({error.strerror}); has its process ended?"
                ) from error
            if filled:
                pieces.append(vector[:filled, :2].copy())
            if filled < len(vector):
                break  # all was walked, although the kernel may name an earlier end: where its own buffer was full last
            begin = _SCAN_ARGUMENT.unpack(argument)[4]
        return pieces

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ByteMapLog(DirtyLog):
    """Dirty pages from the VMM's own log, one byte per page.

    The VMM writes the page first and its byte second. Here the byte is cleared before the page is read, so a write
    that comes in between is seen by the read or sets the byte again: never lost, at worst sent twice.

    Args:
        fd: the shared map, owned from here on.
        pages: size of guest memory.
    """

    mode: Literal["pagemap-scan", "logged"] = "logged"

    def __init__(self, fd: int, pages: int) -> None:
        super().__init__()
        self._fd = fd
        self._mapping = mmap.mmap(fd, pages)
        self._map: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)

    def clear(self, start: int, count: int) -> int:
        return len(self._take(self._map[start : start + count]))

    def _collect(self) -> Runs:
        return runs_of(self._take(self._map).astype(np.int64))

    def _take(self, part: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
        # A copy is searched: the guest goes on writing the map itself, and numpy gives up on one that changes.
        dirty = np.flatnonzero(part != 0)
        part[dirty] = 0
        return dirty

    def close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        del self._map
        self._mapping.close()
