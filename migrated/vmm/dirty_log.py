"""Finding the pages that a running guest wrote: two dirty logs behind one interface.

    collect() -> runs written since the last collect, and cleared in the same step
    collect_with_cost() -> the same, and what it would cost in a blackout
    clear(run) -> how many pages of a run were written, and cleared in the same step: it is about to be read anyway
    restore(runs)  puts pages back that were collected and could not be sent

``PagemapScanLog`` lets the kernel track (userfaultfd asynchronous write protection, collected with the PAGEMAP_SCAN
ioctl on the VMM's pagemap, Linux 6.7): no write can be missed. ``ByteMapLog`` reads a log that the VMM keeps in shared
memory, one byte per page. ioctl numbers and layouts: include/uapi/linux/fs.h.
"""

from __future__ import annotations

import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from migrated.base.errors import VmmError
from migrated.kernel import pagemap
from migrated.kernel.scheduling import may_take_precedence
from migrated.vmm.memory import Span
from protocol.guest import PAGE_SIZE
from protocol.pages import NO_RUNS, Runs, indices_of, runs_of

_VECTOR_RANGES: Final = 16384


class DirtyLog(ABC):
    """The set of pages written since it was last collected. One caller at a time; ``collect`` may run in a thread.

    Attributes:
        mode: the way in which writes are found; None where none needs to be.
    """

    mode: Literal["pagemap-scan", "logged"] | None

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

    def collect_with_cost(self) -> tuple[Runs, int]:
        """``collect``. Returns also what it would have cost in a blackout (ns): where this daemon's threads go before
        others then, only the time that it ran, for between rounds it may wait for a processor a hundred times as long.
        """
        clock_ns = time.thread_time_ns if may_take_precedence() else time.monotonic_ns
        began_ns = clock_ns()
        runs = self.collect()
        return runs, clock_ns() - began_ns

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
        pagemap_fd: /proc/PID/pagemap of the VMM, owned from here on.
        spans: where guest memory is mapped in the VMM, by page number. They cover it without gaps.
        present_only: the VMM tracks writes without marking pages that hold nothing: a page counts as written only
            when it holds something. Holes then cost neither time nor page tables.
    """

    mode = "pagemap-scan"

    def __init__(self, pagemap_fd: int, spans: Sequence[Span], present_only: bool) -> None:
        super().__init__()
        self._fd = pagemap_fd
        self._any_of = pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_SWAPPED if present_only else 0
        self._spans = tuple(sorted(spans, key=lambda span: span.first_page))
        self._vector = pagemap.make_vector(_VECTOR_RANGES)

    def clear(self, start: int, count: int) -> int:
        vector = pagemap.make_vector(min(count, _VECTOR_RANGES))
        cleared = 0
        for span in self._spans:
            first, end = max(start, span.first_page), min(start + count, span.first_page + span.pages)
            if first < end:
                cleared += int(self._scan(span, first, end, vector)[:, 1].sum())
        return cleared

    def _collect(self) -> Runs:
        found = [self._scan(span, span.first_page, span.first_page + span.pages, self._vector) for span in self._spans]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _scan(self, span: Span, first: int, end: int, vector: pagemap.Vector) -> Runs:
        """Get and clear the written pages from ``first`` up to ``end``, which lie in one span."""
        begin = span.address + (first - span.first_page) * PAGE_SIZE
        try:
            ranges = pagemap.scan(
                self._fd,
                begin,
                begin + (end - first) * PAGE_SIZE,
                vector,
                flags=pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC,
                all_of=pagemap.PAGE_IS_WRITTEN,
                any_of=self._any_of,
                returned=pagemap.PAGE_IS_WRITTEN,
            )
        except OSError as error:
            raise VmmError(
                f"the pages that the guest wrote cannot be read ({error.strerror}); has its process ended?"
            ) from error
        if not len(ranges):
            return NO_RUNS
        runs = ((ranges - np.uint64(span.address)) // np.uint64(PAGE_SIZE)).astype(np.int64)
        runs[:, 1] -= runs[:, 0]
        runs[:, 0] += span.first_page
        return runs

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

    mode = "logged"

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
