"""Processes that track another process and are killed in the middle of it, each somewhere else.

    test --"at 7 before"--> parent --fork--> injector: killed before its 7th request to the kernel, or done
         --"loop"---------> parent --fork--> injector: tracks again and again until the test kills it

They are forked from one process that has imported everything: an interpreter of its own would take each of them longer
than all that it does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal, Self

from migrated.kernel import ptrace
from migrated.kernel.tracking import AddressRange, start_tracking
from scripts.basics import ROOT

When = Literal["before", "after"]


class Injectors:
    """One injector after the other, of one process.

    Args:
        pid: of the process that is tracked.
        spans: its memory that is; without any, nothing but the descriptor is made in it.
    """

    def __init__(self, pid: int, spans: Sequence[AddressRange] = ()) -> None:
        numbers = [pid, *(number for span in spans for number in span)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.migrated.injectors", *map(str, numbers)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _hear(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def track_once(self, kill_at: int = 0, when: When = "before") -> int | None:
        """Track once. Returns how many requests to the kernel that took, None when the injector was killed.

        Args:
            kill_at: the request, from 1, at which the injector is killed; 0 for none.
            when: whether that request is not made any more, or just was.
        """
        self._tell(f"at {kill_at} {when}")
        made = self._hear()
        assert made >= 0 or made == -signal.SIGKILL
        return made if made >= 0 else None

    def begin_loop(self) -> int:
        """Begin to track again and again. Returns the injector's process."""
        self._tell("loop")
        return self._hear()

    def end_loop(self, injector: int) -> None:
        """Kill the injector, wherever it is, and wait for its end."""
        os.kill(injector, signal.SIGKILL)
        assert self._hear() == -signal.SIGKILL


def _track_once(pid: int, spans: list[AddressRange], kill_at: int, when: str) -> int:
    """Track once; die at one of the requests. Returns how many there were."""
    original, made = ptrace.TracedThread._request, 0

    def request(self: ptrace.TracedThread, *arguments: Any) -> None:
        nonlocal made
        made += 1
        if made == kill_at and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *arguments)
        if made == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    ptrace.TracedThread._request = request  # type: ignore[assignment, method-assign]
    start_tracking(pid, spans).close()
    return made


def main() -> None:
    """Fork the injectors that are asked for, until the input ends. Each one's exit status is printed: the number of its
    requests, or the signal that killed it."""
    pid, *numbers = map(int, sys.argv[1:])
    spans = list(zip(numbers[::2], numbers[1::2], strict=True))
    for line in sys.stdin:
        what, *arguments = line.split()
        child = os.fork()
        if child == 0 and what == "at":
            os._exit(_track_once(pid, spans, int(arguments[0]), arguments[1]))
        if child == 0:
            print(os.getpid(), flush=True)  # noqa: T201 - it begins
            while True:
                start_tracking(pid, spans).close()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201 - to the test


if __name__ == "__main__":
    main()
