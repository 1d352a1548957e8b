"""The ownership lock: whoever may run a guest holds an exclusive lock on the guest's identity.

The VMM's process holds it, so that it lasts as long as the guest can run, whatever becomes of a daemon. On a directory
that both hosts share it fences for real.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from vmm_sim.errors import VmmError


class Ownership:
    """The lock of one guest: ``<directory>/<uuid>.lock``. Without a directory it is always held."""

    def __init__(self, directory: Path | None, uuid: str) -> None:
        self._path = None if directory is None else directory / f"{uuid}.lock"
        self._fd = -1

    @property
    def held(self) -> bool:
        """True when this process holds the lock, or there is none to hold."""
        return self._path is None or self._fd >= 0

    def take(self) -> None:
        """Take the lock; nothing happens when it is held.

        Raises VmmError: LockHeld, or LockUnusable when the directory cannot be used.
        """
        if self.held or self._path is None:
            return
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise VmmError("LockUnusable", f"The lock {self._path} cannot be opened: {error.strerror}.") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise VmmError(
                "LockHeld", f"Another VMM holds the lock {self._path} of this guest: it must let go first."
            ) from error
        self._fd = fd

    def release(self) -> None:
        """Let go of the lock; nothing happens when it is not held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
