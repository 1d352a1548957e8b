"""Finished records in SQLite."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from migrated.state.history import FILE_NAME, SCHEMA, History, HistoryError, HistoryQuery, RecordNotFoundError


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with closing(History(tmp_path)) as opened:
        yield opened


def ids(history: History, **query: Any) -> list[str]:
    return [record["migration_id"] for record in history.query(HistoryQuery(**query))]


def test_a_record_comes_back_as_its_document(history: History, record_of: Callable[..., Any]) -> None:
    record = record_of()
    assert history.add(record, "source")
    assert history.get("m-0001") == record.document()


def test_a_record_of_the_same_id_replaces_the_earlier_one(history: History, record_of: Callable[..., Any]) -> None:
    history.add(record_of(outcome="in-doubt"), "source")
    history.add(record_of(outcome="completed"), "source")
    assert [r["outcome"] for r in history.query(HistoryQuery())] == ["completed"]


def test_a_unique_beginning_of_an_id_is_enough(history: History, record_of: Callable[..., Any]) -> None:
    for migration_id in ("abc", "abcd", "x%y", "x_y"):
        history.add(record_of(migration_id=migration_id), "source")
    assert history.get("abc")["migration_id"] == "abc", "an exact id wins over longer ones"
    assert history.get("x%")["migration_id"] == "x%y"
    for unknown in ("", "zz", "%", "xzy"):
        with pytest.raises(RecordNotFoundError, match="is in the history"):
            history.get(unknown)
    with pytest.raises(RecordNotFoundError, match=r"several migration ids \(abc, abcd\)"):
        history.get("ab")


def test_queries_filter_and_come_newest_first(history: History, record_of: Callable[..., Any]) -> None:
    for hour, (guest, outcome) in enumerate(
        [("g1", "completed"), ("g2", "aborted"), ("g1", "refused"), ("g1", "completed")], start=10
    ):
        started = f"2026-03-01T{hour}:00:00+00:00"
        history.add(record_of(migration_id=f"m{hour}", guest=guest, outcome=outcome, started_at=started), "source")
    assert ids(history) == ["m13", "m12", "m11", "m10"]
    assert ids(history, last=2) == ["m13", "m12"]
    assert ids(history, guest="g1") == ["m13", "m12", "m10"]
    assert ids(history, guest="g1", outcome="completed", last=1) == ["m13"]
    assert ids(history, since=datetime(2026, 3, 1, 12, tzinfo=UTC)) == ["m13", "m12"]
    assert ids(history, since="2026-03-01T13:00:00+02:00") == ["m13", "m12", "m11"]
    assert ids(history, until=datetime(2026, 3, 1, 12, tzinfo=UTC)) == ["m11", "m10"]
    eleven = datetime(2026, 3, 1, 11, tzinfo=UTC)
    assert ids(history, since=eleven, until=eleven.replace(hour=13)) == ["m12", "m11"]
    assert ids(history, guest="nobody") == []


def test_beyond_its_bound_the_oldest_go_but_not_those_in_doubt(tmp_path: Path, record_of: Callable[..., Any]) -> None:
    def add(history: History, number: int, **changes: Any) -> None:
        started = f"2026-03-01T10:{number:02}:00+00:00"
        assert history.add(record_of(migration_id=f"m{number}", started_at=started, **changes), "source")

    with closing(History(tmp_path)) as unbounded:
        for number in range(6):
            add(unbounded, number, outcome="in-doubt" if number == 1 else "completed")
        assert ids(unbounded) == ["m5", "m4", "m3", "m2", "m1", "m0"]
    with closing(History(tmp_path, max_records=3)) as history:
        add(history, 6)
        assert ids(history) == ["m6", "m5", "m4", "m1"]
        assert history.stats(HistoryQuery())["migrations"] == 4
        add(history, 1, outcome="completed")
        assert ids(history) == ["m6", "m5", "m4"], "once it is decided, it is as old as it is"


def test_a_bounded_history_does_not_grow(tmp_path: Path, record_of: Callable[..., Any]) -> None:
    with closing(History(tmp_path, max_records=10)) as history:

        def fill(first: int) -> int:
            for number in range(first, first + 300):
                history.add(record_of(migration_id=f"m{number}"), "source")
            return sum(path.stat().st_size for path in tmp_path.iterdir())

        once = fill(0)
        assert fill(300) <= 1.1 * once
        assert len(ids(history)) == 10


def test_a_history_is_bounded_in_bytes_too(tmp_path: Path, record_of: Callable[..., Any]) -> None:
    """A record that a peer sends has two megabytes, and a guest that comes and fails leaves one each time."""
    large = "x" * (1 << 16)
    with closing(History(tmp_path, max_records=1000, max_bytes=2 << 20)) as history:
        history.add(record_of(migration_id="doubt", outcome="in-doubt"), "source")
        for number in range(3):
            history.add(record_of(migration_id=f"own{number}", reason=large), "source")
        for number in range(12):
            history.add(record_of(migration_id=f"bad{number}", outcome="aborted", reason=large), "destination")
        assert sum(found.startswith("bad") for found in ids(history)) == 3, "a tenth of all, which pushed out no other"
        assert sum(found.startswith("own") for found in ids(history)) == 3
        for number in range(40):
            history.add(record_of(migration_id=f"more{number}", reason=large), "source")
        kept = ids(history)
        assert 28 <= len(kept) <= 32
        assert "doubt" in kept
        assert "more39" in kept


def test_the_sizes_of_records_of_an_older_version_are_counted(tmp_path: Path, record_of: Callable[..., Any]) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as old:
        for number, step in enumerate(SCHEMA[:2], 1):
            old.executescript(f"{step} PRAGMA user_version = {number};")
        text = record_of(migration_id="old", reason="é" * 1000).model_dump_json()
        old.execute(
            "INSERT INTO records VALUES ('old', 'g', 'source', 'completed', 0, 0, NULL, NULL, NULL, NULL, ?)", (text,)
        )
        old.commit()
    with closing(History(tmp_path, max_bytes=len(text.encode()) + 100)) as history:
        assert ids(history) == ["old"]
        history.add(record_of(migration_id="new"), "source")
        assert ids(history) == ["new"]


def test_stats_never_pool_aborted_attempts_with_completed_ones(
    history: History, record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    ms = 1_000_000
    for number in range(1, 101):
        downtime = downtime_of(
            number * ms + 30 * ms, predicted_ns=(number + 30) * ms * 9 // 10, predicted_upper_ns=120 * ms
        )
        history.add(record_of(migration_id=f"c{number}", downtime=downtime), "source")
    late = downtime_of(900 * ms, limit_violated=True)
    history.add(record_of(migration_id="a", outcome="aborted", downtime=late), "source")
    history.add(record_of(migration_id="r", outcome="refused", downtime=None), "source")
    stats = history.stats(HistoryQuery())
    assert stats["migrations"] == 102
    assert stats["outcomes"] == {"completed": 100, "aborted": 1, "refused": 1}
    assert stats["limit_violations"] == 1
    downtime = stats["downtime_ns"]
    assert (downtime["count"], downtime["p50"], downtime["p99"], downtime["max"]) == (100, 80 * ms, 129 * ms, 130 * ms)
    assert stats["abort_pause_ns"]["p50"] == 900 * ms
    assert stats["prediction_error_pct"]["p50"] == pytest.approx(10)
    assert stats["prediction_coverage_pct"] == 90


def test_stats_say_how_often_the_bound_held_for_each_guest_and_regime(
    history: History, record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    ms = 1_000_000
    for number in range(6):
        downtime = downtime_of(
            (100 + number) * ms, predicted_upper_ns=(90 if number == 5 else 110) * ms, predicted_regime=f"r{number % 2}"
        )
        history.add(record_of(migration_id=str(number), guest=f"g{number % 3}", downtime=downtime), "source")
    held = downtime_of(5000 * ms, hold_ns=4950 * ms, predicted_upper_ns=60 * ms)
    history.add(record_of(migration_id="held", guest="g0", downtime=held), "source")
    stats = history.stats(HistoryQuery())
    assert stats["prediction_by_regime"] == {
        "r0": {"switchovers": 3, "held": 3},
        "r1": {"switchovers": 3, "held": 2},
        "unknown": {"switchovers": 1, "held": 1},
    }
    assert stats["prediction_by_guest"]["g0"] == {"switchovers": 3, "held": 3}
    assert stats["prediction_by_guest"]["g2"] == {"switchovers": 2, "held": 1}


def test_stats_of_nothing(history: History) -> None:
    stats = history.stats(HistoryQuery())
    assert stats["migrations"] == 0
    assert stats["downtime_ns"]["p50"] is None
    assert stats["prediction_coverage_pct"] is None


def test_what_was_added_is_there_after_a_restart(tmp_path: Path, record_of: Callable[..., Any]) -> None:
    with closing(History(tmp_path)) as first:
        first.add(record_of(), "source")
    with closing(History(tmp_path)) as second:
        assert ids(second) == ["m-0001"]


def _add_and_die(directory: Path, record: Any) -> None:
    History(directory).add(record, "source")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_daemon_loses_nothing_that_was_added(tmp_path: Path, record_of: Callable[..., Any]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_script, args=(tmp_path, record_of()))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with closing(History(tmp_path)) as history:
        assert ids(history) == ["m-0001"]


def _die_script(directory: Path, record: Any) -> None:
    _add_and_die(directory, record)


def test_a_full_disk_is_logged_and_the_daemon_goes_on(
    history: History, record_of: Callable[..., Any], tmp_path: Path
) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the file cannot grow, as on ENOSPC."""
    history.add(record_of(migration_id="before"), "source")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / f"{FILE_NAME}-wal").stat().st_size, limits[1]))
        with structlog.testing.capture_logs() as logs:
            assert not history.add(record_of(migration_id="lost"), "source")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (logs[0]["log_level"], logs[0]["migration_id"]) == ("error", "lost")
    assert history.add(record_of(migration_id="after"), "source")
    assert set(ids(history)) == {"before", "after"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a few records."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root, and not in every container, may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_loses_only_what_came_while_it_was(
    small_disk: Path, record_of: Callable[..., Any]
) -> None:
    """fill | add: lost, read: there | free | add: stored | open again: there"""
    with closing(History(small_disk)) as history:
        assert history.add(record_of(migration_id="before"), "source")
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        lost = [number for number in range(100) if not history.add(record_of(migration_id=f"m{number}"), "source")]
        assert lost
        stored = {"before"} | {f"m{number}" for number in range(100) if number not in lost}
        assert set(ids(history)) == stored
        assert history.stats(HistoryQuery())["migrations"] == len(stored)
        ballast.unlink()
        assert history.add(record_of(migration_id="after"), "source")
    with closing(History(small_disk)) as again:
        assert set(ids(again)) == stored | {"after"}
        assert again.get("before")["outcome"] == "completed"


