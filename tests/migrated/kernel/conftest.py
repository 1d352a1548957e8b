"""A process to work in: it waits in every way that a main loop waits, computes, takes signals, and notices damage."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.kernel.tracking import AddressRange, why_no_tracking

MEMORY_BYTES = 4 << 20

_TARGET = """
import ctypes, math, mmap, os, select, signal, sys, threading, time

status = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
words = memoryview(status).cast("Q")
memory = mmap.mmap(-1, int(sys.argv[2]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(memory), 4096):
    memory[page] = 1
words[1] = ctypes.addressof(ctypes.c_char.from_buffer(memory))
signals = 0

def on_alarm(number, frame):
    global signals
    signals += 1

signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
reader, writer = os.pipe()
epoll = select.epoll()
epoll.register(reader, select.EPOLLIN)
poll = select.poll()
poll.register(reader, select.POLLIN)
lock = threading.Lock()
lock.acquire()
expected = sum(math.sqrt(n) for n in range(200))
while True:
    begin = time.monotonic()
    time.sleep(0.001)
    assert not poll.poll(1) and not epoll.poll(0.001) and not select.select([reader], [], [], 0.001)[0]
    assert not lock.acquire(timeout=0.001)
    assert time.monotonic() - begin >= 0.004
    assert sum(math.sqrt(n) for n in range(200)) == expected
    os.write(writer, b"x")
    assert poll.poll(1000) and os.read(reader, 10) == b"x"
    words[2] = signals
    words[0] += 1
"""


class Target:
    """The process; ``beats`` counts its rounds, ``span`` is memory of its own."""

    def __init__(self, directory: Path) -> None:
        path = directory / "target"
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 4096)).cast("Q")
        command = [sys.executable, "-c", _TARGET, str(path), str(MEMORY_BYTES)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        self.pid = self.process.pid
        self.beats_again()
        self.span: AddressRange = (self._words[1], MEMORY_BYTES)

    @property
    def signals(self) -> int:
        """How many signals it has handled."""
        return self._words[2]

    def beats_again(self, rounds: int = 2) -> None:
        """Wait until it has gone round some times more; fail with its own words if it died."""
        until = self._words[0] + rounds

        def reached() -> bool:
            if self.process.poll() is not None:
                assert self.process.stderr is not None
                raise AssertionError(f"it ended with {self.process.returncode}: {self.process.stderr.read().decode()}")
            return self._words[0] >= until

        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline, f"the process hangs after {self._words[0]} rounds"
            time.sleep(0.002)

    def userfaultfds(self) -> int:
        """How many userfaultfds it has open."""
        root = f"/proc/{self.pid}/fd"
        return sum("userfaultfd" in os.readlink(f"{root}/{fd}") for fd in os.listdir(root))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    if os.geteuid() != 0:
        pytest.skip("only root may be sure to trace another process")
    if (reason := why_no_tracking()) is not None:
        pytest.skip(reason)
    made = Target(tmp_path)
    yield made
    made.end()
