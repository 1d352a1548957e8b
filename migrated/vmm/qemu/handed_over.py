"""RAM that goes from one QEMU to another on the same host as it is.

source        the files behind main memory, as descriptors; video memory and firmware, which are QEMU's own, travel with
              the device state
destination   QEMU started around the files, then its mappings made private: what it writes while it loads reaches no
              file. With ``resume``: its copies of pages go into the files, and the mappings are shared again. Should
              QEMU then not run the guest, the files get back what they had
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import Final

import numpy as np

from migrated.base.errors import VmmError
from migrated.kernel.errors import OtherProcessError
from migrated.kernel.remapping import FileRange, Remapping
from migrated.vmm.memory import WORDS_PER_PAGE, ProcessMemory, Span
from migrated.vmm.qemu.access import open_mapped
from migrated.vmm.qemu.ram import Carried, Ram
from migrated.vmm.seam import StateBytes

_HEADER: Final = struct.Struct(">4sQ")
_MAGIC: Final = b"MGOB"


def main_files(pid: int, ram: Ram) -> list[int]:
    """Descriptors of the files that a QEMU has its guest's main memory in, each from its beginning; none where some of
    it is in no file that others see.

    Raises:
        VmmError: one cannot be opened.
    """
    main = _main(ram)
    if not main or not all(carried.block.shared for carried in main):
        return []
    regions = open_mapped(pid, main)
    files = [region.fd for region in regions]
    if any(region.offset for region in regions):
        close_files(files)
        return []
    return files


def close_files(files: Iterable[int]) -> None:
    """Close descriptors that ``main_files`` gave and nobody wants."""
    for fd in files:
        os.close(fd)


class PrivateView:
    """Main memory that another QEMU has handed over, as a QEMU maps it privately until its guest runs.

    Args:
        pid: QEMU's process.
        ram: what was found in it.

    Raises:
        VmmError: its mappings cannot be changed.
    """

    def __init__(self, pid: int, ram: Ram) -> None:
        self._pid = pid
        main = _main(ram)
        regions = open_mapped(pid, main)
        try:
            self._mappings = Remapping(
                pid,
                [
                    FileRange(carried.address, carried.block.size, region.fd)
                    for carried, region in zip(main, regions, strict=True)
                ],
            )
        except OtherProcessError as error:
            raise VmmError(f"the memory that was handed to QEMU (process {pid}) cannot be mapped: {error}") from error

    def begin(self) -> None:
        """From here on nothing that QEMU writes reaches the files.

        Raises:
            VmmError: it cannot be done in that process.
        """
        try:
            self._mappings.map_privately()
        except OtherProcessError as error:
            raise VmmError(
                f"memory that was handed to QEMU (process {self._pid}) cannot be kept from it: {error}"
            ) from error

    def end(self) -> None:
        """Put what a stopped QEMU has written into the files; from here on all that it writes goes there. Doing it
        twice does no harm.

        Raises:
            VmmError: it cannot be done in that process.
        """
        try:
            self._mappings.share()
        except OSError as error:
            raise VmmError(
                f"what QEMU (process {self._pid}) wrote while it loaded is lost: {error.strerror}"
            ) from error
        except OtherProcessError as error:
            raise VmmError(
                f"memory that was handed to QEMU (process {self._pid}) cannot be given to it: {error}"
            ) from error

    def put_back(self) -> None:
        """Give the files what they had before ``end``, once QEMU has ended and its guest never ran.

        Raises:
            VmmError: it cannot be done.
        """
        try:
            self._mappings.put_back()
        except OSError as error:
            raise VmmError(f"memory that QEMU (process {self._pid}) was handed is changed: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the files."""
        self._mappings.close()


def own_bytes(ram: Ram) -> int:
    """Size of the memory that travels with the device state (bytes)."""
    return sum(carried.block.size for carried in _own(ram)) + _HEADER.size


def read_own(name: str, pid: int, ram: Ram) -> bytes:
    """Video memory and firmware of a guest, packed."""
    memory, pages = _own_memory(name, pid, ram)
    words = np.empty((pages, WORDS_PER_PAGE), np.uint64)
    memory.read(np.arange(pages), words)
    return _HEADER.pack(_MAGIC, words.nbytes) + words.tobytes()


def write_own(name: str, pid: int, ram: Ram, packed: StateBytes) -> memoryview:
    """Put packed video memory and firmware into a guest. Returns what comes behind it: the device state.

    Raises:
        VmmError: it is another guest's.
    """
    memory, pages = _own_memory(name, pid, ram)
    view = memoryview(packed)
    begin, size = _HEADER.size, pages * WORDS_PER_PAGE * 8
    if len(view) < begin + size or _HEADER.unpack_from(view) != (_MAGIC, size):
        raise VmmError(f"the device memory of guest {name!r} that came is not what its machine has: {size} bytes")
    words = np.frombuffer(view[begin : begin + size], np.uint64).reshape(pages, WORDS_PER_PAGE)
    memory.write(np.arange(pages), words)
    return view[begin + size :]


def _main(ram: Ram) -> list[Carried]:
    return [carried for carried in ram.carried if carried.block.role == "main"]


def _own(ram: Ram) -> list[Carried]:
    return [carried for carried in ram.carried if carried.block.role != "main"]


def _own_memory(name: str, pid: int, ram: Ram) -> tuple[ProcessMemory, int]:
    spans, first = [], 0
    for carried in _own(ram):
        spans.append(Span(carried.address, carried.block.pages, first))
        first += carried.block.pages
    return ProcessMemory(name, pid, spans, sparse=False), first
