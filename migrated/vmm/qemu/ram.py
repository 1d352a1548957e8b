"""The places of guest memory inside a QEMU process: its blocks, as QEMU names them, and the mappings behind them.

info ramblock      every block: name, size; from QEMU 10.0 on its address too
info mtree -f      which blocks the guest sees, and where
gpa2hva            the address in the process of what the guest sees somewhere
/proc/PID/maps     what lies at that address: private memory, memfd, a file, huge pages; and, by its size and the
                   guard page that QEMU puts behind it, a block that the guest does not see just now
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from migrated.base.errors import VmmError, VmmGoneError
from migrated.kernel.tracking import AddressRange
from migrated.vmm.qemu.qmp import Qmp, QmpCommandError
from protocol.guest import PAGE_SIZE

Backing: TypeAlias = Literal["private", "memfd", "file", "hugetlb"]
Role: TypeAlias = Literal["main", "device", "firmware", "rebuilt"]
"""main: what the guest has as RAM. device: memory of a device that the guest can write. firmware: what it starts from.
rebuilt: what any QEMU makes again from its own files and command line (option ROMs, tables), and no guest can write."""

_BLOCK: Final = re.compile(
    r"^\s*(?P<name>\S.*?)\s+\d+ \SiB\s+0x[0-9a-f]+\s+0x[0-9a-f]+\s+0x(?P<total>[0-9a-f]+)"
    r"(?:\s+0x(?P<address>[0-9a-f]+))?"
)
_VIEW: Final = re.compile(
    r"^\s+(?P<begin>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio -?\d+, (?P<kind>ram|rom|romd|ramd|nv-ram)\): "
    r"(?P<name>.+?)(?: @(?P<offset>[0-9a-f]+))?(?: KVM)?\s*$"
)
_HOST_ADDRESS: Final = re.compile(r" is 0x([0-9a-f]+)")
_AGAIN_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Pauses before a guest is asked again that changed its view meanwhile."""
_FIRMWARE: Final = re.compile(r"^(pc\.bios|system\.flash\d+)$")
_REBUILT: Final = re.compile(r"^(/rom@.*|pc\.rom|.*\.rom)$")


class Seen(NamedTuple):
    """A piece of a block as the guest sees it (bytes)."""

    guest_address: int
    offset: int
    size: int


class Mapping(NamedTuple):
    """One line of /proc/PID/maps."""

    begin: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One block of a guest's memory.

    Attributes:
        name: as QEMU has it.
        size: bytes.
        seen: where the guest sees it, by guest address; empty when it does not.
        address: in QEMU's process, None where that could not be found.
        mapping: what lies there, None likewise.
    """

    name: str
    size: int
    role: Role
    seen: tuple[Seen, ...] = ()
    address: int | None = None
    mapping: Mapping | None = None

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return self.size // PAGE_SIZE

    @property
    def guest_address(self) -> int:
        """Guest-physical address of its first byte, or of its lowest piece; 0 where the guest does not see it."""
        return self.seen[0].guest_address if self.seen else 0

    @property
    def label(self) -> str:
        """A name that is the same on another host: main memory may be called differently there."""
        return f"ram@{self.guest_address:#x}" if self.role == "main" else self.name

    @property
    def shared(self) -> bool:
        """Whether it is mapped so that others who map the same file see it."""
        return self.mapping is not None and self.mapping.permissions.endswith("s")

    @property
    def backing(self) -> Backing:
        """The kind of memory behind it: memfd, huge pages, a file, or private memory of the process."""
        path = self.mapping.path if self.mapping is not None else ""
        if path.startswith("/memfd:"):
            return "memfd"
        if path.startswith("/anon_hugepage"):
            return "hugetlb"
        return "file" if path.startswith("/") else "private"


@dataclass(frozen=True, slots=True)
class Carried:
    """A block that travels as pages: found, with its first page in the guest's numbering."""

    block: RamBlock
    address: int
    mapping: Mapping
    first_page: int

    @property
    def range(self) -> AddressRange:
        """Its place in QEMU's process."""
        return self.address, self.block.size


