"""process_vm_readv and process_vm_writev: copying between this process and the memory of another, which runs on.

A span is a row (address in the other process, bytes). The rows of a table of spans have the layout of ``struct iovec``,
so a table is handed to the kernel as it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MOST_SPANS: Final = 1024
"""Spans that one call of the kernel takes (IOV_MAX)."""

Spans = npt.NDArray[np.uint64]
"""Rows of (address, bytes), shape (n, 2)."""


class UnmappedError(OSError):
    """The other process has no memory at ``address``, or none that may be used so."""

    def __init__(self, text: str, address: int) -> None:
        super().__init__(errno.EFAULT, text)
        self.address = address


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
    ]  # fmt: skip
    _call.restype = ctypes.c_ssize_t


def read(pid: int, spans: Spans, into: npt.NDArray[Any]) -> None:
    """Copy spans of another process, one after the other, into an array that they fill exactly.

    Raises:
        ProcessLookupError: there is no such process.
        UnmappedError: a span is not mapped there.
        PermissionError: its memory may not be read by us.
        ValueError: the array is not contiguous or has another size than the spans.
    """
    _transfer(_libc.process_vm_readv, "read", pid, spans, into)


def write(pid: int, spans: Spans, data: npt.NDArray[Any]) -> None:
    """Copy an array into spans of another process, one after the other; they take it exactly.

    Raises:
        As ``read``.
    """
    _transfer(_libc.process_vm_writev, "written", pid, spans, data)


def _transfer(call: Callable[..., int], verb: str, pid: int, spans: Spans, local: npt.NDArray[Any]) -> None:
    table = np.array(spans, np.uint64, order="C").reshape(-1, 2)  # a copy: rows are shortened as they are done
    if not local.flags.c_contiguous or local.nbytes != int(table[:, 1].sum()):
        raise ValueError(f"spans of {int(table[:, 1].sum())} bytes do not fit an array of {local.nbytes} bytes")
    address, first = local.ctypes.data, 0
    while first < len(table):
        batch = table[first : first + MOST_SPANS]
        wanted = int(batch[:, 1].sum())
        here = _IoVec(address, wanted)
        moved = call(pid, ctypes.byref(here), 1, batch.ctypes.data, len(batch), 0)
        if moved < 0 or (moved == 0 and wanted):
            raise _error(ctypes.get_errno() if moved < 0 else errno.EFAULT, verb, pid, int(batch[0, 0]))
        address += moved
        if moved == wanted:
            first += len(batch)
            continue
        # Part of it: the rest begins in the first row that is not done, and the next call tells what is wrong there.
        ends = np.cumsum(batch[:, 1], dtype=np.uint64)
        whole = int(np.searchsorted(ends, np.uint64(moved), side="right"))
        done_bytes = np.uint64(moved) - (ends[whole - 1] if whole else np.uint64(0))
        first += whole
        table[first, 0] += done_bytes
        table[first, 1] -= done_bytes


def _error(number: int, verb: str, pid: int, address: int) -> OSError:
    if number == errno.EFAULT:
        return UnmappedError(f"memory of process {pid} at {address:#x} cannot be {verb}: it is not mapped", address)
    return OSError(number, f"memory of process {pid} cannot be {verb}: {os.strerror(number)}")
