"""Starting a VMM process that outlives the daemon, and making sure that one is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from migrated.base.errors import VmmError

_LOOK_AGAIN_S: Final = 0.01


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def start_process(command: list[str], log_path: Path, inherited: Sequence[int] = ()) -> int:
    """Start a VMM in a session of its own, its output appended to ``log_path``. Returns its process id.

    The process does not depend on the daemon; while the daemon lives it is its child and must be reaped (``reap``).

    Args:
        inherited: descriptors that it gets, under the same numbers.
    """
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log_path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited),  # to itself: the one it has is not closed at the start
    ]
    try:
        return os.posix_spawnp(command[0], command, os.environ, file_actions=actions, setsid=True)
    except OSError as error:
        raise VmmError(
            f"the VMM cannot be started: {command[0]}: {error.strerror}; install it, or name another program"
        ) from error


def reap(pid: int) -> bool:
    """Collect a child that ended. Returns whether the process is known to have ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # not our child: it was started before this daemon
        return False


async def reap_within(pid: int, timeout_s: float) -> bool:
    """Collect a child that has ended, or ends within ``timeout_s`` (0: look once). Returns whether it has."""
    deadline = time.monotonic() + timeout_s
    while not reap(pid):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_LOOK_AGAIN_S)
    return True


def last_lines(path: Path, count: int = 3) -> str:
    """The end of a VMM's log, for an error sentence."""
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " | ".join(lines[-count:])


async def make_sure_gone(pid: int, timeout_s: float) -> bool:
    """Kill a process if it still runs and wait until it is gone. Returns False when it does not go in time.

    The process is identified by a pidfd taken here, so a reused number cannot be hit while we wait.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    loop = asyncio.get_running_loop()
    gone = loop.create_future()
    try:
        loop.add_reader(pidfd, _set, gone)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return True
        try:
            await asyncio.wait_for(gone, timeout_s)
        except TimeoutError:
            return False
        reap(pid)
        return True
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
