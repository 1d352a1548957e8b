"""Memory files inside another process, mapped privately for a while and then shared, both over the mapping there is.

While such a mapping is private the process reads the file and sees what others write to it, but what it writes itself
goes into copies of its own. The system calls are made inside the process (``injection``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from migrated.kernel import pagemap, process_memory
from migrated.kernel.errors import InjectionError
from migrated.kernel.injection import Inside, run_inside, why_not

_PROT_READ_WRITE: Final = 3
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FLAGS: Final = {"shared": 1, "private": 2 | _MAP_NORESERVE}
_RANGES_AT_ONCE: Final = 4096


@dataclass(frozen=True, slots=True)
class FileRange:
    """A file that is mapped, from its beginning, in a process: ``size`` bytes at ``address``; ``fd`` is ours."""

    address: int
    size: int
    fd: int


def remap(pid: int, ranges: Sequence[FileRange], kind: Literal["shared", "private"]) -> None:
    """Map files again where they are mapped. Nobody in the process may use that memory meanwhile. Blocks: call it off
    the event loop.

    Raises:
        InjectionError: it cannot be done there, and what was mapped is mapped still.
    """
    try:
        theirs = [_descriptor_of(pid, one.fd) for one in ranges]
    except OSError as error:
        raise InjectionError(why_not(pid, error)) from error

    def work(inside: Inside) -> None:
        for one, fd in zip(ranges, theirs, strict=True):
            flags = _FLAGS[kind] | _MAP_FIXED
            result = inside.call("mmap", one.address, one.size, _PROT_READ_WRITE, flags, fd, 0)
            if result != one.address:
                raise InjectionError(
                    f"the memory at {one.address:#x} of process {pid} cannot be mapped again: {os.strerror(-result)}"
                )

    run_inside(pid, work)


def copy_back(pid: int, ranges: Sequence[FileRange]) -> int:
    """Write the copies that a process has of pages of private mappings into the files. Returns the bytes.

    Raises:
        OSError: the process has ended, or may not be looked at.
    """
    total = 0
    table = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        vector = pagemap.make_vector(_RANGES_AT_ONCE)
        for one in ranges:
            for begin, end in pagemap.private_copies(table, one.address, one.address + one.size, vector).tolist():
                data = np.empty(end - begin, np.uint8)
                process_memory.read(pid, np.array([[begin, end - begin]], np.uint64), data)
                os.pwrite(one.fd, data.data, begin - one.address)
                total += end - begin
    finally:
        os.close(table)
    return total


def _descriptor_of(pid: int, fd: int) -> int:
    """The number under which another process has a file open for reading and writing.

    Raises:
        OSError: it has not.
    """
    wanted = os.fstat(fd)
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.samestat(link.stat(), wanted):
            flags = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split("flags:")[1].split()[0]
            if int(flags, 8) & os.O_ACCMODE == os.O_RDWR:
                return int(link.name)
    raise InjectionError(f"process {pid} does not have its memory file open any more: it cannot be mapped again")
