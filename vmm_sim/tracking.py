"""Dirty tracking, the guest's side.

    pagemap-scan   the kernel: the mapping is registered with userfaultfd for asynchronous write protection, and the
                   daemon collects with PAGEMAP_SCAN on the pagemap that we pass. Nobody can forget to mark a page.
    logged         shared memory with one byte per page that every write of :mod:`vmm_sim.memory` sets to 1. The
                   daemon clears a byte before it reads the page. (Bytes, since a bit needs an atomic OR.)

Both start clean: what was written before the start is not reported.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import Final, Literal

import numpy as np

from vmm_sim.errors import VmmError
from vmm_sim.memory import GuestMemory

Mode = Literal["auto", "pagemap-scan", "logged"]
MODES: Final = ("auto", "pagemap-scan", "logged")

# include/uapi/linux/userfaultfd.h
_USERFAULTFD_IOC_NEW: Final = 0xAA00
_SYS_USERFAULTFD: Final = 323
_UFFD_USER_MODE_ONLY: Final = 1
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFD_API: Final = 0xAA
_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
_FEATURE_WP_UNPOPULATED: Final = 1 << 13
_FEATURE_WP_ASYNC: Final = 1 << 15
_REGISTER_MODE_WP: Final = 2

# include/uapi/linux/fs.h
_PAGEMAP_SCAN: Final = 0xC0606610
_PM_SCAN_WP_MATCHING: Final = 1
_PM_SCAN_CHECK_WPASYNC: Final = 2
_PAGE_IS_WRITTEN: Final = 1 << 1
_PAGE_IS_PRESENT: Final = 1 << 3
_PAGE_IS_SWAPPED: Final = 1 << 4
_SCAN_ARG: Final = struct.Struct("<12Q")
_WALK_END: Final = 4
_RUNS_PER_SCAN: Final = 1024

_SYS_MLOCK2: Final = 325
_MLOCK_ONFAULT: Final = 1


class KernelLacksError(Exception):
    """This kernel, or our rights on it, do not allow tracking by pagemap scan."""


def _open_userfaultfd() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        libc = ctypes.CDLL(None, use_errno=True)
        # Faults of an asynchronous protection are resolved in the kernel, so user mode only loses nothing.
        fd: int = libc.syscall(_SYS_USERFAULTFD, flags | _UFFD_USER_MODE_ONLY)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())) from None
        return fd
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


class PagemapTracking:
    """userfaultfd on the whole mapping, as long as this lives. ``fd`` is our own pagemap.

    ``present_only``: scans must ask for pages that are written and also present or swapped; never-touched memory then
    costs nothing. It needs pages that stay in the page table once touched, so it is off where we cannot lock them.
    """

    mode: Final = "pagemap-scan"

    def __init__(self, memory: GuestMemory, *, present_only: bool) -> None:
        try:
            self._uffd = _open_userfaultfd()
        except OSError as error:
            raise KernelLacksError(f"userfaultfd cannot be opened: {error.strerror}") from error
        self.fd = -1
        try:
            features = _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_HUGETLBFS_SHMEM
            fcntl.ioctl(self._uffd, _UFFDIO_API, struct.pack("<3Q", _UFFD_API, features, 0))
            register = struct.pack("<4Q", memory.address, memory.bytes, _REGISTER_MODE_WP, 0)
            fcntl.ioctl(self._uffd, _UFFDIO_REGISTER, register)
            self.fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self.present_only = present_only and _lock_on_fault(memory)
            _protect(self.fd, memory, present_only=self.present_only)
        except OSError as error:
            self.close()
            raise KernelLacksError(f"the kernel refuses asynchronous write protection: {error.strerror}") from error

    def close(self) -> None:
        """Stop tracking: closing the userfaultfd lifts the protection."""
        os.close(self._uffd)
        if self.fd >= 0:
            os.close(self.fd)


def _lock_on_fault(memory: GuestMemory) -> bool:
    """Lock pages as they are touched; False when we may not and the host could swap them out."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.bytes)
    if libc.syscall(_SYS_MLOCK2, address, length, _MLOCK_ONFAULT) == 0:
        return True
    with open("/proc/swaps", encoding="ascii") as swaps:
        return len(swaps.readlines()) <= 1  # the header


def _protect(pagemap: int, memory: GuestMemory, *, present_only: bool) -> None:
    """Write-protect what counts as written, so that the log starts clean.

    To the kernel, a page without an entry in the page table counts as written. Protecting those too fills the page
    tables of all never-touched memory: exact whatever the host does, but a third of a second for 64 GiB, and it makes
    every scan walk them. ``present_only`` leaves them alone.
    """
    runs = (ctypes.c_uint64 * (3 * _RUNS_PER_SCAN))()
    # Without room for runs, a scan protects everything, whatever its masks say.
    vector = (ctypes.addressof(runs), _RUNS_PER_SCAN) if present_only else (0, 0)
    any_of = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED if present_only else 0
    start, end = memory.address, memory.address + memory.bytes
    flags = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
    while start < end:
        masks = (0, _PAGE_IS_WRITTEN, any_of, _PAGE_IS_WRITTEN if present_only else 0)
        arguments = bytearray(_SCAN_ARG.pack(_SCAN_ARG.size, flags, start, end, 0, *vector, 0, *masks))
        fcntl.ioctl(pagemap, _PAGEMAP_SCAN, arguments)
        start = _SCAN_ARG.unpack(arguments)[_WALK_END]


class LoggedTracking:
    """The shared byte map. ``fd`` is its memfd."""

    mode: Final = "logged"
    present_only: Final = False

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, memory.pages)
        memory.dirty = np.frombuffer(mmap.mmap(self.fd, memory.pages), dtype=np.uint8)

    def close(self) -> None:
        """Stop tracking."""
        self._memory.dirty = None
        os.close(self.fd)


def start_tracking(memory: GuestMemory, mode: Mode, *, present_only: bool = False) -> PagemapTracking | LoggedTracking:
    """Start a tracker; ``auto`` prefers the kernel's. Raises VmmError DirtyTrackingUnavailable."""
    if mode == "logged":
        return LoggedTracking(memory)
    try:
        return PagemapTracking(memory, present_only=present_only)
    except KernelLacksError as error:
        if mode == "auto":
            return LoggedTracking(memory)
        raise VmmError(
            "DirtyTrackingUnavailable", f"Dirty tracking by pagemap-scan is not possible here: {error}; use logged."
        ) from error