@dataclass(frozen=True, slots=True)
class Ram:
    """All memory of a guest.

    Attributes:
        carried: what travels as pages: main memory by guest address, then devices', then firmware, by name.
        rebuilt: what does not travel, as the destination's QEMU makes it by itself.
        lost: what would have to travel and cannot be found.
    """

    carried: tuple[Carried, ...]
    rebuilt: tuple[RamBlock, ...] = ()
    lost: tuple[RamBlock, ...] = field(default=())

    @property
    def pages(self) -> int:
        """Pages that travel."""
        return sum(carried.block.pages for carried in self.carried)


async def find_ram(qmp: Qmp) -> Ram:
    """Find all memory of a guest. A guest that runs may change what it sees where between two questions, as firmware
    does when it shadows itself: then all are asked again.

    Raises:
        VmmError: QEMU does not tell, what it tells is not understood, or the guest changes its view all the while.
    """
    found = parse_blocks(await qmp.human("info ramblock"))
    backends = {str(backend["id"]) for backend in await qmp.call("query-memdev") if "id" in backend}
    for wait_s in (*_AGAIN_S, None):
        view = parse_view(await qmp.human("info mtree -f"))
        maps = read_maps(qmp.pid)
        blocks: list[RamBlock] = []
        for name, size, address in found:
            seen = seen_of(name, [other for other, _, _ in found], view)
            block = RamBlock(name, size, _role(name, backends), seen)
            if address is None and seen:
                # The largest piece is the one that moves least: a few KiB below 1 MiB are switched on and off.
                address = await _host_address(qmp, max(seen, key=lambda piece: piece.size))
            blocks.append(place(block, address, maps))
        if parse_view(await qmp.human("info mtree -f")) == view and are_apart(blocks):
            return arrange(by_size(blocks, maps))
        if wait_s is not None:
            await asyncio.sleep(wait_s)
    raise VmmError(
        "the guest changes all the while which memory it sees where, as it does when it starts: try again in a while"
    )


def are_apart(blocks: Iterable[RamBlock]) -> bool:
    """Return whether no two blocks that were found have an address in common."""
    spans = sorted((block.address, block.address + block.size) for block in blocks if block.address is not None)
    return all(before[1] <= after[0] for before, after in pairwise(spans))


def parse_blocks(text: str) -> list[tuple[str, int, int | None]]:
    """Name, size in bytes and address (None before QEMU 10.0) of every block that ``info ramblock`` lists.

    Raises:
        VmmError: it lists none.
    """
    found = []
    for line in text.splitlines():
        if (match := _BLOCK.match(line)) is not None:
            address = match["address"]
            found.append((match["name"], int(match["total"], 16), int(address, 16) if address else None))
    if not found:
        raise VmmError("QEMU lists no blocks of memory ('info ramblock' is empty or unknown): this QEMU cannot be used")
    return found


def parse_view(text: str) -> list[tuple[str, Seen]]:
    """Read the address space of the guest's CPUs from ``info mtree -f``: names of regions with their pieces, by
    ascending guest address."""
    pieces: list[tuple[str, Seen]] = []
    for part in re.split(r"^FlatView #\d+", text, flags=re.MULTILINE):
        if ' AS "memory"' not in part:
            continue
        for line in part.splitlines():
            if (match := _VIEW.match(line)) is not None:
                begin = int(match["begin"], 16)
                seen = Seen(begin, int(match["offset"] or "0", 16), int(match["end"], 16) + 1 - begin)
                pieces.append((match["name"], seen))
    return sorted(pieces, key=lambda piece: piece[1].guest_address)


def seen_of(name: str, all_names: Iterable[str], view: Sequence[tuple[str, Seen]]) -> tuple[Seen, ...]:
    """Return the pieces of a block in the guest's address space. A region's name is the last part of its
    block's; one that several blocks share is not told apart, and counts as not seen."""
    short = name.rpartition("/")[2]
    if sum(other == short or other.endswith(f"/{short}") for other in all_names) > 1:
        return ()
    return tuple(seen for region, seen in view if region in (name, short))