def test_a_damaged_file_is_put_aside_and_a_new_one_begins(tmp_path: Path, record_of: Callable[..., Any]) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"this is not a database, but somebody's text" * 100)
    with structlog.testing.capture_logs() as logs:
        history = History(tmp_path)
    with closing(history):
        assert history.add(record_of(), "source")
        assert ids(history) == ["m-0001"]
    aside = list(tmp_path.glob(f"{FILE_NAME}.damaged-*"))
    assert len(aside) == 1
    assert aside[0].read_bytes().startswith(b"this is not")
    assert logs[0]["file"] == str(aside[0])


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    History(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute(f"PRAGMA user_version = {len(SCHEMA) + 1}")
    with pytest.raises(HistoryError, match="use a newer migrated"):
        History(tmp_path)


def test_an_older_schema_is_brought_up_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_of: Callable[..., Any]
) -> None:
    with closing(History(tmp_path)) as history:
        history.add(record_of(), "source")
    monkeypatch.setattr("migrated.state.history.SCHEMA", (*SCHEMA, "CREATE TABLE more (x INTEGER);"))
    for _ in range(2):
        with closing(History(tmp_path)) as history:
            assert ids(history) == ["m-0001"]
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(SCHEMA) + 1,)
        assert connection.execute("SELECT count(*) FROM more").fetchone() == (0,)


def test_a_directory_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="cannot be opened"):
        History(tmp_path / "none")
