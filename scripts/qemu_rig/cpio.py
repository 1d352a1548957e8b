"""An initramfs as Linux unpacks it: a cpio archive of the kind "newc" (Documentation/driver-api/early-userspace)."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import Final

_MAGIC: Final = b"070701"
_END: Final = "TRAILER!!!"
_ALIGNMENT: Final = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or device node. ``mode`` holds type and permissions; ``device`` is (major, minor)."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    """A directory that everyone may read."""
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, content: bytes) -> Entry:
    """A file that may be executed."""
    return Entry(name, stat.S_IFREG | 0o755, content)


def file(name: str, content: bytes) -> Entry:
    """An ordinary file."""
    return Entry(name, stat.S_IFREG | 0o644, content)


def character_device(name: str, major: int, minor: int) -> Entry:
    """A device node, for root only."""
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: list[Entry]) -> bytes:
    """All entries as one archive. A directory has to come before what is in it."""
    return b"".join(_packed(number, entry) for number, entry in enumerate([*entries, Entry(_END, 0)], 1))


def _packed(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    owner = group = modified = file_system = checksum = 0
    links = 1
    fields = (
        inode, entry.mode, owner, group, links, modified, len(entry.content), file_system, file_system,
        *entry.device, len(name), checksum,
    )  # fmt: skip
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
