"""The garbage collector, kept quiet while a guest stands still: looking at everything takes tens of milliseconds."""

from __future__ import annotations

import gc
from types import TracebackType


class QuietCollector:
    """A context in which no collection begins; several may be open at once. What became garbage meanwhile is collected
    as usual afterwards."""

    _open = 0

    def __enter__(self) -> None:
        QuietCollector._open += 1
        gc.disable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        QuietCollector._open -= 1
        if not QuietCollector._open:
            gc.enable()
