"""The changes of state of a hand-over, logged once no guest waits, because a log that blocks must not cost downtime."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

import structlog

log = structlog.get_logger()


class Transitions:
    """The changes of state of one hand-over."""

    def __init__(self) -> None:
        self._noted: list[tuple[int, StrEnum, str, StrEnum]] = []

    def note(self, before: StrEnum, because: Any, state: StrEnum) -> None:
        """Note that an event, or an effect that was carried out, changed the state; nothing when it did not."""
        if before is not state:
            name = str(because) if isinstance(because, StrEnum) else type(because).__name__
            self._noted.append((time.monotonic_ns(), before, name, state))

    def log(self) -> None:
        """Log the noted changes, and forget them."""
        begin_ns = self._noted[0][0] if self._noted else 0
        for at_ns, before, because, state in self._noted:
            log.debug(
                "hand-over", after_ms=round((at_ns - begin_ns) / 1e6, 3), state=state, was=before, because=because
            )
        self._noted.clear()
