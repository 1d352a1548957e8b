"""Notes of the saves under way, one small file each: what a restarted daemon must clean up after one that was killed.

    saves/ID.json   from before the guest may be stopped and the unfinished file is made, until both are settled

A note says nothing of how far the save came. That the disk says: the finished file has its name, or it has not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SaveNote:
    """One save.

    Attributes:
        save_id: in hexadecimal; the file has it in its preamble.
        guest: name of the guest.
        part: the unfinished file.
        target: the finished one.
        ends_guest: the guest is ended once the file is safe.
        was_running: the guest ran when the save began.
    """

    save_id: str
    guest: str
    part: str
    target: str
    ends_guest: bool
    was_running: bool


class SaveNotes:
    """The notes of one daemon. Every method may take as long as the disk does: call it in a thread.

    Args:
        directory: the state directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "saves"

    def write(self, note: SaveNote) -> None:
        """Write a note; when this returns it survives a crash of the host.

        Raises:
            OSError: it could not be written: the save must not begin.
        """
        self._directory.mkdir(mode=0o750, exist_ok=True)
        path = self._path(note.save_id)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        content = json.dumps(asdict(note)).encode()
        try:
            if os.write(fd, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, save_id: str) -> None:
        """Forget a save, of which nothing is left to do. Without effect the second time."""
        with contextlib.suppress(FileNotFoundError):
            self._path(save_id).unlink()

    def read(self) -> list[SaveNote]:
        """All notes. One that a crash tore belongs to a save that did not begin, and is removed."""
        found: list[SaveNote] = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                found.append(SaveNote(**json.loads(path.read_bytes())))
            except (ValueError, TypeError) as error:
                log.warning("a torn note of a save is removed", note=str(path), reason=str(error))
                path.unlink(missing_ok=True)
        return found

    def _path(self, save_id: str) -> Path:
        return self._directory / f"{save_id}.json"
