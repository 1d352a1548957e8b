"""Threads that run before all others of the host for a short while: those that a guest stands still for.

On a busy host a thread that becomes ready waits for its turn, some milliseconds each time, and a blackout is made of a
hundred such moments. Under a real-time policy it runs at once. That takes CAP_SYS_NICE; without it nothing changes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from types import TracebackType
from typing import ClassVar, Final

SMALL_ROUND_BYTES: Final = 16 << 20
"""A transfer up to this size ends soon enough to go before others on both hosts: tens of milliseconds."""
_PRIORITY: Final = 1
"""The lowest of the real-time priorities: whoever asked for one of his own keeps precedence over us."""
_FIRST: Final = os.SCHED_RR | os.SCHED_RESET_ON_FORK
"""What threads start meanwhile has the usual policy."""


@functools.cache
def may_take_precedence() -> bool:
    """Whether this process may give threads a real-time policy. It is tried on the calling thread, for a moment."""
    before = os.sched_getscheduler(0)
    if before & ~os.SCHED_RESET_ON_FORK != os.SCHED_OTHER:
        return True  # somebody gave this thread one already
    try:
        os.sched_setscheduler(0, _FIRST, os.sched_param(_PRIORITY))
        os.sched_setscheduler(0, before, os.sched_param(0))
    except OSError:
        return False
    return True


class Precedence:
    """A context in which threads that have the usual policy run before everything else that has it. Several may be open
    at once, for the same threads too: a thread is given back its policy at the end of the last.

    Args:
        threads: their ids. One that has ended, has a policy of its own or may not be touched is left out.
    """

    _held: ClassVar[dict[int, int]] = {}
    """How many open contexts hold a thread, by its id."""

    def __init__(self, threads: Iterable[int]) -> None:
        self._wanted = threads
        self._threads: list[int] = []

    def __enter__(self) -> None:
        if not may_take_precedence():
            return
        for thread in self._wanted:
            if thread in self._held or _is_usual(thread):
                with contextlib.suppress(OSError):
                    os.sched_setscheduler(thread, _FIRST, os.sched_param(_PRIORITY))
                    self._held[thread] = self._held.get(thread, 0) + 1
                    self._threads.append(thread)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        threads, self._threads = self._threads, []
        for thread in threads:
            self._held[thread] -= 1
            if not self._held[thread]:
                del self._held[thread]
                _give_back(thread)


def give_back_all(pid: int) -> None:
    """Give the threads of a process back the usual policy that a daemon gave precedence to and could not give back,
    because it was killed. Threads with a real-time policy of their own are left alone."""
    for thread in threads_of(pid):
        _give_back(thread)


def threads_of(*pids: int) -> list[int]:
    """The threads of processes; none of one that has ended."""
    found: list[int] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found += map(int, os.listdir(f"/proc/{pid}/task"))
    return found


def _give_back(thread: int) -> None:
    """Give one thread of ours the usual policy, with the nice value that it had."""
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(thread) == _FIRST and os.sched_getparam(thread).sched_priority == _PRIORITY:
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _is_usual(thread: int) -> bool:
    try:
        return os.sched_getscheduler(thread) == os.SCHED_OTHER
    except OSError:
        return False
