"""The ownership lock: whoever may run a guest holds an exclusive lock on the guest's identity.

The VMM's process holds it, so that it lasts as long as the guest can run, whatever becomes of a daemon. On a directory
that both hosts share it fences for real. In a fleet its file carries a token (``protocol.fencing``) that keeps out a
host that was the owner once.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from protocol.fencing import FILE_BYTES, StaleTokenError, advance
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

    def take(self, token: int | None = None) -> None:
        """Take the lock; one that is held stays so.

        Args:
            token: what the lock shall carry; None where nobody keeps account of tokens.

        Raises VmmError: LockHeld, LockStale when the lock carries a newer token, or LockUnusable when the directory
        cannot be used.
        """
        if self._path is None:
            return
        if self._fd >= 0:
            self.carry(token)
            return
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise VmmError("LockUnusable", f"The lock {self._path} cannot be opened: {error.strerror}.") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(self._path, fd, token)  # not flushed to the disk: the guest stands still
        except OSError as error:
            os.close(fd)
            raise VmmError(
                "LockHeld", f"Another VMM holds the lock {self._path} of this guest: it must let go first."
            ) from error
        except VmmError:
            os.close(fd)
            raise
        self._fd = fd

    def carry(self, token: int | None) -> None:
        """Let the lock carry a token from now on; without effect when it is not held. Raises VmmError as ``take``."""
        if self._path is not None and self._fd >= 0:
            _write(self._path, self._fd, token)
            os.fdatasync(self._fd)

    def release(self) -> None:
        """Let go of the lock; nothing happens when it is not held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write(path: Path, fd: int, token: int | None) -> None:
    """Write a token into the file of a lock that is held. Raises VmmError: LockStale, LockUnusable."""
    if token is None:
        return
    try:
        content = advance(os.pread(fd, FILE_BYTES + 1, 0), token)
        if content is not None:
            os.pwrite(fd, content, 0)
    except StaleTokenError as error:
        raise VmmError("LockStale", f"The lock {path} cannot be had. {error}") from error
    except OSError as error:
        raise VmmError("LockUnusable", f"The lock {path} cannot be written: {error.strerror}.") from error
