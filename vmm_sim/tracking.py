"""Dirty tracking, the guest's side.

    pagemap-scan   the kernel: the mapping is registered with userfaultfd for asynchronous write protection, and the
                   daemon collects with PAGEMAP_SCAN on the pagemap that we pass. Nobody can forget to mark a page.
    logged         shared memory with one byte per page that every write of :mod:`vmm_sim.memory` sets to 1. The
                   daemon clears a byte before it reads the page. (Bytes, since a bit needs an atomic OR.)

Both start clean: what was written before the start is not reported. Both report single pages: the first goes without
huge pages while it lives, since the kernel would report the 512 pages of one when a single one is written.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, Literal

import numpy as np

from migrated.kernel import pagemap, userfault
from migrated.kernel.memory import allow_huge_pages, huge_pages_allowed, lock_on_fault
from vmm_sim.errors import VmmError
from vmm_sim.memory import GuestMemory

Mode = Literal["auto", "pagemap-scan", "logged"]
MODES: Final = ("auto", "pagemap-scan", "logged")

_RANGES_PER_SCAN: Final = 1024


class KernelLacksError(Exception):
    """This kernel, or our rights on it, do not allow tracking by pagemap scan."""


class PagemapTracking:
    """userfaultfd on the whole mapping, as long as this lives. ``fd`` is our own pagemap.

    ``present_only``: scans must ask for pages that are written and also present or swapped; never-touched memory then
    costs nothing. It needs pages that stay in the page table once touched, so it is off where we cannot lock them.
    """

    mode: Final = "pagemap-scan"

    def __init__(self, memory: GuestMemory, *, present_only: bool) -> None:
        try:
            self._uffd = userfault.open_userfaultfd()
        except OSError as error:
            raise KernelLacksError(f"userfaultfd cannot be opened: {error.strerror}") from error
        self.fd = -1
        self._huge_pages = huge_pages_allowed()
        try:
            allow_huge_pages(False)
            userfault.enable_write_tracking(self._uffd)
            userfault.register(self._uffd, memory.address, memory.bytes)
            self.fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self.present_only = present_only and _lock_on_fault(memory)
            for begin, end in pagemap.huge(self.fd, memory.address, memory.address + memory.bytes).tolist():
                userfault.protect(self._uffd, begin, end - begin)
            _protect(self.fd, memory, present_only=self.present_only)
        except OSError as error:
            self.close()
            raise KernelLacksError(f"the kernel refuses asynchronous write protection: {error.strerror}") from error

    def close(self) -> None:
        """Stop tracking: closing the userfaultfd lifts the protection. The kernel may put huge pages together again."""
        os.close(self._uffd)
        allow_huge_pages(self._huge_pages)
        if self.fd >= 0:
            os.close(self.fd)


def _lock_on_fault(memory: GuestMemory) -> bool:
    """Lock pages as they are touched; False when we may not and the host could swap them out."""
    if lock_on_fault(memory.address, memory.bytes):
        return True
    with open("/proc/swaps", encoding="ascii") as swaps:
        return len(swaps.readlines()) <= 1  # the header


def _protect(pagemap_fd: int, memory: GuestMemory, *, present_only: bool) -> None:
    """Write-protect what counts as written, so that the log starts clean.

    To the kernel, a page without an entry in the page table counts as written. Protecting those too fills the page
    tables of all never-touched memory: exact whatever the host does, but a third of a second for 64 GiB, and it makes
    every scan walk them. ``present_only`` leaves them alone.
    """
    begin, end = memory.address, memory.address + memory.bytes
    if not present_only:
        pagemap.protect(pagemap_fd, begin, end)
        return
    pagemap.scan(
        pagemap_fd,
        begin,
        end,
        pagemap.make_vector(_RANGES_PER_SCAN),
        flags=pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC,
        all_of=pagemap.PAGE_IS_WRITTEN,
        any_of=pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_SWAPPED,
        returned=pagemap.PAGE_IS_WRITTEN,
    )


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


class DirtyTracking:
    """The tracking of one guest's memory: off, or on in one of its modes.

    Args:
        memory: the guest's.
        preference: the mode that ``auto`` stands for.
    """

    def __init__(self, memory: GuestMemory, preference: Mode) -> None:
        self._memory = memory
        self._preference: Mode = preference
        self._tracking: PagemapTracking | LoggedTracking | None = None

    @property
    def mode(self) -> Mode | None:
        """The mode in use, None while tracking is off."""
        return None if self._tracking is None else self._tracking.mode

    def start(self, mode: Mode, *, present_only: bool) -> PagemapTracking | LoggedTracking:
        """Start tracking from clean, also when it is on already. Raises VmmError DirtyTrackingUnavailable."""
        self.stop()
        preference = self._preference if mode == "auto" else mode
        self._tracking = start_tracking(self._memory, preference, present_only=present_only)
        return self._tracking

    def stop(self) -> None:
        """Stop tracking; nothing happens when it is off."""
        if self._tracking is not None:
            self._tracking.close()
            self._tracking = None
