"""System calls by number, for those that neither Python nor every C library wraps."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from typing import Final

_NUMBERS: Final[Mapping[str, Mapping[str, int]]] = {
    # arch/x86/entry/syscalls/syscall_64.tbl
    "x86_64": {"close": 3, "mmap": 9, "userfaultfd": 323, "pidfd_getfd": 438},
    # include/uapi/asm-generic/unistd.h
    "aarch64": {"close": 57, "mmap": 222, "userfaultfd": 282, "pidfd_getfd": 438},
}
MACHINE: Final = platform.machine()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def number_of(name: str) -> int:
    """The number of a system call on this machine.

    Raises:
        OSError: ENOSYS, on a machine that the table above does not know.
    """
    try:
        return _NUMBERS[MACHINE][name]
    except KeyError:
        raise OSError(38, f"the number of {name} is not known on {MACHINE}") from None


def syscall(name: str, *arguments: int) -> int:
    """Make a system call here.

    Raises:
        OSError: it failed.
    """
    result: int = _libc.syscall(ctypes.c_long(number_of(name)), *(ctypes.c_long(argument) for argument in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def take_descriptor(pid: int, fd: int) -> int:
    """A duplicate here of another process's descriptor (pidfd_getfd). Needs the right to trace that process.

    Raises:
        OSError: it failed, or the process has ended.
    """
    pidfd = os.pidfd_open(pid)
    try:
        return syscall("pidfd_getfd", pidfd, fd, 0)
    finally:
        os.close(pidfd)
