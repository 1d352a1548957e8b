"""Guest memory as the daemon sees it: the VMM's memfd, mapped here, page n at offset n * 4096.

Holes of the file are pages that were never touched. Reading a hole through the mapping would populate it, so the
daemon asks the file where data is and touches nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import traceback
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.guest import PAGE_SIZE
from protocol.pages import NO_RUNS, Runs

WORDS_PER_PAGE: Final = PAGE_SIZE // 8

_MADV_DONTNEED: Final = 4
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

_SHMEM_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class GuestMemory:
    """A mapping of one guest's memory. Owns the descriptor and every view of it.

    Attributes:
        pages: the number of pages.
        words: all memory as u64, shape (pages, 512). Do not keep views of it past ``release``.
        view: all memory as a writable byte view, for sockets.

    Args:
        fd: memfd, owned from here on.
        pages: expected size in pages.

    Raises:
        ValueError: the file has another size.
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._fd = fd
        self.pages = pages
        size = os.fstat(fd).st_size
        if size != pages * PAGE_SIZE:
            os.close(fd)
            raise ValueError(f"the guest's memory file has {size} bytes, expected {pages * PAGE_SIZE}")
        self._mapping = mmap.mmap(fd, size)
        self.words: npt.NDArray[np.uint64] = np.frombuffer(self._mapping, np.uint64).reshape(pages, WORDS_PER_PAGE)
        self.view = memoryview(self._mapping)
        self._address = self.words.ctypes.data

    def data_runs(self) -> Runs:
        """Runs of pages that have memory behind them, shape (n, 2); the rest was never touched or was given back."""
        found: list[tuple[int, int]] = []
        size = self.pages * PAGE_SIZE
        end = 0
        while end < size:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError:  # ENXIO: no data behind this point
                break
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
            found.append((start // PAGE_SIZE, -(-end // PAGE_SIZE) - start // PAGE_SIZE))
        return np.array(found, np.int64).reshape(-1, 2) if found else NO_RUNS

    def punch(self, runs: Runs) -> None:
        """Give the pages of the runs back: they read as zero afterwards and take no memory."""
        for start, count in runs.tolist():
            mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
            if _libc.fallocate(self._fd, mode, start * PAGE_SIZE, count * PAGE_SIZE):
                number = ctypes.get_errno()
                raise OSError(number, f"cannot clear pages {start} to {start + count - 1}: {os.strerror(number)}")

    def write(self, first: int, data: memoryview) -> None:
        """Write whole pages from page ``first`` on, through the file. On pages that hold nothing yet this is twice as
        fast as through the mapping: the kernel need not zero them first, nor map them here.

        Raises:
            OSError: the host has no memory for them.
        """
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], first * PAGE_SIZE + done)

    def populate_huge(self, start: int, count: int) -> bool:
        """Put huge pages behind pages that shall be written, and map them, off the critical path. Returns whether the
        kernel did it."""
        return self._advise(mmap.MADV_HUGEPAGE, start, count) and self._advise(_MADV_POPULATE_WRITE, start, count)

    def map(self, start: int, count: int) -> bool:
        """Map pages that hold something, off the critical path: whoever writes them later meets no fault. A page that
        holds nothing would get memory. Returns whether the kernel did it."""
        return self._advise(_MADV_POPULATE_READ, start, count)

    def _advise(self, advice: int, start: int, count: int) -> bool:
        # Not through the mapping object, which would keep the interpreter meanwhile.
        return not _libc.madvise(self._address + start * PAGE_SIZE, count * PAGE_SIZE, advice)

    def release(self) -> None:
        """Unmap and close. Every view must be gone; a second call does nothing.

        Takes 0.2 s/GiB, mostly where the kernel frees the pages if the VMM has ended already: call it in a thread.
        """
        if self._fd < 0:
            return
        del self.words
        self.view.release()
        # The interpreter is kept while a mapping is closed. So the page tables are emptied before, and the pages are
        # freed after, when the descriptor as the last user of the file goes: both let other threads run.
        self._advise(_MADV_DONTNEED, 0, self.pages)
        self._mapping.close()
        os.close(self._fd)
        self._fd = -1


def drop_views(error: BaseException) -> None:
    """Make the frames that an error came through let go of their variables: a view of guest memory among them would
    keep the memory mapped for as long as somebody keeps the error."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            pending += (one.__cause__, one.__context__)


def shared_huge_pages() -> bool:
    """Whether the host gives huge pages to shared memory that asks for them."""
    try:
        return not any(f"[{off}]" in _SHMEM_HUGE.read_text() for off in ("never", "deny"))
    except OSError:
        return False
