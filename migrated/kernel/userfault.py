"""userfaultfd for asynchronous write protection: writes are noted by the kernel and nobody has to answer a fault.

    open -> enable -> register a range -> protect where huge pages are mapped -> (pagemap.scan with PM_SCAN_WP_MATCHING)
         -> close lifts the protection

Layouts as in include/uapi/linux/userfaultfd.h. A descriptor works on the memory of the process that made it, whoever
holds it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

from migrated.kernel.syscalls import syscall

USERFAULTFD_IOC_NEW: Final = 0xAA00
UFFD_USER_MODE_ONLY: Final = 1
"""Enough for asynchronous write protection, whose faults the kernel resolves by itself, and needs no privilege."""

UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WRITEPROTECT: Final = 0xC018AA06
UFFD_API: Final = 0xAA

FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
FEATURE_WP_UNPOPULATED: Final = 1 << 13
FEATURE_WP_ASYNC: Final = 1 << 15
REGISTER_MODE_WP: Final = 2
WRITEPROTECT_MODE_WP: Final = 1


def open_userfaultfd() -> int:
    """A userfaultfd of this process: through /dev/userfaultfd, or by the system call for user mode only.

    Raises:
        OSError: neither is allowed here.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return syscall("userfaultfd", flags | UFFD_USER_MODE_ONLY)
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def enable_write_tracking(uffd: int) -> None:
    """Ask for asynchronous write protection of all kinds of memory; once for each descriptor, before ``register``.

    Raises:
        OSError: this kernel does not have it (Linux 6.7 does).
    """
    features = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("=3Q", UFFD_API, features, 0))


def register(uffd: int, address: int, size: int) -> None:
    """Register memory of the descriptor's process for write protection.

    Raises:
        OSError: it is not mapped there, or registered already.
    """
    fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("=4Q", address, size, REGISTER_MODE_WP, 0))


def protect(uffd: int, address: int, size: int) -> None:
    """Write-protect a registered range, every small page by itself. Unmaps huge pages of shared memory for it, and
    fills the page tables: 8 bytes for each page, holes too. Takes 3 ms/GiB.

    PAGEMAP_SCAN would protect a huge page of shared memory as a whole, and the first write to one takes that protection
    from all of it: 512 pages would count as written.

    Raises:
        OSError: it is not registered with this descriptor.
    """
    fcntl.ioctl(uffd, UFFDIO_WRITEPROTECT, struct.pack("=3Q", address, size, WRITEPROTECT_MODE_WP))


def unregister(uffd: int, address: int, size: int) -> None:
    """End the protection of a range.

    Raises:
        OSError: it is not registered with this descriptor.
    """
    fcntl.ioctl(uffd, UFFDIO_UNREGISTER, struct.pack("=2Q", address, size))
