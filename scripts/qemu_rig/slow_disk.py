"""A disk whose reads past the page cache stay in flight for long, for the processes that are to see it so.

    reading process   preadv(O_DIRECT)  pages pinned ........ waits here ........ data lands without a fault | done
    kernel                                      blkio throttle of its cgroup

The kernel delays the request below the file system, when its memory is pinned already: that is what a slow disk does,
and what a limit inside QEMU, which holds requests back before they are submitted, does not. It takes the blkio
controller of cgroup version 1 and root.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from scripts.rig.waiting import RigError

_CONTROLLER: Final = Path("/sys/fs/cgroup/blkio")
_LEAVE_TIMEOUT_S: Final = 10.0


class SlowDisk:
    """A cgroup whose processes and threads read slowly from one device."""

    def __init__(self, group: Path, device: str) -> None:
        self._group = group
        self._device = device

    def hold_process(self, pid: int) -> None:
        """From here on all threads of a process read slowly."""
        (self._group / "cgroup.procs").write_text(f"{pid}")

    def hold_thread(self, thread_id: int) -> None:
        """From here on one thread reads slowly."""
        (self._group / "tasks").write_text(f"{thread_id}")

    def set_rate(self, bytes_per_s: int) -> None:
        """How fast they may read, all together; 0 is as fast as it goes."""
        (self._group / "blkio.throttle.read_bps_device").write_text(f"{self._device} {bytes_per_s}")


@contextlib.contextmanager
def slow_disk(path: Path, bytes_per_s: int) -> Iterator[SlowDisk]:
    """Slow the device that a file is on down, for those who are held. All of them are let go at the end.

    Raises:
        RigError: this machine cannot; the sentence says what it lacks.
    """
    device = _whole_device(path)
    try:
        group = Path(tempfile.mkdtemp(prefix="slow-disk-", dir=_CONTROLLER))
        disk = SlowDisk(group, device)
        disk.set_rate(bytes_per_s)
    except OSError as error:
        raise RigError(
            f"The reads of {path} cannot be slowed down: that takes the blkio controller of cgroup version 1 at "
            f"{_CONTROLLER}, and root ({error.strerror})."
        ) from error
    try:
        yield disk
    finally:
        disk.set_rate(0)
        _remove(group)


def _whole_device(path: Path) -> str:
    """MAJOR:MINOR of the device below a file: limits are on whole devices, not on partitions."""
    number = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        raise RigError(f"{path} is not on a block device, so there is no disk that could be slow.")
    whole = entry.resolve()
    if (whole / "partition").exists():
        whole = whole.parent
    return (whole / "dev").read_text().strip()


def _remove(group: Path) -> None:
    """Send everyone back to the group above, and remove this one. A thread that has ended needs no sending."""
    deadline = time.monotonic() + _LEAVE_TIMEOUT_S
    while True:
        for thread_id in (group / "tasks").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (group.parent / "tasks").write_text(thread_id)
        try:
            group.rmdir()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RigError(f"The cgroup {group} cannot be removed: {error.strerror}.") from error
