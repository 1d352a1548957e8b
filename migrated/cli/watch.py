"""Following migrations while they run: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from migrated.cli.session import console
from migrated.cli.trace import Look
from migrated.control.client import CommandError, ControlClient
from migrated.record.terms import FINISHED

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL_S: Final = 0.5
ROUNDS_ASKED: Final = 40
"""Newest rounds asked for: more than a screen has room for."""

Update = Callable[[list[Look]], None]


@contextmanager
def display(*, as_json: bool, stderr: bool, rounds: int = ROUNDS_ASKED, full_screen: bool = False) -> Iterator[Update]:
    """A place for snapshots of migrations: JSON lines, a live view on a terminal, or plain lines.

    Args:
        stderr: show on standard error, as standard output is for the result.
        rounds: 0 for the short form of the live view.
        full_screen: take the whole terminal while it lasts, and leave the last view when it ends.
    """
    if as_json:
        yield JsonLines()
        return
    screen = console(stderr=stderr)
    if not screen.is_terminal:
        yield PlainLines(lambda line: click.echo(line, err=stderr))
        return
    with _full_screen(screen) if full_screen else _inline(screen, short=not rounds) as update:
        yield update


@contextmanager
def _inline(console: Console, *, short: bool) -> Iterator[Update]:
    """Draw below the text that the terminal shows already. The short form makes way for the record; the long one
    stays."""
    from rich.live import Live

    from migrated.cli.live import Screen

    view = Screen(short=short)
    with Live(view, console=console, auto_refresh=False, vertical_overflow="crop", transient=short) as live:

        def update(found: list[Look]) -> None:
            view.take(found)
            live.refresh()

        yield update


@contextmanager
def _full_screen(console: Console) -> Iterator[Update]:
    """On the terminal's second screen, which alone is sound when its size changes; the last view goes on the first."""
    from rich.live import Live

    from migrated.cli.live import Screen

    view, seen = Screen(hint="Ctrl-C leaves; migrations go on."), False
    try:
        with Live(view, console=console, auto_refresh=False, screen=True) as live:

            def update(found: list[Look]) -> None:
                nonlocal seen
                seen = seen or bool(found)
                view.take(found)
                live.refresh()

            yield update
    finally:
        if seen:
            console.print(view.without_hint())


class JsonLines:
    """Writes every snapshot as a line; one that has ended, with its record, once."""

    def __init__(self) -> None:
        self._ended: set[str] = set()

    def __call__(self, found: list[Look]) -> None:
        """Take one snapshot."""
        for look in found:
            migration_id = look.progress.migration_id
            if migration_id not in self._ended:
                click.echo(json.dumps(look.told))
            if look.record is not None:
                self._ended.add(migration_id)


class PlainLines:
    """Writes a line whenever a migration's status, round or decision has changed, and its outcome."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._seen: dict[str, tuple[object, ...]] = {}

    def __call__(self, found: list[Look]) -> None:
        """Take one snapshot."""
        from migrated.cli.render import outcome_line, progress_line

        for look in found:
            progress, record = look.progress, look.record
            state = (progress.status, progress.round, progress.decision, record is not None)
            if self._seen.get(progress.migration_id) == state:
                continue
            self._seen[progress.migration_id] = state
            if record is None:
                self._write(progress_line(progress))
            else:
                reason = f": {record.reason}" if record.reason else ""
                self._write(f"{outcome_line(record)}{reason}")


async def attend(client: ControlClient, guest: str, migration_id: str, update: Update | None) -> Any:
    """Show a migration until it has ended or is in doubt, and return its record's document."""
    ended = asyncio.create_task(client.command("x-migrated-wait", {"migration-id": migration_id}, oob=True))
    asked = {"guest": guest, "rounds": ROUNDS_ASKED}
    try:
        while update is not None:
            found = await client.command("x-migrated-status", asked)
            shown = [progress for progress in found if progress["migration_id"] == migration_id]
            update([Look.of(progress) for progress in shown])
            await asyncio.wait({ended}, timeout=INTERVAL_S)
            if ended.done():
                update([Look.of(progress, ended.result()) for progress in shown])
                break
        return await ended
    finally:
        ended.cancel()


async def watch(client: ControlClient, guest: str | None, update: Update, *, follow: bool) -> None:
    """Show migrations until all that ran have ended, or for ever with ``follow``.

    Migrations that ended stay in view, with their ``record``. Those that had ended before are not shown; when none
    runs, the command waits for the first.
    """
    asked: dict[str, Any] = {"rounds": ROUNDS_ASKED} | ({"guest": guest} if guest else {})
    before: set[str] | None = None
    records: dict[str, Any] = {}
    while True:
        looks = [Look.of(progress) for progress in await client.command("x-migrated-status", asked)]
        if before is None:
            before = {look.progress.migration_id for look in looks if look.progress.status in FINISHED}
        shown = [look for look in looks if look.progress.migration_id not in before]
        update([await _with_record(client, look, records) for look in shown])
        # One in doubt may stay so for days; what it needs is a person, not a longer look.
        running = [look for look in shown if look.progress.status not in FINISHED | {"in-doubt"}]
        if shown and not running and not follow:
            return
        await asyncio.sleep(INTERVAL_S)


async def _with_record(client: ControlClient, look: Look, known: dict[str, Any]) -> Look:
    """The same with its record when it has ended; without when it has none, as after a restart with a full disk.

    Args:
        known: documents of the records by migration id; one that was asked for is kept here.
    """
    if look.progress.status not in FINISHED:
        return look
    migration_id = look.progress.migration_id
    if migration_id not in known:
        try:
            known[migration_id] = await client.command("x-migrated-wait", {"migration-id": migration_id})
        except CommandError:
            known[migration_id] = None
    return Look.of(look.told, known[migration_id])
