"""Tracking of another process's writes with a userfaultfd that is made inside that process and then belongs to us.

The descriptor acts on the memory of the process that made it, whoever holds it. So one injected system call is all
that happens inside; it is closed again there at once, and when we close ours, or die, the kernel ends the tracking.
Writes are never held up or handed to us: with asynchronous write protection (Linux 6.7) the kernel notes them in the
page tables, where PAGEMAP_SCAN finds them (``pagemap``).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from typing import Final, TypeAlias

from migrated.kernel import pagemap, userfault
from migrated.kernel.errors import InjectionError, TrackingError
from migrated.kernel.injection import Inside, run_inside, why_not
from migrated.kernel.syscalls import take_descriptor

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | userfault.UFFD_USER_MODE_ONLY


AddressRange: TypeAlias = tuple[int, int]
"""A piece of a process's address space: (address, bytes)."""


class WriteTracking:
    """A userfaultfd of another process. Made by ``start_tracking``; ``close`` ends the tracking.

    Attributes:
        pause_ns: how long one thread of the process stood still for it.
    """

    def __init__(self, fd: int, pause_ns: int) -> None:
        self._fd = fd
        self._ranges: list[AddressRange] = []
        self.pause_ns = pause_ns

    def register(self, pid: int, ranges: Sequence[AddressRange], *, all_pages: bool) -> None:
        """Track the writes to some pieces of the process's memory.

        Args:
            pid, ranges, all_pages: as for ``start_tracking``.

        Raises:
            TrackingError: the kernel cannot, or somebody else tracks them already.
        """
        _enable(self._fd)
        for address, size in ranges:
            try:
                userfault.register(self._fd, address, size)
            except OSError as error:
                place = f"the memory at {address:#x} of process {pid} ({size} bytes)"
                if error.errno == errno.EBUSY:
                    raise TrackingError(
                        f"{place} is tracked by another userfaultfd already: a post-copy migration, a snapshot or "
                        "another manager; end it first"
                    ) from error
                if error.errno == errno.ENOMEM:
                    raise TrackingError(f"{place} is not all mapped any more; has a device been unplugged?") from error
                raise TrackingError(f"writes to {place} cannot be tracked: {error.strerror}") from error
            self._ranges.append((address, size))
        self._track_small_pages(pid, all_pages=all_pages)

    def _track_small_pages(self, pid: int, *, all_pages: bool) -> None:
        """Protect each small page by itself where that is asked for, or the process has huge pages of shared memory
        mapped. The whole range, so that it is given no other huge pages while it is tracked."""
        try:
            entries = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TrackingError(f"the page tables of process {pid} cannot be read: {error.strerror}") from error
        try:
            for address, size in self._ranges:
                if all_pages or len(pagemap.huge(entries, address, address + size)):
                    userfault.protect(self._fd, address, size)
        except OSError as error:
            raise TrackingError(
                f"huge pages of process {pid} cannot be tracked page by page ({error.strerror}); has it ended?"
            ) from error
        finally:
            os.close(entries)

    def close(self) -> None:
        """End the tracking; a second call does nothing. Takes some milliseconds per GiB: call it off the event loop."""
        if self._fd < 0:
            return
        for address, size in self._ranges:
            try:
                userfault.unregister(self._fd, address, size)
            except OSError:
                break  # unmapped, or the process has ended; closing ends the tracking that is left
        os.close(self._fd)
        self._fd = -1


def _enable(fd: int) -> None:
    try:
        userfault.enable_write_tracking(fd)
    except OSError as error:
        raise TrackingError(
            f"kernel {os.uname().release} has no asynchronous write protection (UFFD_FEATURE_WP_ASYNC): writes can be "
            "tracked from outside on Linux 6.7 or newer only; update the kernel of this host"
        ) from error


def why_no_tracking() -> str | None:
    """Return a sentence if this kernel cannot track writes at all (tried in our own process), None if it can."""
    try:
        fd = userfault.open_userfaultfd()
    except OSError as error:
        return f"this kernel makes no userfaultfd ({error.strerror}); it needs CONFIG_USERFAULTFD and Linux 6.7"
    try:
        _enable(fd)
    except TrackingError as error:
        return str(error)
    finally:
        os.close(fd)
    return None


def start_tracking(pid: int, ranges: Sequence[AddressRange], *, all_pages: bool = False) -> WriteTracking:
    """Track the writes of a process to pieces of its memory, from the return on. Blocks: call it off the event loop.

    Args:
        pid: the process.
        ranges: the pieces.
        all_pages: protect pages too that have no entry in the page table, so that each one without an entry counts as
            written later. Shared memory needs it on a host with swap: when the kernel swaps out a page of it, nothing
            is left of the page's entry, nor of the note that it was written. It fills the page tables: 8 bytes and
            about a nanosecond for each page.

    Raises:
        InjectionError: no system call can be made inside the process.
        TrackingError: its kernel, or a filter of its system calls, does not let its writes be tracked.
    """
    begin_ns = 0

    def make(inside: Inside) -> int:
        nonlocal begin_ns
        begin_ns = time.monotonic_ns()
        there = inside.call("userfaultfd", _FLAGS)
        if there < 0:
            raise TrackingError(_why_not_made(pid, -there))
        try:
            return take_descriptor(pid, there)
        except OSError as error:
            raise InjectionError(why_not(pid, error)) from error
        finally:
            inside.call("close", there)

    fd = run_inside(pid, make)
    tracking = WriteTracking(fd, time.monotonic_ns() - begin_ns)
    try:
        tracking.register(pid, ranges, all_pages=all_pages)
    except BaseException:
        tracking.close()
        raise
    return tracking


def _why_not_made(pid: int, number: int) -> str:
    if number in (errno.EPERM, errno.EACCES):
        return (
            f"process {pid} may not make a userfaultfd: a filter of its system calls (seccomp) or a security module "
            "forbids it; allow userfaultfd there"
        )
    if number == errno.ENOSYS:
        return f"process {pid} has no system call userfaultfd: the kernel lacks it, or a seccomp filter hides it"
    if number == errno.EMFILE:
        return f"process {pid} has used up its descriptors (RLIMIT_NOFILE); raise its limit"
    return f"process {pid} could not make a userfaultfd: {os.strerror(number)}"
