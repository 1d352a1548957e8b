"""Memory of another process, as the kernel gives it to us: compared with what that process was told to hold.

child   | zero | noise(seed) | hole | noise |     <- read and written in spans of any size, by any number of calls
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrated.kernel import pagemap, process_memory
from migrated.kernel.process_memory import UnmappedError

PAGES = 64
SIZE = PAGES * 4096
HOLE = 40 * 4096
"""Where the child's memory has a gap of one page that is not mapped."""

_CHILD = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.CDLL(None).munmap(ctypes.c_void_p(address + {hole}), 4096)
print(address, flush=True)
sys.stdin.read()
"""


class Child:
    """A process with some memory of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(size=SIZE, hole=HOLE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    made = Child()
    yield made
    made.end()


def spans_of(child: Child, rows: list[tuple[int, int]]) -> process_memory.Spans:
    table = np.array(rows, np.uint64).reshape(-1, 2)
    table[:, 0] += np.uint64(child.address)
    return table


pieces = st.lists(st.tuples(st.integers(0, HOLE - 1), st.integers(0, 9000)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(written=pieces, read=pieces, seed=st.integers(0, 1000))
def test_what_is_written_is_what_is_read(
    child: Child, written: list[tuple[int, int]], read: list[tuple[int, int]], seed: int
) -> None:
    truth = np.zeros(HOLE, np.uint8)
    process_memory.write(child.pid, spans_of(child, [(0, HOLE)]), truth)
    generator = np.random.default_rng(seed)
    rows = [(start, min(count, HOLE - start)) for start, count in written]
    data = generator.integers(0, 256, sum(count for _, count in rows), np.uint8)
    process_memory.write(child.pid, spans_of(child, rows), data)
    done = 0
    for start, count in rows:
        truth[start : start + count] = data[done : done + count]
        done += count
    wanted = [(start, min(count, HOLE - start)) for start, count in read]
    got = np.empty(sum(count for _, count in wanted), np.uint8)
    process_memory.read(child.pid, spans_of(child, wanted), got)
    expected = [truth[start : start + count] for start, count in wanted]
    assert got.tobytes() == (np.concatenate(expected).tobytes() if expected else b"")


def test_more_spans_than_one_call_takes_arrive_in_order(child: Child) -> None:
    count = 3 * process_memory.MOST_SPANS + 5
    numbers = np.arange(count, dtype=np.uint64)
    places = np.random.default_rng(1).permutation(HOLE // 8)[:count] * 8
    spans = spans_of(child, [(int(place), 8) for place in places])
    process_memory.write(child.pid, spans, numbers)
    back = np.zeros(count, np.uint64)
    process_memory.read(child.pid, spans, back)
    assert back.tolist() == numbers.tolist()


@pytest.mark.parametrize("before", [0, 3, process_memory.MOST_SPANS + 7])
def test_an_unmapped_span_is_named_wherever_it_stands(child: Child, before: int) -> None:
    """The kernel moves what comes before it and says how much; the next call tells the error."""
    rows = [(0, 16)] * before + [(HOLE, 4096), (0, 16)]
    into = np.zeros(16 * (before + 1) + 4096, np.uint8)
    with pytest.raises(UnmappedError) as caught:
        process_memory.read(child.pid, spans_of(child, rows), into)
    assert caught.value.address == child.address + HOLE


def test_a_span_that_runs_into_unmapped_memory_is_told_with_the_address_where_it_stops(child: Child) -> None:
    into = np.zeros(2 * 4096 + 4096, np.uint8)
    with pytest.raises(UnmappedError) as caught:
        process_memory.read(child.pid, spans_of(child, [(HOLE - 2 * 4096, 3 * 4096)]), into)
    assert caught.value.address == child.address + HOLE


def test_a_process_that_ended_is_told(child: Child) -> None:
    other = Child()
    other.end()
    with pytest.raises(ProcessLookupError, match=f"process {other.pid}"):
        process_memory.read(other.pid, spans_of(other, [(0, 8)]), np.zeros(8, np.uint8))


def test_an_array_of_another_size_is_refused(child: Child) -> None:
    with pytest.raises(ValueError, match="8 bytes do not fit an array of 16"):
        process_memory.read(child.pid, spans_of(child, [(0, 8)]), np.zeros(16, np.uint8))


def test_a_scan_tells_which_pages_of_another_process_hold_something() -> None:
    other = Child()
    try:
        process_memory.write(other.pid, spans_of(other, [(4096, 1), (5 * 4096, 3 * 4096)]), np.ones(12289, np.uint8))
        fd = os.open(f"/proc/{other.pid}/pagemap", os.O_RDONLY)
        try:
            found = pagemap.scan(
                fd, other.address, other.address + SIZE, pagemap.make_vector(1),
                any_of=pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_SWAPPED, returned=pagemap.PAGE_IS_PRESENT,
            )  # fmt: skip
        except OSError as error:
            pytest.skip(f"this kernel has no PAGEMAP_SCAN: {error}")
        finally:
            os.close(fd)
        pages = ((found - np.uint64(other.address)) // np.uint64(4096)).tolist()
        assert pages == [[1, 2], [5, 8]]
    finally:
        other.end()
