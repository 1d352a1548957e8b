"""The lines of the guest's two serial ports, each with the time at which the host received it.

    /BEATS     b SEQUENCE CLOCK_NS          one a millisecond
    /CONSOLE   READY, BAD, CHECKED ...      and commands go in

One thread reads both, so that arrival times are those of the lines and not of whoever looks at them. Arrival is on the
host's monotonic clock, in nanoseconds: what was said later never has an earlier time, whichever of several QEMUs said
it. A silence that is seen here is at least as long as the one in the guest less the way through QEMU.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from migrated.kernel.scheduling import Precedence
from scripts.rig.waiting import RigError

_BEAT: Final = re.compile(r"b (\d+) (\d+)")
_CONNECT_PAUSE_S: Final = 0.01
_READ_BYTES: Final = 65536
_CREDENTIALS: Final = struct.Struct("3i")
"""Process, user and group of a peer."""
CONNECT_TIMEOUT_S: Final = 20.0
ANSWER_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Beat:
    """One beat: its number, the guest's clock, and when the host had it."""

    sequence: int
    guest_ns: int
    arrival_ns: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the console, and when the host had it."""

    text: str
    arrival_ns: int


class Console:
    """Both serial ports of one QEMU, read from when this is entered until it is left.

    Without ``beats_path`` beats come on the console.
    """

    def __init__(
        self, console_path: Path, beats_path: Path | None = None, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        self._name = console_path.parent.name
        self._changed = threading.Condition()
        self._beats: list[Beat] = []
        self._lines: list[Line] = []
        self._ended = False
        self._console = _connected(console_path, timeout_s)
        try:
            self._sockets = [self._console, *([_connected(beats_path, timeout_s)] if beats_path else [])]
        except RigError:
            self._console.close()
            raise
        credentials = self._console.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid: int = _CREDENTIALS.unpack(credentials)[0]
        """The QEMU that is on the other end."""
        self._wake = os.pipe()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, once all that has arrived is read. It stays."""
        os.close(self._wake[1])
        self._reader.join()
        os.close(self._wake[0])
        for connection in self._sockets:
            connection.close()

    # Section: what was read

    @property
    def ended(self) -> bool:
        """Whether QEMU has ended, and all that it said was read."""
        with self._changed:
            return self._ended

    def beats(self) -> list[Beat]:
        """All beats until now, in the order of their arrival."""
        with self._changed:
            return list(self._beats)

    def lines(self) -> list[Line]:
        """All other lines until now."""
        with self._changed:
            return list(self._lines)

    def complaints(self) -> list[str]:
        """Lines in which the guest says that something is wrong: a bad page, a failure, a kernel that panics."""
        return [line.text for line in self.lines() if re.match(r"BAD|FAILED|.*Kernel panic", line.text)]

    # Section: waiting and asking

    def wait_for(self, pattern: str, timeout_s: float, after: int = 0) -> re.Match[str]:
        """The first line from the ``after``-th on that begins with ``pattern``.

        Raises:
            RigError: there was none in time, or QEMU closed the console.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self._lines[after:]:
                    if found := re.match(pattern, line.text):
                        return found
                after = len(self._lines)
                self._wait_until(deadline, f"a line {pattern!r} on its console")

    def wait_for_beats(self, count: int, timeout_s: float) -> None:
        """Wait for so many beats more than there are now.

        Raises:
            RigError: they did not come in time, or QEMU closed the console.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            wanted = len(self._beats) + count
            while len(self._beats) < wanted:
                self._wait_until(deadline, f"{count} beats")

    def ask(self, command: str, answer: str, timeout_s: float = ANSWER_TIMEOUT_S) -> re.Match[str]:
        """Send a command and wait for the line that answers it."""
        before = len(self.lines())
        self.tell(command)
        return self.wait_for(answer, timeout_s, before)

    def tell(self, command: str) -> None:
        """Send a command that has no answer."""
        self._console.sendall(command.encode() + b"\n")

    def check(self, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Have every page checked now. Returns how many were wrong."""
        return int(self.ask("check", r"CHECKED pages \d+ bad (\d+)", timeout_s)[1])

    def status(self) -> dict[str, int]:
        """Ask for the guest's counters: pages written, checked and bad, disk reads, log records."""
        numbers = self.ask("status", r"STATUS (.*)")[1].split()
        return {name: int(number) for name, number in zip(numbers[::2], numbers[1::2], strict=True)}

    def page_address(self, page: int) -> int:
        """The guest-physical address of one of its pages."""
        return int(self.ask(f"where {page}", rf"PAGE {page} at (\d+)")[1])

    # Section: the reading thread

    def _wait_until(self, deadline: float, what: str) -> None:
        """With the lock held: until something came, or it is too late."""
        left = deadline - time.monotonic()
        if self._ended or left <= 0:
            last = "; ".join(line.text for line in self._lines[-5:]) or "nothing"
            why = "QEMU ended" if self._ended else "it did not come in time"
            raise RigError(
                f"The guest of QEMU {self._name!r} was expected to give {what}, but {why}. It said last: {last}."
            )
        self._changed.wait(left)

    def _read(self) -> None:
        # On a busy host a line would be taken for one that was said later.
        with Precedence([threading.get_native_id()]):
            self._read_first()

    def _read_first(self) -> None:
        rests = dict.fromkeys(self._sockets, b"")
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[0], selectors.EVENT_READ)
            for connection in self._sockets:
                selector.register(connection, selectors.EVENT_READ, connection)
            while rests:
                ready: list[socket.socket] = [key.data for key, _ in selector.select() if key.data]
                if not ready:
                    return  # woken to end, and all that had come is read
                for connection in ready:
                    data = _received(connection)
                    arrival_ns = time.monotonic_ns()
                    *whole, rest = (rests[connection] + data).split(b"\n")
                    self._take([line.decode(errors="replace").strip() for line in whole], arrival_ns)
                    rests[connection] = rest
                    if not data:
                        selector.unregister(connection)
                        del rests[connection]
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, lines: list[str], arrival_ns: int) -> None:
        with self._changed:
            for text in lines:
                if beat := _BEAT.fullmatch(text):
                    self._beats.append(Beat(int(beat[1]), int(beat[2]), arrival_ns))
                elif text:
                    self._lines.append(Line(text, arrival_ns))
            self._changed.notify_all()


def _received(connection: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(_READ_BYTES)
    return b""


def _connected(path: Path, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise RigError(f"No QEMU serves a serial port at {path}.") from None
            time.sleep(_CONNECT_PAUSE_S)
