"""Guest memory as the daemon reaches it, page by page, counted over all regions of the guest.

    MappedMemory    files that the VMM shares with us, mapped here one behind the other: read and written in place
    ProcessMemory   private memory of the VMM's process, copied by process_vm_readv and process_vm_writev
    MixedMemory     parts of both kinds, one behind the other

A page that was never touched takes no memory. Looking at it through a mapping would give it some, so the daemon asks
where data is (``data_runs``) and touches nothing else. The module is longer than others because the three kinds are one
interface, each method of which is best compared across them.
"""

from __future__ import annotations

import mmap
import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from migrated.base.errors import VmmError, VmmGoneError
from migrated.kernel import memory as kernel_memory
from migrated.kernel import pagemap, process_memory
from protocol.guest import PAGE_SIZE
from protocol.pages import NO_RUNS, Indices, Runs, indices_of, runs_of, split_runs

WORDS_PER_PAGE: Final = PAGE_SIZE // 8
Words: TypeAlias = npt.NDArray[np.uint64]
"""Whole pages as u64, shape (n, 512)."""

_HUGE_PAGE_BYTES: Final = 2 << 20
_VECTOR_RANGES: Final = 4096
_ZEROS_AT_ONCE: Final = 512
_CLEARED_AT_ONCE: Final = 512
_SHMEM_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class GuestMemory(ABC):
    """All memory of one guest. Calls may come from several threads at once, for different pages.

    Attributes:
        pages: the number of pages.
    """

    pages: int

    @abstractmethod
    def data_runs(self) -> Runs:
        """Runs of pages that may hold something, shape (n, 2); every other page reads as zero."""

    @abstractmethod
    def mapped(self, start: int, count: int) -> Words | None:
        """A run of pages in place, to be read and written; None where they are not all mapped here in one piece.
        Do not keep the view past ``release``."""

    @abstractmethod
    def read(self, indices: Indices, into: Words) -> None:
        """Copy pages, given by ascending numbers, into an array of as many pages.

        Raises:
            VmmGoneError: the VMM's process has ended.
            VmmError: its memory cannot be read.
        """

    @abstractmethod
    def write(self, indices: Indices, words: Words) -> None:
        """Write pages, given by ascending numbers. Best for pages that hold something already.

        Raises:
            VmmGoneError, VmmError: as for ``read``.
        """

    @abstractmethod
    def write_new(self, start: int, words: Words) -> None:
        """Write a run of pages that hold nothing yet.

        Raises:
            OSError: the host has no memory for them.
            VmmGoneError, VmmError: as for ``read``.
        """

    @abstractmethod
    def punch(self, runs: Runs) -> None:
        """Give pages back: they read as zero afterwards and take no memory, where that can be had.

        Raises:
            OSError: the host cannot.
            VmmGoneError, VmmError: as for ``read``.
        """

    def make_zero(self) -> None:
        """Make all of it zero. A VMM that waits for a guest may have put something there at its start, as its own
        firmware, and a page that is zero at the source is not sent. Takes as long as it takes to read what is there.

        Raises:
            OSError, VmmGoneError, VmmError: as for ``punch``.
        """
        stage: Words = np.empty((_CLEARED_AT_ONCE, WORDS_PER_PAGE), np.uint64)
        for runs in split_runs(self.data_runs(), _CLEARED_AT_ONCE):
            indices = indices_of(runs)
            pages = stage[: len(indices)]
            self.read(indices, pages)
            if len(used := indices[pages.any(axis=1)]):
                self.punch(runs_of(used))

    def clear(self, indices: Indices) -> None:
        """Write zeros to pages, given by ascending numbers. For a few pages here and there this takes less than giving
        them back does, which every processor that has them mapped must hear of.

        Raises:
            VmmGoneError, VmmError: as for ``read``.
        """
        zeros: Words = np.zeros((min(len(indices), _ZEROS_AT_ONCE), WORDS_PER_PAGE), np.uint64)
        for begin in range(0, len(indices), _ZEROS_AT_ONCE):
            some = indices[begin : begin + _ZEROS_AT_ONCE]
            self.write(some, zeros[: len(some)])

    def cut(self, runs: Runs) -> Runs:
        """The same pages in runs of which each lies in one part of the memory, so that ``mapped`` can give it."""
        return runs

    def populate_huge(self, start: int, count: int) -> bool:
        """Put huge pages behind pages that shall be written, and map them, off the critical path. Returns whether the
        kernel did it."""
        return False

    def map(self, start: int, count: int) -> bool:
        """Map pages that hold something, off the critical path: whoever writes them later meets no fault. A page that
        holds nothing would get memory. Returns whether the kernel did it."""
        return False

    @abstractmethod
    def release(self) -> None:
        """Release mappings and descriptors. No view may be in use any more; a second call does nothing.

        Mapped memory takes 0.2 s/GiB where the VMM has ended already: call it in a thread.
        """


