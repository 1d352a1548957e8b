"""Logging: structured lines to standard error, and a copy of one migration's lines for its record.

log.info("...") -> bound context (migration_id, guest, role, peer) -> LogCollector -> level -> console | JSON lines
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import OrderedDict, deque
from pathlib import Path
from typing import Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from migrated.record.terms import Role

MAX_LINES: Final = 1000
"""Lines kept per migration; the oldest go first."""
MAX_MIGRATIONS: Final = 64
"""Parts in migrations whose lines are kept; late lines of a finished one must not pile up for ever."""

_CONTEXT: Final = frozenset({"migration_id", "guest", "role", "peer", "timestamp", "level", "event", "exc_info"})


Level = Literal["debug", "info", "warning", "error"]


class LogCollector:
    """Keeps the last lines of each part in a migration, so that its record can carry them. A daemon has both parts in
    one that gives a guest another VMM here. Any thread may log."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: OrderedDict[tuple[str, str], deque[dict[str, str]]] = OrderedDict()

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        migration_id = event.get("migration_id")
        if isinstance(migration_id, str):
            line = {"at": event["timestamp"], "level": event["level"], "event": _sentence(event)}
            with self._lock:
                part = (migration_id, str(event.get("role", "")))
                lines = self._lines.get(part)
                if lines is None:
                    lines = self._lines[part] = deque(maxlen=MAX_LINES)
                    if len(self._lines) > MAX_MIGRATIONS:
                        self._lines.popitem(last=False)
                lines.append(line)
        return event

    def take(self, migration_id: str, role: Role) -> list[dict[str, str]]:
        """Remove and return the lines of a part in a migration, oldest first: ``at`` (UTC), ``level``, ``event``."""
        with self._lock:
            return list(self._lines.pop((migration_id, role), ()))


def _sentence(event: EventDict) -> str:
    extra = " ".join(f"{key}={value}" for key, value in event.items() if key not in _CONTEXT)
    text = f"{event['event']} {extra}" if extra else str(event["event"])
    error = event.get("exc_info")
    if error is True:
        error = sys.exc_info()[1]
    return f"{text} ({type(error).__name__}: {error})" if isinstance(error, BaseException) else text


class _LineWriter:
    """Writes whole lines. A log that cannot be written (closed pipe, full disk) must not take the daemon with it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                return

    debug = info = warning = error = critical = exception = msg


class _StandardLibraryHandler(logging.Handler):
    """Brings the log lines of libraries that use ``logging`` (asyncio above all) into the same stream."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        structlog.get_logger(record.name).log(
            record.levelno, record.getMessage(), logger=record.name, **({"exc_info": error} if error else {})
        )


class _AtLeast:
    """Drops lines below the level in force."""

    def __init__(self) -> None:
        self.level = logging.INFO

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        if logging.getLevelNamesMapping()[event["level"].upper()] < self.level:
            raise structlog.DropEvent
        return event


_shown = _AtLeast()


def set_level(level: Level) -> None:
    """Change the level of the lines that are shown from now on."""
    _shown.level = logging.getLevelNamesMapping()[level.upper()]


def _open_for_life(path: Path) -> TextIO:
    """Open a log file for the life of the process, without the warning that nobody closes it."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    return open(fd, "a", encoding="utf-8", closefd=False)


def configure(
    level: Level = "info",
    format: Literal["console", "json"] = "console",  # noqa: A002 - the key's name in the configuration
    *,
    file: Path | None = None,
    stream: TextIO | None = None,
) -> LogCollector:
    """Set logging up for this process and return the collector of lines per migration.

    The collector sees debug lines too, whatever ``level`` shows, so a record explains itself.

    Args:
        file: append there instead of standard error.
        stream: write there instead (tests).

    Raises:
        OSError: ``file`` cannot be opened.
    """
    if stream is None:
        stream = sys.stderr if file is None else _open_for_life(file)
    set_level(level)
    collector = LogCollector()
    writer = _LineWriter(stream)
    render: list[Processor]
    if format == "json":
        render = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(default=str)]
    else:
        render = [
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            collector,
            _shown,
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=lambda *_names: writer,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_StandardLibraryHandler()]
    root.setLevel(logging.WARNING)
    return collector
