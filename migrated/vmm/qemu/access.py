"""Reading and writing the memory of a QEMU process: shared memory is mapped here, private memory is copied."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from migrated.base.errors import VmmError
from migrated.kernel.files import descriptors_of
from migrated.vmm.memory import FileRegion, GuestMemory, MappedMemory, MixedMemory, ProcessMemory, Span
from migrated.vmm.qemu.ram import Carried, Mapping, Ram, read_maps

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
    """Open the files that are mapped where blocks are, by what QEMU has open and not by a path: a file may have been
    removed, or never had a name. The descriptors are the caller's.

    Raises:
        VmmError: one cannot be opened.
    """
    regions: list[FileRegion] = []
    maps = read_maps(pid)  # mappings may have been split or joined since
    try:
        for carried in blocks:
            mapping = next(one for one in maps if one.begin <= carried.address < one.end)
            offset = mapping.offset + carried.address - mapping.begin
            regions.append(FileRegion(_open_file(pid, mapping), carried.block.pages, offset))
    except (OSError, StopIteration) as error:
        for region in regions:
            os.close(region.fd)
        raise _unmapped(pid, error) from error
    return regions


def _open_file(pid: int, mapping: Mapping) -> int:
    """Open the file behind a mapping: through a descriptor of it that QEMU holds, which QEMU's own user may do, else
    through the mapping itself, which takes root."""
    for link in descriptors_of(pid, lambda found: _is_file_of(found, mapping)):
        fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
        if _is_file_of(os.fstat(fd), mapping):
            return fd
        os.close(fd)
    return os.open(f"/proc/{pid}/map_files/{mapping.begin:x}-{mapping.end:x}", os.O_RDWR | os.O_CLOEXEC)


def _is_file_of(found: os.stat_result, mapping: Mapping) -> bool:
    """Whether a file is the one behind a mapping."""
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    return (found.st_ino, device) == (mapping.inode, mapping.device)


def _unmapped(pid: int, error: Exception) -> VmmError:
    reason = error.strerror if isinstance(error, OSError) else error
    return VmmError(
        f"the file behind guest memory of QEMU (process {pid}) cannot be mapped here: {reason}; run the daemon as root "
        "or as QEMU's user"
    )