@dataclass(frozen=True, slots=True)
class FileRegion:
    """``pages`` pages of a file from byte ``offset`` on. ``fd`` belongs to the memory that is made of it."""

    fd: int
    pages: int
    offset: int = 0


class MappedMemory(GuestMemory):
    """Memory in files that the VMM shares (memfd, tmpfs, hugetlbfs), mapped one behind the other.

    Attributes:
        words: all of it as u64, shape (pages, 512).

    Args:
        regions: in the order of the guest's page numbers; their descriptors are owned from here on, and closed if
            this fails.

    Raises:
        ValueError: a file is shorter than its region.
        OSError: a file cannot be mapped.
    """

    def __init__(self, regions: Sequence[FileRegion]) -> None:
        self._regions = tuple(regions)
        self.pages = sum(region.pages for region in regions)
        try:
            for region in regions:
                size = os.fstat(region.fd).st_size
                if size < region.offset + region.pages * PAGE_SIZE:
                    raise ValueError(
                        f"the guest's memory file has {size} bytes, expected {region.offset + region.pages * PAGE_SIZE}"
                    )
            self._map_regions()
        except BaseException:
            self._close_files()
            raise

    def _map_regions(self) -> None:
        """Reserve addresses for all regions, where huge pages fit, and put each file in its place."""
        size = self.pages * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | kernel_memory.MAP_NORESERVE
        self._mapping = mmap.mmap(-1, size + _HUGE_PAGE_BYTES, flags=flags)
        reserved: npt.NDArray[np.uint64] = np.frombuffer(self._mapping, np.uint64)
        lead = -reserved.ctypes.data % _HUGE_PAGE_BYTES
        self._address = reserved.ctypes.data + lead
        address = self._address
        for region in self._regions:
            kernel_memory.map_shared_at(address, region.pages * PAGE_SIZE, region.fd, region.offset)
            address += region.pages * PAGE_SIZE
        self.words: Words = reserved[lead // 8 : (lead + size) // 8].reshape(self.pages, WORDS_PER_PAGE)

    def _pieces(self, start: int, count: int) -> Iterator[tuple[FileRegion, int, int]]:
        """The pieces of a run, by file: (region, byte offset in its file, pages)."""
        first = 0
        for region in self._regions:
            begin, end = max(start, first), min(start + count, first + region.pages)
            if begin < end:
                yield region, region.offset + (begin - first) * PAGE_SIZE, end - begin
            first += region.pages

    def data_runs(self) -> Runs:
        found: list[tuple[int, int]] = []
        first = 0
        for region in self._regions:
            end, last = region.offset, region.offset + region.pages * PAGE_SIZE
            while end < last:
                try:
                    start = os.lseek(region.fd, end, os.SEEK_DATA)
                except OSError:  # ENXIO: no data behind this point
                    break
                if start >= last:
                    break
                end = min(os.lseek(region.fd, start, os.SEEK_HOLE), last)
                page = (start - region.offset) // PAGE_SIZE
                found.append((first + page, -(-(end - region.offset) // PAGE_SIZE) - page))
            first += region.pages
        return np.array(found, np.int64).reshape(-1, 2) if found else NO_RUNS

    def mapped(self, start: int, count: int) -> Words | None:
        return self.words[start : start + count]

    def read(self, indices: Indices, into: Words) -> None:
        np.take(self.words, indices, axis=0, out=into, mode="clip")

    def write(self, indices: Indices, words: Words) -> None:
        self.words[indices] = words

    def clear(self, indices: Indices) -> None:
        self.words[indices] = 0

    def write_new(self, start: int, words: Words) -> None:
        """Through the files. On pages that hold nothing yet this is twice as fast as through the mapping: the kernel
        need not zero them first, nor map them here."""
        view = words.data.cast("B")
        done = 0
        for region, offset, pages in self._pieces(start, len(words)):
            end = done + pages * PAGE_SIZE
            while done < end:
                moved = os.pwrite(region.fd, view[done:end], offset)
                done, offset = done + moved, offset + moved

    def punch(self, runs: Runs) -> None:
        for start, count in runs.tolist():
            for region, offset, pages in self._pieces(start, count):
                kernel_memory.punch_hole(region.fd, offset, pages * PAGE_SIZE)

    def populate_huge(self, start: int, count: int) -> bool:
        return self._advise(kernel_memory.MADV_HUGEPAGE, start, count) and self._advise(
            kernel_memory.MADV_POPULATE_WRITE, start, count
        )

    def map(self, start: int, count: int) -> bool:
        return self._advise(kernel_memory.MADV_POPULATE_READ, start, count)

    def _advise(self, advice: int, start: int, count: int) -> bool:
        # Not through the mapping object, which would keep the interpreter meanwhile.
        return kernel_memory.madvise(self._address + start * PAGE_SIZE, count * PAGE_SIZE, advice)

    def _close_files(self) -> None:
        regions, self._regions = self._regions, ()
        for region in regions:
            os.close(region.fd)

    def release(self) -> None:
        if not self._regions:
            return
        del self.words
        # The interpreter is kept while a mapping is closed. So the page tables are emptied before, and the pages are
        # freed after, when the descriptors as the last users of the files go: both let other threads run.
        self._advise(kernel_memory.MADV_DONTNEED, 0, self.pages)
        self._mapping.close()
        self._close_files()


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of guest memory as it is mapped in the VMM: ``pages`` pages from page ``first_page`` of the guest on, at
    ``address`` of the VMM's process."""

    address: int
    pages: int
    first_page: int


class ProcessMemory(GuestMemory):
    """Memory in the VMM's own address space, copied from process to process while the VMM runs on.

    Args:
        guest: name of the guest, for sentences.
        pid: process of the VMM.
        spans: where its pages are; they cover 0 to ``pages`` without gaps.
        sparse: whether a page that is not in the VMM's page tables reads as zero, as in private anonymous memory.
            Otherwise every page counts as one that may hold something.
    """

    def __init__(self, guest: str, pid: int, spans: Sequence[Span], *, sparse: bool) -> None:
        self._guest = guest
        self._pid = pid
        self._spans = tuple(sorted(spans, key=lambda span: span.first_page))
        self._sparse = sparse
        self.pages = sum(span.pages for span in spans)
        self._firsts: Indices = np.array([span.first_page for span in self._spans], np.int64)
        """First page of each span, shape (spans,)."""
        self._origins: npt.NDArray[np.int64] = np.array(
            [span.address - span.first_page * PAGE_SIZE for span in self._spans], np.int64
        )
        """Address that page 0 would have if a span reached down to it, for each span, shape (spans,)."""

    def data_runs(self) -> Runs:
        if not self._sparse:
            return np.array([[0, self.pages]], np.int64)
        vector = pagemap.make_vector(_VECTOR_RANGES)
        found: list[Runs] = []
        try:
            fd = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._error(error) from error
        try:
            for span in self._spans:
                ranges = pagemap.held(fd, span.address, span.address + span.pages * PAGE_SIZE, vector)
                runs = ((ranges - np.uint64(span.address)) // np.uint64(PAGE_SIZE)).astype(np.int64)
                runs[:, 1] -= runs[:, 0]
                runs[:, 0] += span.first_page
                found.append(runs)
        except OSError as error:
            raise self._error(error) from error
        finally:
            os.close(fd)
        return np.concatenate(found)

    def mapped(self, start: int, count: int) -> Words | None:
        return None

    def read(self, indices: Indices, into: Words) -> None:
        try:
            process_memory.read(self._pid, self._places(indices), into)
        except OSError as error:
            raise self._error(error) from error

    def write(self, indices: Indices, words: Words) -> None:
        try:
            process_memory.write(self._pid, self._places(indices), words)
        except OSError as error:
            raise self._error(error) from error

    def write_new(self, start: int, words: Words) -> None:
        self.write(np.arange(start, start + len(words)), words)

    def punch(self, runs: Runs) -> None:
        """Write zeros, because another process's pages cannot be taken from it."""
        self.clear(indices_of(runs))

    def _places(self, indices: Indices) -> process_memory.Spans:
        """Return the ranges of pages in the VMM, neighbours merged: rows (address, bytes)."""
        addresses = self._origins[np.searchsorted(self._firsts, indices, side="right") - 1] + indices * PAGE_SIZE
        begins = np.flatnonzero(np.diff(addresses, prepend=addresses[:1] - 1) != PAGE_SIZE)
        spans: process_memory.Spans = np.empty((len(begins), 2), np.uint64)
        spans[:, 0] = addresses[begins]
        spans[:, 1] = np.diff(begins, append=len(addresses)) * PAGE_SIZE
        return spans

    def _error(self, error: OSError) -> VmmError:
        if isinstance(error, ProcessLookupError | FileNotFoundError):
            return VmmGoneError(f"the VMM of guest {self._guest} (pid {self._pid}) has ended")
        if isinstance(error, PermissionError):
            return VmmError(
                f"the memory of guest {self._guest} may not be reached in its VMM (pid {self._pid}): run the daemon as "
                "the VMM's user or as root, and look at kernel.yama.ptrace_scope"
            )
        return VmmError(f"the memory of guest {self._guest} cannot be reached: {error.strerror}")

    def release(self) -> None:
        """Do nothing: this memory holds no mapping and no descriptor."""


class MixedMemory(GuestMemory):
    """Parts of different kinds, one behind the other.

    Args:
        parts: in the order of the guest's page numbers, each counting its own pages from 0; owned from here on.
    """

    def __init__(self, parts: Sequence[GuestMemory]) -> None:
        self._parts = tuple(parts)
        ends = np.cumsum([part.pages for part in parts])
        self.pages = int(ends[-1])
        self._borders: list[int] = ends[:-1].tolist()
        self._firsts = [0, *self._borders]

    def _part(self, start: int, count: int) -> tuple[GuestMemory, int] | None:
        """The part in which a run lies, and the run's first page in it; None when it lies in several."""
        number = int(np.searchsorted(self._borders, start, side="right"))
        part, local = self._parts[number], start - self._firsts[number]
        return (part, local) if local + count <= part.pages else None

    def _split(self, indices: Indices) -> Iterator[tuple[GuestMemory, Indices, slice]]:
        """Ascending page numbers by part: (part, numbers in it, their place among ``indices``)."""
        places = [0, *np.searchsorted(indices, self._borders).tolist(), len(indices)]
        for part, first, begin, end in zip(self._parts, self._firsts, places[:-1], places[1:], strict=True):
            if begin < end:
                yield part, indices[begin:end] - first, slice(begin, end)

    def data_runs(self) -> Runs:
        offsets = np.array([[first, 0] for first in self._firsts], np.int64)
        found = [part.data_runs() + offset for part, offset in zip(self._parts, offsets, strict=True)]
        return np.concatenate(found)

    def mapped(self, start: int, count: int) -> Words | None:
        found = self._part(start, count)
        return found[0].mapped(found[1], count) if found is not None else None

    def read(self, indices: Indices, into: Words) -> None:
        for part, local, place in self._split(indices):
            part.read(local, into[place])

    def write(self, indices: Indices, words: Words) -> None:
        for part, local, place in self._split(indices):
            part.write(local, words[place])

    def write_new(self, start: int, words: Words) -> None:
        for part, local, place in self._split(np.arange(start, start + len(words))):
            part.write_new(int(local[0]), words[place])

    def punch(self, runs: Runs) -> None:
        for part, local, _ in self._split(indices_of(runs)):
            part.punch(runs_of(local))

    def cut(self, runs: Runs) -> Runs:
        pieces = runs
        for border in self._borders:
            starts, ends = pieces[:, 0], pieces.sum(axis=1)
            crossing = np.flatnonzero((starts < border) & (border < ends))
            if len(crossing):
                number = int(crossing[0])
                halves = [[starts[number], border - starts[number]], [border, ends[number] - border]]
                pieces = np.concatenate((pieces[:number], np.array(halves, np.int64), pieces[number + 1 :]))
        return pieces

    def populate_huge(self, start: int, count: int) -> bool:
        found = self._part(start, count)
        return found is not None and found[0].populate_huge(found[1], count)

    def map(self, start: int, count: int) -> bool:
        found = self._part(start, count)
        return found is not None and found[0].map(found[1], count)

    def release(self) -> None:
        for part in self._parts:
            part.release()


def drop_views(error: BaseException) -> None:
    """Make the frames that an error came through let go of their variables: a view of guest memory among them would
    keep the memory mapped for as long as somebody keeps the error."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            pending += (one.__cause__, one.__context__)


def shared_huge_pages() -> bool:
    """Whether the host gives huge pages to shared memory that asks for them."""
    try:
        return not any(f"[{off}]" in _SHMEM_HUGE.read_text() for off in ("never", "deny"))
    except OSError:
        return False
