"""Guest memory: one sealed memfd, mapped once, and the only paths by which the guest side writes it.

Page n of the guest lies at offset n * 4096, whatever the guest address of its region. Every write ends in
``_mark``, so the logged dirty tracker (see :mod:`vmm_sim.tracking`) cannot miss one.

Memory that another VMM hands over is mapped privately at first: what is written here stays here, and the other one's
guest never sees it. ``publish`` puts it into the file and maps that shared, once the guest is to run here.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrated.kernel import memory as kernel_memory
from migrated.kernel import pagemap
from protocol.guest import MemoryRegion
from vmm_sim.content import PAGE_SIZE, WORDS, Pages, Words
from vmm_sim.errors import VmmError

LOW_RAM_BYTES: Final = 3 << 30
HIGH_RAM_ADDRESS: Final = 4 << 30

_RANGES_PER_SCAN: Final = 1024
_F_ADD_SEALS: Final = 1033
_SEALS: Final = 0x0002 | 0x0004  # F_SEAL_SHRINK | F_SEAL_GROW: a peer's truncate cannot cause SIGBUS here


def memory_regions(memory_bytes: int) -> tuple[MemoryRegion, ...]:
    """The guest's memory map: low RAM up to 3 GiB, the rest from 4 GiB on (the hole is the PC's device window)."""
    low = min(memory_bytes, LOW_RAM_BYTES)
    regions = [MemoryRegion(name="ram", guest_address=0, size_bytes=low, offset_pages=0)]
    if memory_bytes > low:
        regions.append(
            MemoryRegion(
                name="ram-high",
                guest_address=HIGH_RAM_ADDRESS,
                size_bytes=memory_bytes - low,
                offset_pages=low // PAGE_SIZE,
            )
        )
    return tuple(regions)


class GuestMemory:
    """The memory of one guest. Attributes: ``fd`` (memfd), ``bytes``, ``pages``, ``address`` (of the mapping),
    ``words`` (pages, 512), a view of u64 words for reading.

    ``handed_over``: the memory file of the guest's other VMM, owned from here on; None for fresh memory. Raises
    VmmError MemoryTooSmall.
    """

    def __init__(self, memory_bytes: int, *, huge_pages: bool = False, handed_over: int | None = None) -> None:
        self.bytes = memory_bytes
        self.pages = memory_bytes // PAGE_SIZE
        self._huge_pages = huge_pages
        self._private = handed_over is not None
        if handed_over is None:
            self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, memory_bytes)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, memory_bytes)
        else:
            self.fd = handed_over
            os.set_inheritable(self.fd, False)
            if (size := os.fstat(self.fd).st_size) < memory_bytes:
                raise VmmError(
                    "MemoryTooSmall", f"The memory file has {size} bytes and the guest {memory_bytes}: it is another's."
                )
            self._map = mmap.mmap(self.fd, memory_bytes, flags=mmap.MAP_PRIVATE)
        self._advise()
        self._raw = memoryview(self._map)
        self.words: Words = np.frombuffer(self._map, dtype=np.uint64).reshape(self.pages, WORDS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.dirty: NDArray[np.uint8] | None = None
        """The logged tracker's map, one byte per page, while it is on."""

    def _advise(self) -> None:
        if self._huge_pages:
            self._map.madvise(kernel_memory.MADV_HUGEPAGE)

    def publish(self) -> None:
        """Put what was written privately into the file, and map that shared from now on; nothing happens when it is
        already. Nobody may write meanwhile."""
        if not self._private:
            return
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            begin, vector = self.address, pagemap.make_vector(_RANGES_PER_SCAN)
            written = pagemap.private_copies(fd, begin, begin + self.bytes, vector)
        finally:
            os.close(fd)
        for first, end in (written - np.uint64(begin)).tolist():
            os.pwrite(self.fd, self._raw[first:end], first)
        kernel_memory.map_shared_at(begin, self.bytes, self.fd, 0)
        self._advise()
        self._private = False

    def _mark(self, pages: Pages | slice | int) -> None:
        # Read here, after the content was written: a log that starts in between then either has the page marked
        # or starts after the whole write.
        dirty = self.dirty
        if dirty is not None:
            dirty[pages] = 1

    def write_pages(self, pages: Pages, rows: Words) -> None:
        """Write whole pages: ``rows`` (n, 512) to page numbers ``pages`` (n, distinct)."""
        self.words[pages] = rows
        self._mark(pages)

    def write_run(self, first: int, last: int, write: Callable[[Words], None]) -> None:
        """Let ``write`` fill pages ``first`` to ``last`` (exclusive) in place."""
        write(self.words[first:last])
        self._mark(slice(first, last))

    def write_words(self, pages: Pages, offsets: Pages, values: Words) -> None:
        """Write ``values`` (n, k) to each page's words ``offsets`` (n, k)."""
        self.words[pages[:, None], offsets] = values
        self._mark(pages)

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write a few bytes inside one page."""
        self._raw[offset : offset + len(data)] = data
        self._mark(offset // PAGE_SIZE)

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Copy bytes out; populates a hole, so ask :meth:`data_runs` first."""
        return bytes(self._raw[offset : offset + length])

    def data_runs(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """Runs of pages (first, last exclusive) that have memory behind them; the rest are holes and read as zero."""
        end = (self.pages if last is None else last) * PAGE_SIZE
        position = first * PAGE_SIZE
        while position < end:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: only holes from here on
                return
            if start >= end:
                return
            position = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
            yield start // PAGE_SIZE, -(-position // PAGE_SIZE)
