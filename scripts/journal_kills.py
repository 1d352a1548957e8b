"""Kills a process that writes a journal at every call of the operating system that it makes, also in the middle of its
writes, while decisions are taken and the journal is rewritten; after each kill the journal is opened anew.

    python -m scripts.journal_kills --attempts 40

    child    begin, decide, "acknowledged" ... rewrite ... decide, "acknowledged"    SIGKILL at call n of all its calls
    parent   opens the journal: every decision that was acknowledged is there, and nothing that was never taken

What happened goes to stderr; the last line on stdout is one JSON object: ``{"kills", "rewrites", "lost"}``. Exit code 1
when a decision was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from migrated.record.terms import Role
from migrated.state import journal
from migrated.state.journal import Journal
from protocol.handover import Decision
from scripts.basics import say

_CALLS: Final = ("open", "write", "fsync", "fdatasync", "replace", "close")
_ROLE: Final[Role] = "source"
_MORE_LINES: Final = 12
"""The child's journal is rewritten after so many lines: several times in its short life."""
EPOCH: Final = 1


class Killer:
    """Stands in for calls of ``os``: it makes them, and kills its process at one of them.

    Args:
        at: number of the call, from 0.
        midway: whether half of what that call writes is still written.
    """

    def __init__(self, at: int, midway: bool) -> None:
        self.made: Counter[str] = Counter()
        """Calls so far, by name."""
        self._left = at
        self._midway = midway

    def call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """The stand-in for one call."""

        def made(*arguments: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                if name == "write" and self._midway:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            self.made[name] += 1
            return real(*arguments, **named)

        return made


async def _write(directory: Path, attempts: int, acknowledge: Callable[[str], None]) -> None:
    """Take decisions, and acknowledge each when it was taken; every second attempt is closed."""
    book = Journal(directory)
    for number in range(attempts):
        migration_id = f"{number:032x}"
        book.begin(migration_id, EPOCH + number, "g1", _ROLE, {"peer": "b"})
        acknowledge(f"{migration_id} {Decision.BEGIN.value}")
        book.decide(migration_id, _ROLE, Decision.COMMIT)
        acknowledge(f"{migration_id} {Decision.COMMIT.value}")
        if number % 2:
            book.close_attempt(migration_id, _ROLE)
        await asyncio.sleep(0)  # rewriting goes on in its thread and in this loop
    await asyncio.sleep(0.05)  # the last rewriting may be killed too; one that is not over yet is no fault
    book.close()


def killed_at(directory: Path, attempts: int, at: int, midway: bool) -> tuple[list[str], int | None]:
    """Write a journal in a child that is killed. Returns what it acknowledged; and how often it rewrote the journal,
    None when it was killed before its end."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        write = os.write
        killer = Killer(at, midway)

        def acknowledge(line: str) -> None:
            write(told, f"{line}\n".encode())

        for name in _CALLS:
            setattr(os, name, killer.call(name, getattr(os, name)))
        journal._MORE_LINES = _MORE_LINES  # type: ignore[misc]
        asyncio.run(_write(directory, attempts, acknowledge))
        os._exit(killer.made["replace"])
    os.close(told)
    with os.fdopen(heard, encoding="ascii") as lines:
        acknowledged = lines.read().splitlines()
    _, status = os.waitpid(child, 0)
    return acknowledged, None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def missing(directory: Path, acknowledged: list[str]) -> list[str]:
    """Open the journal of a process that was killed. Returns the acknowledged decisions that it does not have, and
    those it has that were not taken."""
    with structlog.testing.capture_logs():  # torn lines are as they should be
        book = Journal(directory)
    try:
        wrong = []
        for line in acknowledged:
            migration_id, decision = line.split()
            attempt = book.attempt(migration_id, _ROLE)
            if attempt is None or (decision != Decision.BEGIN and Decision(decision) not in attempt.decisions):
                wrong.append(f"lost: {line}")
        current, overtaken = book.open_attempts()
        last = int(acknowledged[-1].split()[0], 16) if acknowledged else -1
        wrong += [f"never begun: {one.migration_id}" for one in (*current, *overtaken) if one.epoch > EPOCH + last + 1]
        return wrong
    finally:
        book.close()


def prove(attempts: int) -> dict[str, int]:
    """Kill at every call. Returns the counts."""
    kills = lost = rewrites = 0
    for midway in (False, True):
        for at in itertools.count():
            with tempfile.TemporaryDirectory(prefix="journal-") as place:
                acknowledged, rewritten = killed_at(Path(place), attempts, at, midway)
                found = missing(Path(place), acknowledged)
            for sentence in found:
                say(f"killed at call {at}{', midway' if midway else ''}: {sentence}")
            lost += len(found)
            if rewritten is not None:
                rewrites = rewritten
                break
            kills += 1
    return {"kills": kills, "rewrites": rewrites, "lost": lost}


def main() -> int:
    """Kill as often as there are calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=40, help="in each child's life (default %(default)s)")
    options = parser.parse_args()
    counts = prove(options.attempts)
    print(json.dumps(counts))
    return 1 if counts["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
