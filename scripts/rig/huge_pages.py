"""Guest memory that is made of huge pages, whatever the host's setting for them is."""

from __future__ import annotations

import mmap
import os
from typing import Final

from migrated.kernel import memory as kernel_memory
from migrated.kernel import pagemap
from vmm_sim.memory import GuestMemory

HUGE_BYTES: Final = 2 << 20
_MADV_COLLAPSE: Final = 25
"""Makes huge pages of small ones at once (Linux 6.1)."""


def aligned_memory(memory_bytes: int) -> GuestMemory:
    """Guest memory, nothing of it touched, at an address where huge pages can be mapped."""
    others: list[GuestMemory | mmap.mmap] = []
    while (memory := GuestMemory(memory_bytes)).address % HUGE_BYTES:
        # The kernel puts one mapping below the other; huge pages need the next one to begin at a multiple of theirs.
        # What was mapped stays until the right one is found: each attempt fills one of the holes that lead astray.
        os.close(memory.fd)
        others += [memory, mmap.mmap(-1, memory.address % HUGE_BYTES)]
        assert len(others) < 1000, "the kernel gives no address at which huge pages can be mapped"
    return memory


def collapse(memory: GuestMemory, size_bytes: int) -> None:
    """Have the first bytes of ``aligned_memory``, which hold something, in huge pages."""
    assert kernel_memory.madvise(memory.address, size_bytes, _MADV_COLLAPSE)
    assert huge_bytes(memory) == size_bytes


def huge_bytes(memory: GuestMemory) -> int:
    """How much of guest memory this process has mapped as huge pages."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sum(
            last - first for first, last in pagemap.huge(fd, memory.address, memory.address + memory.bytes).tolist()
        )
    finally:
        os.close(fd)
