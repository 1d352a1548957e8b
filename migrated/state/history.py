"""Finished records, in SQLite in the state directory: one row per attempt with what is searched for, and the document.

The journal decides who may run a guest; this only remembers. So nothing here may stop the daemon: what cannot be
written is logged, and a damaged file is put aside.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from migrated.record.model import Record
from migrated.record.terms import Outcome, Role

FILE_NAME: Final = "history.sqlite"
BUSY_TIMEOUT_S: Final = 5.0
_CACHE_KIB: Final = 512
"""Memory for pages of the file: one record and the indexes that it belongs to. SQLite takes 2 MiB unless told."""
_OFFERED: Final = "role = 'destination' AND outcome NOT IN ('completed', 'in-doubt')"
_SHARE: Final = 10
"""One in so many records may be of a guest that was offered to this host and was not taken over."""

SCHEMA: Final[tuple[str, ...]] = (
    """
    CREATE TABLE records (
        migration_id TEXT PRIMARY KEY,
        guest TEXT NOT NULL,
        role TEXT NOT NULL,
        outcome TEXT NOT NULL,
        started_at_us INTEGER NOT NULL,
        total_ns INTEGER NOT NULL,
        downtime_ns INTEGER,
        limit_violated INTEGER,
        predicted_ns INTEGER,
        predicted_upper_ns INTEGER,
        document TEXT NOT NULL
    );
    CREATE INDEX records_by_start ON records (started_at_us);
    CREATE INDEX records_by_guest ON records (guest, started_at_us);
    CREATE INDEX records_by_outcome ON records (outcome, started_at_us);
    """,
    # Otherwise every record that is added has all others read.
    """
    CREATE INDEX records_offered ON records (started_at_us)
        WHERE role = 'destination' AND outcome NOT IN ('completed', 'in-doubt');
    """,
    # The sum over all records reads an index then, and no document.
    """
    ALTER TABLE records ADD COLUMN document_bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE records SET document_bytes = length(CAST(document AS BLOB));
    CREATE INDEX records_by_size ON records (role, outcome, started_at_us, document_bytes);
    """,
)
"""Step n brings a file of schema version n to n + 1 (SQLite's user_version). Steps are only ever added."""

log = structlog.get_logger()


class HistoryError(Exception):
    """The history cannot be opened or read."""


class RecordNotFoundError(Exception):
    """No record, or more than one, has this migration id."""


class HistoryQuery(BaseModel):
    """Which records, newest first: those with ``since`` <= ``started_at`` < ``until``. ``last`` None means all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    last: int | None = Field(default=None, ge=1, lt=1 << 63)
    guest: str | None = None
    outcome: Outcome | None = None
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None


class History:
    """The store. Every method may be called from any thread; none is for the event loop while guests are stopped."""

    def __init__(self, directory: Path, max_records: int | None = None, max_bytes: int | None = None) -> None:
        """Open or create ``history.sqlite`` in ``directory``.

        Args:
            max_records: how many records ``add`` leaves, None for all.
            max_bytes: how much their documents may take together, None for any size.

        Raises:
            HistoryError: the file cannot be opened, or a newer version of migrated wrote it.
        """
        self.path = directory / FILE_NAME
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            self._connection = _open(self.path)
        except (sqlite3.NotSupportedError, sqlite3.OperationalError) as error:
            raise HistoryError(f"The history {self.path} cannot be opened: {error}.") from error
        except sqlite3.DatabaseError as error:
            aside = _put_aside(self.path)
            log.error("The history is damaged and was put aside; a new one begins", file=str(aside), reason=str(error))
            self._connection = _open(self.path)

    def close(self) -> None:
        """Close the file; a killed daemon that never gets here loses nothing that ``add`` stored."""
        with self._lock:
            self._connection.close()

    def add(self, record: Record, role: Role) -> bool:
        """Store a record, replacing an earlier one of the same migration id. ``role`` is this host's part in it.

        Beyond ``max_records`` and ``max_bytes`` the oldest go, but for those in doubt: somebody still has to decide
        them. Incoming attempts of which nothing came go sooner, so that no peer can push out the others.

        Returns:
            False when it could not be stored (full disk, read-only file system); the reason is logged.
        """
        downtime, document = record.downtime, record.model_dump_json()
        row = (
            record.migration_id,
            record.guest,
            role,
            record.outcome,
            _microseconds(datetime.fromisoformat(record.started_at)),
            record.total_ns,
            downtime.measured_ns if downtime else None,
            downtime.limit_violated if downtime else None,
            downtime.predicted_ns if downtime else None,
            downtime.predicted_upper_ns if downtime else None,
            document,
            len(document.encode()),
        )
        try:
            with self._lock, self._connection:
                self._connection.execute(f"REPLACE INTO records VALUES ({', '.join('?' * len(row))})", row)
                if self._max_records is not None:
                    self._keep_at_most(self._max_records)
                if self._max_bytes is not None:
                    self._keep_bytes(self._max_bytes)
        except (sqlite3.Error, OverflowError) as error:
            log.error(
                "The record cannot be stored in the history; make room or mend the file system",
                migration_id=record.migration_id,
                file=str(self.path),
                reason=str(error),
            )
            return False
        return True

    def _keep_at_most(self, max_records: int) -> None:
        """Delete the oldest records beyond the bound, and sooner those that a peer can make any number of."""
        for which, most in ((_OFFERED, max(1, max_records // _SHARE)), ("TRUE", max_records)):
            self._connection.execute(
                "DELETE FROM records WHERE outcome != 'in-doubt' AND rowid IN "
                f"(SELECT rowid FROM records WHERE {which} ORDER BY started_at_us DESC, rowid DESC LIMIT -1 OFFSET ?)",
                (most,),
            )

    def _keep_bytes(self, max_bytes: int) -> None:
        """The same for the bytes of their documents, which the destination has from its peer."""
        for which, most in ((_OFFERED, max_bytes // _SHARE), ("TRUE", max_bytes)):
            (total,) = self._connection.execute(
                f"SELECT coalesce(sum(document_bytes), 0) FROM records WHERE {which}"
            ).fetchone()
            if total <= most:
                continue
            oldest = self._connection.execute(
                f"SELECT rowid, document_bytes FROM records WHERE {which} AND outcome != 'in-doubt' "
                "ORDER BY started_at_us, rowid"
            )
            too_many: list[tuple[int]] = []
            for rowid, size in oldest:
                if total <= most:
                    break
                total -= size
                too_many.append((rowid,))
            self._connection.executemany("DELETE FROM records WHERE rowid = ?", too_many)

    def get(self, migration_id: str) -> dict[str, Any]:
        """The record document with this migration id, or with this unique beginning of one.

        Raises:
            RecordNotFoundError: there is none, or the beginning fits several.
        """
        # A range, not LIKE: ids may hold its wildcards, and the primary key serves it.
        found = self._rows(
            "SELECT migration_id, document FROM records WHERE migration_id >= ? AND migration_id < ? LIMIT 9",
            (migration_id, migration_id + "\U0010ffff"),
        )
        exact = [document for found_id, document in found if found_id == migration_id]
        if exact or (len(found) == 1 and migration_id):
            return _document(exact[0] if exact else found[0][1])
        if not found or not migration_id:
            raise RecordNotFoundError(
                f"No migration {migration_id!r} is in the history of this host; 'migratectl history' lists what is."
            )
        ids = ", ".join(found_id for found_id, _ in found)
        raise RecordNotFoundError(
            f"{migration_id!r} is the beginning of several migration ids ({ids}); give more of it."
        )

    def query(self, query: HistoryQuery) -> list[dict[str, Any]]:
        """Record documents, newest first."""
        return [_document(text) for (text,) in self._select("document", query)]

    def stats(self, query: HistoryQuery) -> dict[str, Any]:
        """Figures over the records that the query selects, from the indexed columns and the regimes of their bounds.

        Returns:
            ``migrations``, ``outcomes`` {outcome: count}, ``limit_violations``, and summaries (``count``, ``p50``,
            ``p90``, ``p95``, ``p99``, ``max``) of ``downtime_ns`` and ``total_ns`` (completed), ``abort_pause_ns``
            (aborted: never pooled with completed ones) and ``prediction_error_pct`` (absolute, completed);
            ``prediction_coverage_pct`` is how often the actual downtime stayed within the predicted bound;
            ``prediction_by_guest`` and ``prediction_by_regime`` say the same of each, {name: {``switchovers``,
            ``held``}}. A hold is no part of a downtime that was predicted.
        """
        rows = self._select(
            "outcome, total_ns, downtime_ns, limit_violated, predicted_ns, predicted_upper_ns, guest, "
            "json_extract(document, '$.downtime.predicted_regime'), json_extract(document, '$.downtime.hold_ns')",
            query,
        )
        completed = [row for row in rows if row[0] == "completed"]
        counted = [(row, row[2] - (row[8] or 0)) for row in completed if row[2] is not None]
        errors = [abs(row[4] - ns) / ns * 100 for row, ns in counted if row[4] is not None and ns > 0]
        bounds = [(row[6], row[7] or "unknown", ns <= row[5]) for row, ns in counted if row[5] is not None]
        return {
            "migrations": len(rows),
            "outcomes": dict(Counter(row[0] for row in rows)),
            "limit_violations": sum(1 for row in rows if row[3]),
            "downtime_ns": _summary(row[2] for row in completed),
            "abort_pause_ns": _summary(row[2] for row in rows if row[0] == "aborted"),
            "total_ns": _summary(row[1] for row in completed),
            "prediction_error_pct": _summary(errors),
            "prediction_coverage_pct": 100 * sum(held for *_, held in bounds) / len(bounds) if bounds else None,
            "prediction_by_guest": _bounds_held((guest, held) for guest, _, held in bounds),
            "prediction_by_regime": _bounds_held((regime, held) for _, regime, held in bounds),
        }

    def _select(self, columns: str, query: HistoryQuery) -> list[tuple[Any, ...]]:
        conditions: list[str] = []
        values: list[object] = []
        if query.guest is not None:
            conditions.append("guest = ?")
            values.append(query.guest)
        if query.outcome is not None:
            conditions.append("outcome = ?")
            values.append(query.outcome)
        if query.since is not None:
            conditions.append("started_at_us >= ?")
            values.append(_microseconds(query.since))
        if query.until is not None:
            conditions.append("started_at_us < ?")
            values.append(_microseconds(query.until))
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        values.append(-1 if query.last is None else query.last)
        return self._rows(
            f"SELECT {columns} FROM records {where} ORDER BY started_at_us DESC, rowid DESC LIMIT ?", values
        )

    def _rows(self, statement: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise HistoryError(f"The history {self.path} cannot be read: {error}.") from error


def _bounds_held(bounds: Iterable[tuple[str, bool]]) -> dict[str, dict[str, int]]:
    """Return how often the bound held, by name, the most frequent names first."""
    switchovers: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for name, held in bounds:
        switchovers[name] += 1
        kept[name] += held
    return {name: {"switchovers": count, "held": kept[name]} for name, count in switchovers.most_common()}


def _open(path: Path) -> sqlite3.Connection:
    with contextlib.suppress(OSError):  # SQLite says why, and gives the files beside this one its mode
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # A killed daemon loses nothing with NORMAL; only a dead host may lose the last rows, and its guests with them.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(SCHEMA):
            raise sqlite3.NotSupportedError(
                f"it has schema version {version} and this version knows up to {len(SCHEMA)}; use a newer migrated"
            )
        for step in range(version, len(SCHEMA)):
            connection.executescript(f"BEGIN; {SCHEMA[step]} PRAGMA user_version = {step + 1}; COMMIT;")
        connection.execute("SELECT count(*) FROM records").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _put_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.replace(aside.with_name(aside.name + suffix))
    return aside


def _microseconds(moment: datetime) -> int:
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1_000_000)


def _document(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text)
    return document


def _summary(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Count and nearest-rank percentiles."""
    ordered = sorted(value for value in values if value is not None)

    def rank(percent: int) -> float | None:
        return ordered[max(0, -(-percent * len(ordered) // 100) - 1)] if ordered else None

    return {"count": len(ordered), **{f"p{p}": rank(p) for p in (50, 90, 95, 99)}, "max": rank(100)}
