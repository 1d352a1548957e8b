"""Calls about files that the standard library lacks. They let other threads run meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_SYNC_FILE_RANGE_WRITE: Final = 2
_SYNC_FILE_RANGE_WAIT: Final = 1 | _SYNC_FILE_RANGE_WRITE | 4
_FALLOC_KEEP_SIZE: Final = 1
_CANNOT: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def make_room(fd: int, size: int) -> None:
    """Have the disk set so many bytes aside behind the end of a file, which stays as long as it is: what is appended
    then finds room on a disk that has become full. A file system that cannot is not asked again.

    Raises:
        OSError: the disk is full or broken.
    """
    if _libc.fallocate(fd, _FALLOC_KEEP_SIZE, os.fstat(fd).st_size, size) < 0:
        code = ctypes.get_errno()
        if code not in _CANNOT:
            raise OSError(code, os.strerror(code))


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Have the kernel begin to write part of a file to its disk. A hint, without effect on a file system that cannot do
    it; whether the data is safe only fsync tells."""
    _libc.sync_file_range(fd, offset, size, _SYNC_FILE_RANGE_WRITE)


def let_go(fd: int, offset: int, size: int) -> None:
    """Wait until the disk has part of a file, and take that out of the page cache, where it only takes others' room.
    Without effect on a file system that cannot do it.

    Raises:
        OSError: the disk is full or broken. The kernel tells each error of the disk once, here or at an fsync.
    """
    if _libc.sync_file_range(fd, offset, size, _SYNC_FILE_RANGE_WAIT) < 0:
        code = ctypes.get_errno()
        if code not in _CANNOT:
            raise OSError(code, os.strerror(code))
    os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def descriptors_of(pid: int, wanted: Callable[[os.stat_result], bool]) -> Iterator[Path]:
    """The open descriptors of a process whose files are wanted, as links in /proc, which can be opened.

    Raises:
        OSError: the process has ended, or may not be looked into.
    """
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = link.stat()
        except FileNotFoundError:  # closed meanwhile
            continue
        if wanted(found):
            yield link
