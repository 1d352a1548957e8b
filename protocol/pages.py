"""A batch of guest pages as runs: the run table on the wire, and its checks against the memory map.

A run is (first page, number of pages). On the wire a run table is big-endian u32 pairs; in memory an int64 array of
shape (n, 2). Runs of one table ascend and never overlap, so a page occurs at most once in a batch.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from protocol.errors import ErrorCode, RemoteProtocolError

Runs: TypeAlias = npt.NDArray[np.int64]
Indices: TypeAlias = npt.NDArray[np.int64]

RUN_BYTES: Final = 8
NO_RUNS: Final[Runs] = np.empty((0, 2), np.int64)


def pack_runs(runs: Runs) -> bytes:
    """Return the wire form of runs of shape (n, 2)."""
    return runs.astype(">u4").tobytes()


def unpack_runs(data: bytes, total_pages: int) -> Runs:
    """Decode and check a run table.

    Args:
        data: wire form.
        total_pages: size of the guest in pages.

    Raises:
        RemoteProtocolError: wrong length, an empty run, runs that overlap or descend, or a page outside the guest.
    """
    if not data or len(data) % RUN_BYTES:
        raise RemoteProtocolError(f"a run table of {len(data)} bytes is not a whole number of runs")
    runs = np.frombuffer(data, ">u4").astype(np.int64).reshape(-1, 2)
    ends = runs[:, 0] + runs[:, 1]
    if (runs[:, 1] == 0).any():
        raise RemoteProtocolError("a run table has an empty run")
    beyond = np.flatnonzero(ends > total_pages)
    if len(beyond):
        start, count = runs[beyond[0]].tolist()
        raise RemoteProtocolError(
            f"pages {start} to {start + count - 1} are outside the guest's memory of {total_pages} pages",
            ErrorCode.TOO_LARGE,
        )
    overlaps = np.flatnonzero(runs[1:, 0] < ends[:-1])
    if len(overlaps):
        raise RemoteProtocolError(f"runs overlap or descend at page {int(runs[overlaps[0] + 1, 0])}")
    return runs


def count_pages(runs: Runs) -> int:
    """Number of pages in the runs."""
    return int(runs[:, 1].sum())


def indices_of(runs: Runs) -> Indices:
    """Expand runs into their page numbers, shape (pages,)."""
    counts = runs[:, 1]
    total = int(counts.sum())
    first_slot = np.cumsum(counts) - counts
    indices: Indices = np.arange(total, dtype=np.int64) + np.repeat(runs[:, 0] - first_slot, counts)
    return indices


def runs_of(indices: Indices) -> Runs:
    """Collapse ascending unique page numbers into runs."""
    if not len(indices):
        return NO_RUNS
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    starts = indices[np.concatenate(([0], breaks))]
    edges = np.concatenate((breaks, [len(indices)]))
    return np.column_stack((starts, np.diff(edges, prepend=0)))


def split_runs(runs: Runs, pages_per_batch: int) -> list[Runs]:
    """Cut runs into batches of at most ``pages_per_batch`` pages, in order.

    A run longer than a batch is cut where the batch is full, so every batch but the last is full.
    """
    if not len(runs):
        return []
    ends = np.cumsum(runs[:, 1])
    total = int(ends[-1])
    if total <= pages_per_batch:
        return [runs]
    if total == len(runs):  # single pages: nothing is cut
        return [runs[begin : begin + pages_per_batch] for begin in range(0, total, pages_per_batch)]
    # Cut every run at each multiple of the batch size, counted in pages from the start of the table.
    cuts = np.unique(np.concatenate((np.arange(0, total, pages_per_batch), ends - runs[:, 1])))
    owner = np.searchsorted(ends, cuts, side="right")
    starts = runs[owner, 0] + cuts - (ends - runs[:, 1])[owner]
    pieces = np.column_stack((starts, np.diff(cuts, append=total)))
    edges = np.searchsorted(cuts, np.arange(0, total, pages_per_batch)).tolist()
    return [pieces[begin:end] for begin, end in zip(edges, [*edges[1:], len(pieces)], strict=True)]
