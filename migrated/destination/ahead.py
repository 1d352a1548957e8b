"""Preparing guest memory in background threads, ahead of the threads that write it.

Populator   huge pages behind memory that was announced and is about to come
Mapper      pages that arrived through the file, mapped before they are written again
"""

from __future__ import annotations

import queue
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from migrated.vmm.memory import GuestMemory
from protocol.pages import Runs, runs_of

_POPULATED_AT_ONCE: Final = 2048
"""Pages that are populated between two looks at whether to go on."""
_MAPPED_AT_ONCE: Final = 256
"""The same for pages that are mapped: a blackout may begin meanwhile, and has no 2 ms to wait for the processor."""
_MAPPED_RUN: Final = 16
"""Shortest run that is mapped ahead."""


class Populator:
    """Puts huge pages behind memory that is about to come. Without huge pages there is nothing to gain: a small page
    costs less where its content is written than twice, here and there.

    Attributes:
        backed: which pages may have memory behind them because of this, shape (pages,).
        mapped: which of them have it: they are best written through the mapping.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.backed: npt.NDArray[np.bool_] = np.zeros(memory.pages, np.bool_)
        self.mapped: npt.NDArray[np.bool_] = np.zeros(memory.pages, np.bool_)
        self._memory = memory
        self._work: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._ending = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def expect(self, runs: Runs) -> None:
        """Populate these pages soon (called in a channel's thread)."""
        with self._lock:
            if self._ending:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="populate", daemon=True)
                self._thread.start()
        for start, count in runs.tolist():
            if self.backed[start : start + count].any():
                continue  # once is enough, whatever the peer says
            self.backed[start : start + count] = True
            for begin in range(start, start + count, _POPULATED_AT_ONCE):
                self._work.put((begin, min(_POPULATED_AT_ONCE, start + count - begin)))

    def end(self) -> None:
        """Leave what is not populated yet to the stream. Does not wait."""
        with self._lock:
            self._ending = True
        self._work.put(None)

    def join(self) -> None:
        """Wait for the thread, after ``end``."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None and not self._ending:
            start, count = work
            if self._memory.mapped(start, count) is None:
                continue  # not in a mapping of ours
            if not self._memory.populate_huge(start, count):
                return  # no memory, or not on this host: whoever writes finds out
            self.mapped[start : start + count] = True


class Mapper:
    """Maps pages that arrived through the file, so that they can be rewritten without a fault: scattered pages of later
    rounds, and those after the stop, then take a fifth of the time.

    Args:
        memory: the incoming guest's memory.
        present: which pages hold data, shape (pages,).
    """

    def __init__(self, memory: GuestMemory, present: npt.NDArray[np.bool_]) -> None:
        self._memory = memory
        self._present = present
        self._ending = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Map what is here, in the background (called in a channel's thread, once)."""
        self._thread = threading.Thread(target=self._run, name="map", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Leave what is not mapped yet. Does not wait."""
        self._ending = True

    def join(self) -> None:
        """Wait for the thread, after ``end``."""
        if self._thread is not None:
            self._thread.join()

    @property
    def thread_id(self) -> int | None:
        """The thread, as the kernel numbers it; None while there is none."""
        return self._thread.native_id if self._thread is not None else None

    def _run(self) -> None:
        for begin in range(0, len(self._present), _MAPPED_AT_ONCE):
            runs = runs_of(np.flatnonzero(self._present[begin : begin + _MAPPED_AT_ONCE]))
            # Many short runs would cost a call each, more than the faults that they save.
            for start, count in runs[runs[:, 1] >= _MAPPED_RUN].tolist():
                if self._ending:
                    return
                if self._memory.mapped(begin + start, count) is None:
                    continue
                # A page that is given back just now would get memory again for nothing, and would still read as zero.
                if not self._memory.map(begin + start, count):
                    return
