"""Guest memory that is handed over on the same host: it stays where it is, so a daemon neither reads nor writes it, and
no write needs to be found. These two stand where a copied guest has its memory and its dirty log."""

from __future__ import annotations

from typing import NoReturn

from migrated.base.errors import VmmError
from migrated.vmm.dirty_log import DirtyLog
from migrated.vmm.memory import GuestMemory, Words
from protocol.pages import NO_RUNS, Indices, Runs


class HandedOverMemory(GuestMemory):
    """Memory that goes from one VMM to the other as it is. Whoever wants a page of it all the same is refused.

    Args:
        pages: of the guest.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages

    def data_runs(self) -> Runs:
        return NO_RUNS

    def mapped(self, start: int, count: int) -> Words | None:
        return None

    def read(self, indices: Indices, into: Words) -> None:
        _refuse()

    def write(self, indices: Indices, words: Words) -> None:
        _refuse()

    def write_new(self, start: int, words: Words) -> None:
        _refuse()

    def punch(self, runs: Runs) -> None:
        _refuse()

    def release(self) -> None:
        """Do nothing: this memory holds no mapping and no descriptor."""


class NoDirtyLog(DirtyLog):
    """The log of memory that is handed over: what the guest writes is where it belongs already."""

    mode = None

    def clear(self, start: int, count: int) -> int:
        return 0

    def _collect(self) -> Runs:
        return NO_RUNS

    def close(self) -> None:
        """Do nothing: there is no descriptor."""


def _refuse() -> NoReturn:
    raise VmmError("the guest's memory is handed over in this migration, and no page of it may be sent")
