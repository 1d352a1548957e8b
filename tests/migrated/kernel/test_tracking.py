"""Writes of another process that are found although nothing is left of them in its page table."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from migrated.kernel.tracking import start_tracking, why_no_tracking
from migrated.vmm.dirty_log import PagemapScanLog
from migrated.vmm.memory import Span
from protocol.guest import PAGE_SIZE
from protocol.pages import indices_of

_PAGES = 64
_GUEST = """
import ctypes, mmap, os, sys
fd = os.memfd_create("shared")
size = int(sys.argv[1]) * mmap.PAGESIZE
os.ftruncate(fd, size)
memory = mmap.mmap(fd, size)
memory[:8] = bytes(8)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    place = int(line) * mmap.PAGESIZE
    memory[place] = 1
    memory.madvise(mmap.MADV_DONTNEED, place, mmap.PAGESIZE)  # what is left of a page that was swapped out: nothing
    print("written", flush=True)
"""


@contextlib.contextmanager
def shared_memory() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with shared memory that writes the pages that it is told, and the address of that memory."""
    command = [sys.executable, "-c", _GUEST, str(_PAGES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(said(process))
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    """The next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_page_of_shared_memory_that_lost_its_entry_after_it_was_written_is_found() -> None:
    if (reason := why_no_tracking()) is not None:
        pytest.skip(reason)
    with shared_memory() as (process, address):
        tracking = start_tracking(process.pid, [(address, _PAGES * PAGE_SIZE)], all_pages=True)
        entries = os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY)
        log = PagemapScanLog(entries, [Span(address, _PAGES, 0)], present_only=False)
        try:
            assert log.collect().tolist() == [], "neither what was written before nor what never was"
            for page in (3, 40):
                print(page, file=process.stdin, flush=True)
                assert said(process) == "written\n"
            assert indices_of(log.collect()).tolist() == [3, 40]
            assert log.collect().tolist() == []
        finally:
            log.close()
            tracking.close()
