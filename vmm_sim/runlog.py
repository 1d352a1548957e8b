"""The run log: when this process' vCPUs ran, in one line per change. The argument that a guest never ran twice at
once rests on these files, so a line is one write, and outlives the process."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Literal


class AlreadyRunningError(Exception):
    """Another live VMM holds this run log."""


class RunLog:
    """Appends to ``<api socket without .sock>.runlog``; holds a lock on it while the process lives, so that two VMMs
    cannot share a socket path."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise AlreadyRunningError(f"A live VMM writes {path}.") from error

    @staticmethod
    def path_for(api_socket: Path) -> Path:
        """The run log that belongs to an API socket."""
        return api_socket.with_suffix(".runlog") if api_socket.suffix == ".sock" else Path(f"{api_socket}.runlog")

    def write(self, event: Literal["run", "stop", "exit"], step: int, epoch: int) -> None:
        """Append one event, stamped with CLOCK_MONOTONIC."""
        entry = {"pid": os.getpid(), "event": event, "monotonic_ns": time.monotonic_ns(), "step": step, "epoch": epoch}
        os.write(self._fd, json.dumps(entry).encode() + b"\n")

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)
