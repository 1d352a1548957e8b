"""The daemon's own word on which guests ran here in which epoch: what a restarted daemon that finds no VMM goes by.

    {"guest": "g1", "epoch": 3, "ran": true}      written before the VMM is asked to run the guest at this place
    {"guest": "g1", "epoch": 3, "ran": false}     the VMM said that it never did

One appended line for each mark, in the state directory. A VMM that keeps such a log itself knows better: the daemon's
mark counts where there is none. A last line that a crash tore belongs to a guest that was not run, and is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Final

from migrated.kernel.files import make_room

KEPT_MARKS: Final = 2000
"""Marks that are kept, the newest ones; a mark is asked for only while its attempt is open."""
_MORE_LINES: Final = 8000
"""Lines beyond those after which the file is rewritten."""
_ROOM_BYTES: Final = 1 << 14
"""Room that there must be when an attempt begins, for the marks of a hundred at once."""


class RunMarkError(Exception):
    """A mark could not be written: the guest must not be run on the strength of it."""


class RunMarks:
    """The marks of one daemon.

    Args:
        directory: the state directory, which exists.

    Raises:
        RunMarkError: the marks cannot be read or opened for writing.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "run-marks"
        self._marks: dict[tuple[str, int], bool] = {}
        self._lines = 0
        try:
            self._read()
            self._fd = self._rewritten()
        except OSError as error:
            raise RunMarkError(f"the run marks {self._path} cannot be opened: {error.strerror}") from error

    def ran(self, guest: str, epoch: int) -> bool:
        """Whether the guest at this place was run in this epoch, or was about to be."""
        return self._marks.get((guest, epoch), False)

    def write(self, guest: str, epoch: int) -> None:
        """Write that the guest runs here in this epoch. When this returns it survives a kill of the daemon.

        Raises:
            RunMarkError: it could not be written.
        """
        if not self.ran(guest, epoch):
            self._append(guest, epoch, ran=True)

    def make_room(self) -> None:
        """Set room for marks aside, before an attempt begins: a disk that becomes full must not keep its guest from
        running.

        Raises:
            RunMarkError: there is none.
        """
        try:
            make_room(self._fd, _ROOM_BYTES)
        except OSError as error:
            raise RunMarkError(
                f"the run marks {self._path} have no room for another attempt: {error.strerror}; free some on its disk"
            ) from error

    def withdraw(self, guest: str, epoch: int) -> None:
        """Write that the guest did not run here in this epoch after all.

        Raises:
            RunMarkError: it could not be written; the mark stands.
        """
        if self.ran(guest, epoch):
            self._append(guest, epoch, ran=False)

    def tidy(self) -> None:
        """Rewrite the file if much of it is not kept any more; call it while no guest waits to be run. It takes some
        milliseconds. What cannot be rewritten goes on to grow."""
        if self._fd >= 0 and self._lines > KEPT_MARKS + _MORE_LINES:
            with contextlib.suppress(OSError):
                fd = self._rewritten()
                os.close(self._fd)
                self._fd = fd
                make_room(fd, _ROOM_BYTES)  # for the attempts under way

    def close(self) -> None:
        """Close the file; without effect the second time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, guest: str, epoch: int, *, ran: bool) -> None:
        line = _line(guest, epoch, ran)
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise RunMarkError(f"the run marks {self._path} cannot be written: {error.strerror}") from error
        if written != len(line):
            with contextlib.suppress(OSError):
                os.write(self._fd, b"\n")  # so that the next mark begins on a line of its own
            raise RunMarkError(f"the run marks {self._path} took only a part of a line: the disk is full")
        self._lines += 1
        self._keep(guest, epoch, ran)

    def _keep(self, guest: str, epoch: int, ran: bool) -> None:
        self._marks.pop((guest, epoch), None)
        self._marks[guest, epoch] = ran
        while len(self._marks) > KEPT_MARKS:
            del self._marks[next(iter(self._marks))]

    def _read(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self._keep(str(entry["guest"]), int(entry["epoch"]), bool(entry["ran"]))

    def _rewritten(self) -> int:
        """Leave out what is not kept. Returns the file, open for appending."""
        temporary = self._path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640), "wb") as file:
            file.writelines(_line(*key, ran) for key, ran in self._marks.items())
        fd = os.open(temporary, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            temporary.replace(self._path)
        except OSError:
            os.close(fd)
            raise
        self._lines = len(self._marks)
        return fd


def _line(guest: str, epoch: int, ran: bool) -> bytes:
    return json.dumps({"guest": guest, "epoch": epoch, "ran": ran}, separators=(",", ":")).encode() + b"\n"
