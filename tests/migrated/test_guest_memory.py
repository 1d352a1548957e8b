"""Every kind of guest memory beside the truth: what is written through one call is what any other reads.

mapped     two files, one of them with a region in its middle     | 0 .. 40 | 40 .. 64 |
process    two pieces of a child's private memory, in the wrong order of its address space
mixed      one of each
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrated.base.errors import VmmError, VmmGoneError
from migrated.kernel import pagemap
from migrated.vmm.memory import (
    WORDS_PER_PAGE,
    FileRegion,
    GuestMemory,
    MappedMemory,
    MixedMemory,
    ProcessMemory,
    Span,
    Words,
)
from protocol.guest import PAGE_SIZE
from protocol.pages import indices_of, runs_of

PAGES = 64
FIRST_PIECE = 40
"""Pages of the first of two pieces."""

_CHILD = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


class Child:
    """A process with ``PAGES`` pages of private memory."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _CHILD.format(size=PAGES * PAGE_SIZE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())

    def memory(self, *, sparse: bool = True) -> ProcessMemory:
        """All of it; the guest's first pages are the child's last ones."""
        rest = PAGES - FIRST_PIECE
        spans = [Span(self.address, rest, FIRST_PIECE), Span(self.address + rest * PAGE_SIZE, FIRST_PIECE, 0)]
        return ProcessMemory("g1", self.process.pid, spans, sparse=sparse)

    def part(self, pages: int) -> ProcessMemory:
        """Some of it, as one span."""
        return ProcessMemory("g1", self.process.pid, [Span(self.address, pages, 0)], sparse=True)

    def end(self) -> None:
        self.process.communicate()


def region(pages: int, offset_pages: int = 0) -> FileRegion:
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, (pages + 2 * offset_pages) * PAGE_SIZE)
    return FileRegion(fd, pages, offset_pages * PAGE_SIZE)


def mapped() -> MappedMemory:
    return MappedMemory([region(FIRST_PIECE), region(PAGES - FIRST_PIECE, 3)])


@pytest.fixture(params=["mapped", "process", "mixed"])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    child = Child()
    made: GuestMemory = mapped()
    if request.param == "process":
        made.release()
        made = child.memory()
    elif request.param == "mixed":
        made.release()
        made = MixedMemory([MappedMemory([region(FIRST_PIECE)]), child.part(PAGES - FIRST_PIECE)])
    yield made
    made.release()
    child.end()


def noise(count: int, seed: int) -> Words:
    return np.random.default_rng(seed).integers(1, 1 << 63, (count, WORDS_PER_PAGE), np.uint64)


pages = st.sets(st.integers(0, PAGES - 1), max_size=PAGES).map(lambda found: np.array(sorted(found), np.int64))
steps = st.lists(st.tuples(st.sampled_from(["write", "write-new", "punch", "clear", "in-place"]), pages), max_size=6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=steps, asked=pages, seed=st.integers(0, 1000))
def test_whatever_is_written_is_read_and_is_among_what_holds_data(
    memory: GuestMemory, changes: list[tuple[str, npt.NDArray[np.int64]]], asked: npt.NDArray[np.int64], seed: int
) -> None:
    everything = np.arange(PAGES)
    truth: Words = np.zeros((PAGES, WORDS_PER_PAGE), np.uint64)
    memory.punch(runs_of(everything))
    for turn, (kind, indices) in enumerate(changes):
        words = noise(len(indices), seed + turn)
        if kind in ("punch", "clear"):
            if kind == "punch":
                memory.punch(runs_of(indices))
            else:
                memory.clear(indices)
            truth[indices] = 0
            continue
        truth[indices] = words
        if kind == "write":
            memory.write(indices, words)
            continue
        done = 0
        for start, count in memory.cut(runs_of(indices)).tolist():
            place = memory.mapped(start, count) if kind == "in-place" else None
            if place is None:
                memory.write_new(start, words[done : done + count])
            else:
                place[:] = words[done : done + count]
            done += count
    got: Words = np.empty((len(asked), WORDS_PER_PAGE), np.uint64)
    memory.read(asked, got)
    assert np.array_equal(got, truth[asked])
    whole: Words = np.empty((PAGES, WORDS_PER_PAGE), np.uint64)
    memory.read(everything, whole)
    assert np.array_equal(whole, truth)
    held = set(indices_of(memory.data_runs()).tolist())
    assert set(np.flatnonzero(truth.any(axis=1)).tolist()) <= held


def test_pages_that_were_never_touched_hold_no_data(memory: GuestMemory) -> None:
    memory.write_new(3, noise(2, 1))
    memory.write(np.array([50]), noise(1, 2))
    assert memory.data_runs().tolist() == [[3, 2], [50, 1]]


def test_memory_that_is_cleared_is_zero_whatever_was_there(memory: GuestMemory) -> None:
    memory.write(np.array([2, 3, 39, 40, 63]), noise(5, 1))
    memory.make_zero()
    whole: Words = np.empty((PAGES, WORDS_PER_PAGE), np.uint64)
    memory.read(np.arange(PAGES), whole)
    assert not whole.any()


def test_runs_are_cut_where_the_kind_of_memory_changes() -> None:
    child = Child()
    mixed = MixedMemory([MappedMemory([region(8)]), child.part(4), MappedMemory([region(8)])])
    try:
        runs = np.array([[1, 2], [6, 12], [19, 1]], np.int64)
        cut = mixed.cut(runs)
        assert cut.tolist() == [[1, 2], [6, 2], [8, 4], [12, 6], [19, 1]]
        assert [mixed.mapped(start, count) is not None for start, count in cut.tolist()] == [
            True, True, False, True, True
        ]  # fmt: skip
        assert mixed.mapped(6, 12) is None
    finally:
        mixed.release()
        child.end()


def test_memory_that_is_not_anonymous_may_hold_data_anywhere() -> None:
    child = Child()
    try:
        assert child.memory(sparse=False).data_runs().tolist() == [[0, PAGES]]
    finally:
        child.end()


def test_a_kernel_without_pagemap_scan_tells_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child()
    try:
        memory = child.memory()
        memory.write(np.array([0, 1, 39, 40, 63]), noise(5, 1))
        found = memory.data_runs().tolist()

        def refuse(*_arguments: object, **_options: object) -> None:
            raise OSError(25, "Inappropriate ioctl for device")

        monkeypatch.setattr(pagemap, "scan", refuse)
        assert memory.data_runs().tolist() == found == [[0, 2], [39, 1], [40, 1], [63, 1]]
    finally:
        child.end()


def test_a_vmm_that_ended_is_gone_and_memory_that_is_not_there_is_told() -> None:
    child = Child()
    nowhere = ProcessMemory("g1", child.process.pid, [Span(PAGE_SIZE, 1, 0)], sparse=True)
    into: Words = np.empty((1, WORDS_PER_PAGE), np.uint64)
    with pytest.raises(VmmError, match="g1 cannot be reached"):
        nowhere.read(np.array([0]), into)
    memory = child.memory()
    child.end()
    with pytest.raises(VmmGoneError, match=f"g1 \\(pid {child.process.pid}\\) has ended"):
        memory.read(np.array([0]), into)
    with pytest.raises(VmmGoneError):
        memory.data_runs()


def test_a_file_that_is_too_short_is_refused_and_closed() -> None:
    good, bad = region(4), region(4)
    os.ftruncate(bad.fd, PAGE_SIZE)
    with pytest.raises(ValueError, match="has 4096 bytes, expected 16384"):
        MappedMemory([good, bad])
    for fd in (good.fd, bad.fd):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
