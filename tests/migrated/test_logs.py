"""Log lines: format, level, context, and the copy kept for each migration's record."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path

import pytest
import structlog

from migrated.observe.logs import MAX_LINES, MAX_MIGRATIONS, configure

pytestmark = pytest.mark.usefixtures("logging_restored")


def test_json_lines_carry_level_time_and_context() -> None:
    stream = io.StringIO()
    configure("info", "json", stream=stream)
    log = structlog.get_logger()
    with structlog.contextvars.bound_contextvars(migration_id="m1", guest="g1"):
        log.info("Guest stopped", downtime_ns=5)
    log.debug("not shown")
    (line,) = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert line.pop("timestamp").endswith("Z")
    assert line == {"level": "info", "event": "Guest stopped", "migration_id": "m1", "guest": "g1", "downtime_ns": 5}


def test_console_lines_off_a_terminal_have_no_colours() -> None:
    stream = io.StringIO()
    configure("debug", "console", stream=stream)
    structlog.get_logger().debug("hello", x=1)
    assert "hello" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_the_collector_keeps_each_migrations_lines_whatever_level_is_shown() -> None:
    stream = io.StringIO()
    collector = configure("error", "json", stream=stream)
    log = structlog.get_logger()
    for migration_id in ("m1", "m2"):
        with structlog.contextvars.bound_contextvars(migration_id=migration_id, role="source", peer="b"):
            log.debug("breakdown", stop_ms=1)
            try:
                raise OSError("cut")
            except OSError:
                log.warning("lost", exc_info=True)
    log.info("nobody's")
    lines = collector.take("m1", "source")
    assert [(line["level"], line["event"]) for line in lines] == [
        ("debug", "breakdown stop_ms=1"),
        ("warning", "lost (OSError: cut)"),
    ]
    assert all(line["at"].endswith("Z") for line in lines)
    assert collector.take("m1", "source") == []
    assert collector.take("m2", "destination") == []
    assert len(collector.take("m2", "source")) == 2
    assert stream.getvalue() == ""


def test_the_collector_is_bounded_in_lines_and_migrations() -> None:
    collector = configure("error", stream=io.StringIO())
    log = structlog.get_logger()
    for number in range(MAX_LINES + 5):
        log.info(f"line {number}", migration_id="long", role="source")
    lines = collector.take("long", "source")
    assert (len(lines), lines[0]["event"], lines[-1]["event"]) == (MAX_LINES, "line 5", f"line {MAX_LINES + 4}")
    for number in range(MAX_MIGRATIONS + 1):
        log.info("x", migration_id=f"m{number}", role="source")
    assert collector.take("m0", "source") == []
    assert len(collector.take("m1", "source")) == 1


async def test_lines_from_threads_keep_the_migration_they_belong_to() -> None:
    collector = configure("error", stream=io.StringIO())
    log = structlog.get_logger()

    async def attempt(migration_id: str) -> None:
        structlog.contextvars.bind_contextvars(migration_id=migration_id, role="source")
        await asyncio.gather(*(asyncio.to_thread(log.info, f"from {migration_id}") for _ in range(50)))

    await asyncio.gather(*(attempt(f"m{number}") for number in range(4)))
    for number in range(4):
        assert [line["event"] for line in collector.take(f"m{number}", "source")] == [f"from m{number}"] * 50


def test_what_libraries_log_comes_into_the_same_stream() -> None:
    stream = io.StringIO()
    configure("info", "json", stream=stream)
    logging.getLogger("asyncio").error("Task exception was never %s", "retrieved")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["logger"]) == (
        "Task exception was never retrieved",
        "error",
        "asyncio",
    )


def test_a_stream_that_cannot_be_written_does_not_stop_the_daemon() -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    configure("info", "json", stream=Full())
    structlog.get_logger().info("lost")
    closed = io.StringIO()
    configure("info", "json", stream=closed)
    closed.close()
    structlog.get_logger().info("lost too")


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    configure("info", "json", file=path)
    structlog.get_logger().info("after")
    before, after = path.read_text().splitlines()
    assert (before, json.loads(after)["event"]) == ("before", "after")
