"""Finished records: queries by an operator, and the storing of each new one in history and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import structlog

from migrated.control.operations import OperationError
from migrated.observe.metrics import Metrics
from migrated.record.model import Record
from migrated.record.terms import Role
from migrated.state.history import History, HistoryError, HistoryQuery, RecordNotFoundError

log = structlog.get_logger()

Found = TypeVar("Found")


class FinishedRecords:
    """The records of this host. All but ``finish`` may be called in a thread.

    Args:
        history: keeps them.
        metrics: counts them.
    """

    def __init__(self, history: History, metrics: Metrics) -> None:
        self.on_finished: Callable[[Record, Role], None] = lambda _record, _role: None
        """Called with each finished record and this host's part in it, in the event loop's thread."""
        self._history = history
        self._metrics = metrics

    def finish(self, record: Record, role: Role) -> None:
        """Keep a finished record. In this thread: a migration is done when its record is readable."""
        begin = time.monotonic()
        self._history.add(record, role)
        self._metrics.observe(record, role)
        self.on_finished(record, role)
        log.debug("record kept", ms=round((time.monotonic() - begin) * 1e3, 1))

    def query(self, query: HistoryQuery) -> list[dict[str, Any]]:
        """Record documents, newest first."""
        return self._answer(lambda: self._history.query(query))

    def stats(self, query: HistoryQuery) -> dict[str, Any]:
        """Counts and quantiles over the records of a query."""
        return self._answer(lambda: self._history.stats(query))

    def get(self, migration_id: str) -> dict[str, Any]:
        """One record document; any unique prefix of the id will do."""
        return self._answer(lambda: self._history.get(migration_id))

    def _answer(self, ask: Callable[[], Found]) -> Found:
        try:
            return ask()
        except RecordNotFoundError as error:
            raise OperationError(str(error), "DeviceNotFound") from error
        except HistoryError as error:
            raise OperationError(str(error)) from error
