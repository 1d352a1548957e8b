"""The ownership lock of a QEMU guest: an flock on a file that QEMU, which knows nothing of it, keeps open for us.

The lock belongs to the open file: it holds for as long as one process has a copy of the descriptor. We take it, hand
QEMU a copy and close ours, so that it lasts as long as QEMU lives, whatever becomes of us; QEMU drops it when asked.
The file carries the fencing token, which we write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from migrated.base.errors import VmmError
from migrated.vmm.qemu.qmp import Qmp, QmpCommandError
from migrated.vmm.seam import OwnershipLock
from protocol.fencing import FILE_BYTES, StaleTokenError, advance

_NAME: Final = "migrated-ownership"


class QemuLock(OwnershipLock):
    """The lock of one guest.

    Args:
        qmp: the monitor of its QEMU.
        path: the file, ``UUID.lock`` in a directory that both hosts share.
    """

    def __init__(self, qmp: Qmp, path: Path) -> None:
        self._qmp = qmp
        self._path = path
        self._held = False

    async def take(self) -> None:
        if self._held:
            await self.carry()
            return
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(fd)  # not flushed to the disk: the guest stands still
            await self._qmp.pass_descriptor(_NAME, fd)
        except BlockingIOError as error:
            if not self._open_in_qemu():
                raise VmmError(f"another VMM holds the ownership lock {self._path}: it must let go first") from error
            self._write(fd)
        except OSError as error:
            raise VmmError(f"the ownership lock {self._path} cannot be taken: {error.strerror}") from error
        finally:
            os.close(fd)
        self._held = True

    async def carry(self) -> None:
        if self.token is not None and (self._held or self._open_in_qemu()):
            fd = self._open()
            try:
                self._write(fd)
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise VmmError(f"the ownership lock {self._path} cannot be opened: {error.strerror}") from error

    def _write(self, fd: int) -> None:
        """Write the token into the file of a lock that QEMU holds, or that we hold for it."""
        if self.token is None:
            return
        try:
            content = advance(os.pread(fd, FILE_BYTES + 1, 0), self.token)
            if content is not None:
                os.pwrite(fd, content, 0)
        except StaleTokenError as error:
            raise VmmError(f"the ownership lock {self._path} cannot be had. {error}") from error
        except OSError as error:
            raise VmmError(f"the ownership lock {self._path} cannot be written: {error.strerror}") from error

    def _open_in_qemu(self) -> bool:
        """Whether QEMU has it open: an earlier daemon gave it a copy."""
        try:
            links = list(Path(f"/proc/{self._qmp.pid}/fd").iterdir())
            return any(os.path.samestat(link.stat(), self._path.stat()) for link in links if link.exists())
        except OSError:
            return False

    async def release(self) -> None:
        with contextlib.suppress(QmpCommandError):  # it has none
            await self._qmp.call("closefd", fdname=_NAME)
        self._held = False
