"""The processes of the guests of this host, noted while the daemon lives: the next one of the same boot knows by that
which of them have ended meanwhile. A guest that it merely does not find may run on: its socket may be gone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from migrated.kernel.processes import pid_namespace, started_at
from migrated.state.whole_files import replace_file

log = structlog.get_logger()

FILE_NAME: Final = "guest-processes.json"


class _Process(BaseModel):
    """One process: its number, and when it was started (``started_at``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    started: int


class _Notes(BaseModel):
    """What the file holds. Numbers of processes are compared only in one boot and one namespace."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    boot: str
    namespace: str
    guests: dict[str, _Process] = {}


class GuestProcesses:
    """The notes of one host.

    Args:
        directory: of the daemon's state.
        boot: the kernel's name of this boot.
    """

    def __init__(self, directory: Path, boot: str) -> None:
        self._path = directory / FILE_NAME
        self._none = _Notes(boot=boot, namespace=pid_namespace())
        self._noted = self._read()

    def ended(self) -> set[str]:
        """Guests that were noted and whose process has surely ended."""
        return {name for name, one in self._noted.guests.items() if started_at(one.pid) != one.started}

    def note(self, guests: Mapping[str, int], keep: Collection[str]) -> None:
        """Note the guests that are here. What cannot be written is noted the next time.

        Args:
            guests: the process of each (its number).
            keep: guests that have ended and are still to be known as such.
        """
        found = {name: one for name, one in self._noted.guests.items() if name in keep}
        for name, pid in guests.items():
            if (started := started_at(pid)) is not None:
                found[name] = _Process(pid=pid, started=started)
        notes = self._none.model_copy(update={"guests": found})
        if notes == self._noted:
            return
        try:
            replace_file(self._path, notes.model_dump_json())
        except OSError as error:
            log.warning("the processes of guests cannot be noted", file=str(self._path), reason=error.strerror)
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)  # old notes may be of a process that a guest does not have any more
            notes = self._none
        self._noted = notes

    def _read(self) -> _Notes:
        try:
            notes = _Notes.model_validate(json.loads(self._path.read_bytes()))
        except (OSError, ValueError, ValidationError):
            return self._none
        same = (notes.boot, notes.namespace) == (self._none.boot, self._none.namespace)
        return notes if same else self._none