def _role(name: str, backends: set[str]) -> Role:
    if name in backends or name.removeprefix("/objects/") in backends:
        return "main"
    if _FIRMWARE.match(name):
        return "firmware"
    return "rebuilt" if _REBUILT.match(name) else "device"


async def _host_address(qmp: Qmp, seen: Seen) -> int | None:
    """Address in the process of the beginning of the block that the guest sees there."""
    try:
        answer = await qmp.human(f"gpa2hva {seen.guest_address:#x}")
    except QmpCommandError:
        return None
    match = _HOST_ADDRESS.search(answer)
    return int(match[1], 16) - seen.offset if match is not None else None


def read_maps(pid: int) -> list[Mapping]:
    """The mappings of a process, ascending.

    Raises:
        VmmGoneError: it has ended.
    """
    try:
        text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmmGoneError(f"QEMU (process {pid}) has ended") from error
    except OSError as error:
        raise VmmError(
            f"the memory map of QEMU (process {pid}) cannot be read ({error.strerror}); run the daemon as root or as "
            "QEMU's user"
        ) from error
    return [_mapping(line) for line in text.splitlines()]


def _mapping(line: str) -> Mapping:
    span, permissions, offset, device, inode, *path = line.split(maxsplit=5)
    begin, end = span.split("-")
    return Mapping(
        int(begin, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), path[0] if path else ""
    )


def place(block: RamBlock, address: int | None, maps: Sequence[Mapping]) -> RamBlock:
    """Put a block at an address, if all of it is mapped there, and as one thing."""
    if address is None:
        return block
    first: Mapping | None = None
    reached = address
    for mapping in maps:
        if mapping.begin <= reached < mapping.end:
            if first is None:
                first = mapping
            elif (mapping.device, mapping.inode, mapping.permissions) != (first.device, first.inode, first.permissions):
                return block
            reached = mapping.end
            if reached >= address + block.size:
                return replace(block, address=address, mapping=first)
    return block


def by_size(blocks: Sequence[RamBlock], maps: Sequence[Mapping]) -> list[RamBlock]:
    """Find blocks that the guest does not see by their size, where only one mapping can be meant."""
    taken = {block.address for block in blocks if block.address is not None}
    guarded = [
        mapping.begin
        for mapping, behind in pairwise(maps)
        if mapping.permissions == "rw-p"
        and mapping.inode == 0
        and behind.begin == mapping.end
        and behind.permissions == "---p"
        and behind.end - behind.begin == PAGE_SIZE
        and mapping.begin not in taken
    ]
    sizes = {mapping.begin: mapping.end - mapping.begin for mapping in maps}
    missing = [block for block in blocks if block.address is None]
    result = []
    for block in blocks:
        candidates = [begin for begin in guarded if sizes[begin] == block.size]
        rivals = [other for other in missing if other.size == block.size]
        if block.address is None and len(candidates) == len(rivals) == 1:
            result.append(place(block, candidates[0], maps))
        else:
            result.append(block)
    return result


def arrange(blocks: Sequence[RamBlock]) -> Ram:
    """Put blocks into the order in which their pages are numbered."""
    order = {"main": 0, "device": 1, "firmware": 2}
    travelling = sorted(
        (block for block in blocks if block.role != "rebuilt"),
        key=lambda block: (order[block.role], block.guest_address if block.role == "main" else 0, block.name),
    )
    carried, lost, first_page = [], [], 0
    for block in travelling:
        if block.address is None or block.mapping is None:
            lost.append(block)
            continue
        carried.append(Carried(block, block.address, block.mapping, first_page))
        first_page += block.pages
    return Ram(tuple(carried), tuple(block for block in blocks if block.role == "rebuilt"), tuple(lost))
