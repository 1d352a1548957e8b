"""Memory files inside another process, mapped privately for a while and then shared, both over the mapping there is.

While such a mapping is private the process reads the file and sees what others write to it, but what it writes itself
goes into copies of its own. The system calls are made inside the process (``injection``). What was in the files before
the copies went there is kept, so that it can be put back.
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
from migrated.kernel.files import descriptors_of
from migrated.kernel.injection import Inside, find_sites, run_inside, why_not

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


class Remapping:
    """Files as a process has them mapped. All that can be found out ahead is found out here, so that the calls take no
    longer than they must.

    Args:
        pid: of the process.
        ranges: where it has which file; their descriptors are owned from here on, and closed if this fails.

    Raises:
        InjectionError: nothing can be done in that process, or it has a file open no more.
    """

    def __init__(self, pid: int, ranges: Sequence[FileRange]) -> None:
        self._pid = pid
        self._ranges = tuple(ranges)
        self._table = -1
        self._before: list[tuple[int, int, bytes]] = []
        """What copies were written over: descriptor, offset, content."""
        try:
            self._table = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._theirs = [_descriptor_of(pid, one.fd) for one in ranges]
            self._sites = find_sites(pid)
        except OSError as error:
            self.close()
            raise InjectionError(why_not(pid, error)) from error
        except BaseException:
            self.close()
            raise

    def map_privately(self) -> None:
        """Map the files privately. Nobody in the process may use that memory meanwhile. Blocks for a millisecond.

        Raises:
            InjectionError: it cannot be done, and what was mapped is mapped still.
        """
        self._map("private")

    def share(self) -> None:
        """Write the copies that the process has of pages into the files, and map these shared; as ``map_privately``.
        When it fails, some may be written.

        Raises:
            OSError: the copies cannot be read, or the files not be written.
        """
        vector = pagemap.make_vector(_RANGES_AT_ONCE)
        for one in self._ranges:
            copies = pagemap.private_copies(self._table, one.address, one.address + one.size, vector)
            for begin, end in copies.tolist():
                data = np.empty(end - begin, np.uint8)
                process_memory.read(self._pid, np.array([[begin, end - begin]], np.uint64), data)
                self._before.append((one.fd, begin - one.address, os.pread(one.fd, end - begin, begin - one.address)))
                _write_all(one.fd, data.data, begin - one.address)
        self._map("shared")

    def put_back(self) -> None:
        """Undo what ``share`` has written, once the process has ended.

        Raises:
            OSError: the files cannot be written.
        """
        while self._before:  # the last first, should a page have been written twice
            fd, offset, content = self._before[-1]
            _write_all(fd, memoryview(content), offset)
            self._before.pop()

    def close(self) -> None:
        """Close the descriptors; a second call does nothing."""
        ranges, self._ranges = self._ranges, ()
        for one in ranges:
            os.close(one.fd)
        if self._table >= 0:
            os.close(self._table)
            self._table = -1

    def _map(self, kind: Literal["shared", "private"]) -> None:
        def work(inside: Inside) -> None:
            for one, fd in zip(self._ranges, self._theirs, strict=True):
                flags = _FLAGS[kind] | _MAP_FIXED
                result = inside.call("mmap", one.address, one.size, _PROT_READ_WRITE, flags, fd, 0)
                if result != one.address:
                    raise InjectionError(
                        f"the memory at {one.address:#x} of process {self._pid} cannot be mapped again: "
                        f"{os.strerror(-result)}"
                    )

        run_inside(self._pid, work, self._sites)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of it: the kernel takes 2 GiB at a time, and less where a file system is nearly full."""
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _descriptor_of(pid: int, fd: int) -> int:
    """The number under which another process has a file open for reading and writing.

    Raises:
        OSError: it has not.
    """
    wanted = os.fstat(fd)
    for link in descriptors_of(pid, lambda found: os.path.samestat(found, wanted)):
        flags = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split("flags:")[1].split()[0]
        if int(flags, 8) & os.O_ACCMODE == os.O_RDWR:
            return int(link.name)
    raise InjectionError(f"process {pid} does not have its memory file open any more: it cannot be mapped again")
