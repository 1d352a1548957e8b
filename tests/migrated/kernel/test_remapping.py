"""A memory file that another process has mapped is made private to it, and shared again with what it wrote meanwhile.

child   shared | private: reads ours, its writes are its own | shared: its writes are in the file, the old ones too
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from migrated.kernel.errors import InjectionError
from migrated.kernel.remapping import FileRange, Remapping

PAGE = 4096
PAGES = 2048
_CHILD = """
import ctypes, mmap, sys
memory = mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    page, value = map(int, line.split())
    if value >= 0:
        memory[page * 4096] = value
    print(memory[page * 4096], flush=True)
"""


class Child:
    """A process that has a memory file mapped. It reads and writes first bytes of pages when it is told to."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("memory")
        os.ftruncate(self.fd, PAGES * PAGE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(self.fd), str(PAGES * PAGE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[self.fd],
        )  # fmt: skip
        self.address = int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, page: int, value: int = -1) -> int:
        """Let it write to a page unless ``value`` is negative. Returns what it reads there then."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{page} {value}\n")
        self.process.stdin.flush()
        return int(self._answer())

    def in_file(self, page: int) -> int:
        """What the file has there."""
        return os.pread(self.fd, 1, page * PAGE)[0]

    def range(self) -> FileRange:
        """Its mapping, with a descriptor that the caller hands on."""
        return FileRange(self.address, PAGES * PAGE, os.dup(self.fd))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.fd)


@pytest.fixture
def child() -> Iterator[Child]:
    if os.geteuid() != 0:
        pytest.skip("only root may be sure to trace another process")
    made = Child()
    yield made
    made.end()


def test_what_a_process_writes_privately_reaches_the_file_when_it_is_shared(child: Child) -> None:
    assert child.tell(7, 70) == child.in_file(7) == 70
    mapped = Remapping(child.process.pid, [child.range()])
    mapped.map_privately()
    assert child.tell(7) == 70
    assert (child.tell(7, 71), child.in_file(7)) == (71, 70)
    assert (child.tell(PAGES - 1, 9), child.in_file(PAGES - 1)) == (9, 0)
    os.pwrite(child.fd, bytes([5]), 8 * PAGE)
    assert child.tell(8) == 5  # what others write is seen
    mapped.share()
    assert [child.in_file(page) for page in (7, 8, PAGES - 1)] == [71, 5, 9]
    assert child.tell(7, 72) == child.in_file(7) == 72
    mapped.share()  # does no harm
    assert child.tell(7) == child.in_file(7) == 72
    mapped.close()


def test_a_process_that_ends_while_its_mapping_is_private_has_changed_nothing(child: Child) -> None:
    child.tell(3, 30)
    mapped = Remapping(child.process.pid, [child.range()])
    mapped.map_privately()
    assert child.tell(3, 31) == 31
    child.process.kill()
    child.process.wait()
    assert child.in_file(3) == 30
    with pytest.raises((InjectionError, OSError)):
        mapped.share()
    mapped.close()
    assert child.in_file(3) == 30


def test_what_was_in_the_file_before_can_be_put_back(child: Child) -> None:
    """The process was to go on with the memory and ended before it did: whoever had it first finds it as it was."""
    child.tell(3, 30)
    mapped = Remapping(child.process.pid, [child.range()])
    mapped.map_privately()
    child.tell(3, 31)
    child.tell(900, 9)
    mapped.share()
    child.tell(3, 32)
    mapped.share()  # a second try
    assert [child.in_file(page) for page in (3, 900)] == [32, 9]
    child.process.kill()
    child.process.wait()
    mapped.put_back()
    assert [child.in_file(page) for page in (3, 900)] == [30, 0]
    os.pwrite(child.fd, bytes([33]), 3 * PAGE)
    mapped.put_back()  # once is all
    assert child.in_file(3) == 33
    mapped.close()


def test_a_file_that_a_process_does_not_have_is_refused(child: Child) -> None:
    stranger = os.memfd_create("stranger")
    with pytest.raises(InjectionError, match="does not have its memory file open"):
        Remapping(child.process.pid, [FileRange(child.address, PAGE, stranger)])
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(stranger)  # it was the mapping's to close
