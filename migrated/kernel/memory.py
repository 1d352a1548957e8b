"""Calls about memory that the standard library lacks, or makes while it holds the interpreter.

Every call here lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

MAP_NORESERVE: Final = 0x4000
"""Reserve addresses without the promise of memory (older Pythons do not name it)."""
MADV_DONTNEED: Final = 4
MADV_HUGEPAGE: Final = 14
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23

_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_PROT_READ: Final = 1
_PROT_WRITE: Final = 2
_MAP_SHARED: Final = 1
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MLOCK_ONFAULT: Final = 1
_PR_SET_THP_DISABLE: Final = 41
_PR_GET_THP_DISABLE: Final = 42
_SYS_MLOCK2: Final = {"x86_64": 325, "aarch64": 284}

_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.malloc_trim.argtypes = [ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def madvise(address: int, size: int, advice: int) -> bool:
    """Advise the kernel about memory of this process. Returns whether it took the advice."""
    return not _libc.madvise(address, size, advice)


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Give part of a file back: it reads as zero afterwards and takes no memory.

    Raises:
        OSError: the file system cannot.
    """
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, size):
        raise _error(f"cannot clear {size} bytes at {offset} of a memory file")


def map_shared_at(address: int, size: int, fd: int, offset: int) -> None:
    """Map part of a file, shared, readable and writable, over memory that is reserved at ``address``.

    Raises:
        OSError: it cannot be mapped.
    """
    flags = _MAP_SHARED | _MAP_FIXED
    if _libc.mmap(address, size, _PROT_READ | _PROT_WRITE, flags, fd, offset) == _MAP_FAILED:
        raise _error(f"cannot map {size} bytes at {offset} of a memory file")


def bound_heap() -> None:
    """Keep the C library from holding what a migration needed. Buffers of 1 MiB come from the kernel and go back to it,
    where otherwise the first one that is freed raises that bound to 32 MiB; and threads, of which every migration has
    new ones, share two heaps, where otherwise each begins one that is never given back."""
    _libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    _libc.mallopt(_M_ARENA_MAX, 2)


def give_back_heap() -> None:
    """Give the kernel back what is free between the pieces that are in use. It takes a millisecond for 10 MiB, in which
    whoever needs memory waits."""
    _libc.malloc_trim(0)


def available_bytes() -> int:
    """Memory that this host can still give without swapping (MemAvailable).

    Raises:
        OSError: the kernel does not tell.
    """
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise OSError("the kernel does not tell MemAvailable in /proc/meminfo")


def swap_is_on() -> bool:
    """Whether this host may swap memory out. True where the kernel does not tell."""
    try:
        with open("/proc/swaps", encoding="ascii") as lines:
            return len(lines.readlines()) > 1  # the first one is the header
    except OSError:
        return True


def lock_on_fault(address: int, size: int) -> bool:
    """Keep pages of this process in memory once they are touched. Returns whether we may."""
    number = _SYS_MLOCK2[platform.machine()]
    refused: int = _libc.syscall(number, ctypes.c_void_p(address), ctypes.c_size_t(size), _MLOCK_ONFAULT)
    return not refused


def huge_pages_allowed() -> bool:
    """Whether this process may be given transparent huge pages, as far as it is up to the process."""
    return not _libc.prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)


def allow_huge_pages(allowed: bool) -> None:
    """Allow this process transparent huge pages or not, in all its memory. Those that it has stay mapped. Children
    inherit it.

    Raises:
        OSError: the kernel cannot.
    """
    if _libc.prctl(_PR_SET_THP_DISABLE, int(not allowed), 0, 0, 0):
        raise _error("cannot set whether this process has huge pages")
