"""A program on a pseudo-terminal, and somebody who types at it and reads what it shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

ROWS, COLUMNS = 50, 250
"""Wide enough that no line of a test is broken."""
PATIENCE_S = 60.0
_CONTROL = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>]|\][^\x07]*\x07)|\x07|\r")


class Terminal:
    """Start a program on a terminal of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._screen, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        try:
            self._process = subprocess.Popen(
                command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                env={**os.environ, "TERM": "dumb", **(environment or {})},
            )  # fmt: skip
        finally:
            os.close(theirs)
        self._unread = ""

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._screen, keys.encode())

    def read_until(self, pattern: str) -> str:
        """Wait for the next match of a pattern. Returns the output up to its end.

        Raises:
            AssertionError: it does not come.
        """
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self._unread, re.DOTALL)) is None:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
            data = b""
            if ready:
                with contextlib.suppress(OSError):  # EIO: the program has ended
                    data = os.read(self._screen, 1 << 16)
            assert data, f"{pattern!r} does not come; what came is {self._unread!r}"
            self._unread += _CONTROL.sub("", data.decode(errors="replace"))
        text, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return text

    def wait(self) -> int:
        """Wait until the program has ended. Returns its exit status."""
        return self._process.wait(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._screen)
