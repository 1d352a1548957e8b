"""Reading and writing the memory of a QEMU process: shared memory is mapped here, private memory is copied."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from migrated.base.errors import VmmError
from migrated.vmm.memory import FileRegion, GuestMemory, MappedMemory, MixedMemory, ProcessMemory, Span
from migrated.vmm.qemu.ram import Carried, Ram, read_maps

_SPARSE: Final = ("", "[heap]")


def open_memory(name: str, pid: int, ram: Ram) -> GuestMemory:
    """Access to all memory that travels.

    Args:
        name: of the guest, for sentences.
        pid: QEMU's process.
        ram: what was found in it.

    Raises:
        VmmError: a file behind it cannot be opened.
    """
    parts: list[GuestMemory] = []
    try:
        for kind, some in groupby(ram.carried, key=_kind):
            parts.append(_part(name, pid, kind, list(some)))
    except BaseException:
        for part in parts:
            part.release()
        raise
    return parts[0] if len(parts) == 1 else MixedMemory(parts)


def _kind(carried: Carried) -> str:
    if carried.block.shared:
        return "mapped"
    return "anonymous" if carried.mapping.path in _SPARSE else "private file"


def _part(name: str, pid: int, kind: str, blocks: Sequence[Carried]) -> GuestMemory:
    if kind == "mapped":
        return _mapped(pid, blocks)
    first = blocks[0].first_page
    spans = [Span(carried.address, carried.block.pages, carried.first_page - first) for carried in blocks]
    return ProcessMemory(name, pid, spans, sparse=kind == "anonymous")


def _mapped(pid: int, blocks: Sequence[Carried]) -> MappedMemory:
    try:
        return MappedMemory(open_mapped(pid, blocks))
    except (OSError, ValueError) as error:
        raise _unmapped(pid, error) from error


def open_mapped(pid: int, blocks: Sequence[Carried]) -> list[FileRegion]:
    """Open the files that are mapped where blocks are, by the mapping and not by a path: a file may have been removed,
    or never had a name. The descriptors are the caller's.

    Raises:
        VmmError: one cannot be opened.
    """
    regions: list[FileRegion] = []
    maps = read_maps(pid)  # mappings may have been split or joined since
    try:
        for carried in blocks:
            mapping = next(one for one in maps if one.begin <= carried.address < one.end)
            link = f"/proc/{pid}/map_files/{mapping.begin:x}-{mapping.end:x}"
            fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
            regions.append(FileRegion(fd, carried.block.pages, mapping.offset + carried.address - mapping.begin))
    except (OSError, StopIteration) as error:
        for region in regions:
            os.close(region.fd)
        raise _unmapped(pid, error) from error
    return regions


def _unmapped(pid: int, error: Exception) -> VmmError:
    return VmmError(
        f"the file behind guest memory of QEMU (process {pid}) cannot be mapped here: {error}; run the daemon as root"
    )
