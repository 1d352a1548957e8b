"""Following migrations while they run: a live view on a terminal, plain lines of what changed elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from migrated.cli.session import console
from migrated.control.client import ControlClient

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL_S: Final = 0.25
ROUNDS_ASKED: Final = 40
"""Newest rounds asked for: what the curves show."""
FINISHED: Final = ("completed", "cancelled", "failed")

Progress = dict[str, Any]
Update = Callable[[list[Progress]], None]


@contextmanager
def display(*, as_json: bool, stderr: bool, rounds: int) -> Iterator[Update]:
    """Where snapshots of migrations go: JSON lines, a live view on a terminal, or plain lines.

    Args:
        stderr: show on standard error, as standard output is for the result.
        rounds: newest rounds in the live view; 0 for the short form.
    """
    if as_json:
        yield _json_lines
        return
    screen = console(stderr=stderr)
    if screen.is_terminal:
        with _live(screen, rounds) as update:
            yield update
    else:
        yield PlainLines(lambda line: click.echo(line, err=stderr))


def _json_lines(found: list[Progress]) -> None:
    for progress in found:
        click.echo(json.dumps(progress))


@contextmanager
def _live(screen: Console, rounds: int) -> Iterator[Update]:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from migrated.cli.render import progress_view

    idle = Text("No migration is running; waiting for one (Ctrl-C ends).", style="dim")
    # The short form makes way for the record; the long one stays to be read.
    with Live(idle, console=screen, auto_refresh=False, vertical_overflow="crop", transient=not rounds) as live:

        def update(found: list[Progress]) -> None:
            views = [progress_view(progress, rounds=rounds) for progress in found]
            live.update(Group(*views) if views else idle, refresh=True)

        yield update


class PlainLines:
    """Writes a line whenever a migration's status, round or decision has changed."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._seen: dict[str, tuple[object, ...]] = {}

    def __call__(self, found: list[Progress]) -> None:
        """Take one snapshot."""
        from migrated.cli.render import progress_line

        for progress in found:
            state = (progress["status"], progress["round"], progress["decision"])
            if self._seen.get(progress["migration_id"]) != state:
                self._seen[progress["migration_id"]] = state
                self._write(progress_line(progress))


async def attend(client: ControlClient, guest: str, migration_id: str, update: Update | None) -> Any:
    """Show a migration until it has ended or is in doubt, and return its record."""
    ended = asyncio.create_task(client.command("x-migrated-wait", {"migration-id": migration_id}, oob=True))
    try:
        while not ended.done():
            if update is not None:
                found = await client.command("x-migrated-status", {"guest": guest, "rounds": ROUNDS_ASKED})
                update([progress for progress in found if progress["migration_id"] == migration_id])
            await asyncio.wait({ended}, timeout=INTERVAL_S if update else None)
        return ended.result()
    finally:
        ended.cancel()


async def watch(client: ControlClient, guest: str | None, update: Update, *, follow: bool) -> None:
    """Show running migrations until all that were seen have ended, or for ever with ``follow``.

    Those that ended stay in view. When nothing runs, it waits for the first.
    """
    asked: dict[str, Any] = {"rounds": ROUNDS_ASKED} | ({"guest": guest} if guest else {})
    seen: set[str] = set()
    while True:
        found = await client.command("x-migrated-status", asked)
        seen.update(p["migration_id"] for p in found if p["status"] not in FINISHED)
        shown = [p for p in found if p["migration_id"] in seen]
        update(shown)
        # One in doubt may stay so for days; what it needs is a person, not a longer look.
        running = [p for p in shown if p["status"] not in (*FINISHED, "in-doubt")]
        if seen and not running and not follow:
            return
        await asyncio.sleep(INTERVAL_S)
