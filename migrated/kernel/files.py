"""Calls about files that the standard library lacks. They let other threads run meanwhile."""

from __future__ import annotations

import ctypes
from typing import Final

_SYNC_FILE_RANGE_WRITE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Have the kernel begin to write part of a file to its disk. A hint: a file system that cannot is not asked again,
    and whether the data is safe only fsync tells."""
    _libc.sync_file_range(fd, offset, size, _SYNC_FILE_RANGE_WRITE)
