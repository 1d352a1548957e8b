"""The session of a migratectl command: it reaches the daemon, tells results and failures, and sets the exit status."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

from migrated.base.errors import DocumentError
from migrated.control.client import CommandError, ControlClient, DaemonUnreachableError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from migrated.record.model import Record

DEFAULT_SOCKET: Final = "/run/migrated/control.sock"
WIDTH_OFF_TERMINAL: Final = 140

EXIT_FAILED: Final = 1
EXIT_UNREACHABLE: Final = 3
EXIT_IN_DOUBT: Final = 4
EXIT_INTERRUPTED: Final = 130

T = TypeVar("T")


@dataclass(slots=True)
class Session:
    """One run of migratectl."""

    socket: Path
    json: bool = False

    def run(self, work: Callable[[ControlClient], Awaitable[T]], if_interrupted: str = "") -> T:
        """Connect and do ``work``; failures end the process with their exit status.

        Args:
            if_interrupted: the sentence for a user who presses Ctrl-C.
        """

        async def connected() -> T:
            async with await ControlClient.connect(self.socket) as client:
                return await work(client)

        try:
            return asyncio.run(connected())
        except DaemonUnreachableError as error:
            self.fail(str(error), EXIT_UNREACHABLE, "DaemonUnreachable")
        except DocumentError as error:
            self.fail(str(error), EXIT_FAILED, "DocumentError")
        except CommandError as error:
            self.fail(str(error), EXIT_FAILED, error.kind)
        except KeyboardInterrupt:
            click.echo(_clean(if_interrupted), err=True, nl=bool(if_interrupted))
            sys.exit(EXIT_INTERRUPTED)

    def call(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Execute one command and return its result."""
        return self.run(lambda client: client.command(command, arguments))

    def document(self, value: Any) -> None:
        """With ``--json``, the one document on standard output; else nothing."""
        if self.json:
            click.echo(json.dumps(value))

    def show(self, value: Any, view: Callable[[], RenderableType]) -> None:
        """The result: the document with ``--json``, else the view for people."""
        if self.json:
            self.document(value)
        else:
            try:
                shown = view()
            except DocumentError as error:
                self.fail(str(error), EXIT_FAILED, "DocumentError")
            console().print(shown)

    def say(self, value: Any, sentence: str) -> None:
        """The result: the document with ``--json``, else one sentence."""
        if self.json:
            self.document(value)
        else:
            click.echo(_clean(sentence))

    def fail(self, message: str, status: int, name: str) -> NoReturn:
        """End with a failure: the sentence on standard error, and in the document with ``--json``."""
        self.document({"error": name, "message": message})
        click.echo(_clean(message), err=True)
        sys.exit(status)

    def record(self, document: dict[str, Any]) -> Record:
        """The record in a document; one that this version cannot read ends the command."""
        from migrated.record.reading import read_record

        try:
            return read_record(document)
        except DocumentError as error:
            self.fail(str(error), EXIT_FAILED, "DocumentError")

    def finish(self, record: Record) -> None:
        """End after an attempt as its outcome says; completed goes on."""
        if record.outcome == "completed":
            return
        click.echo(_clean(f"{record.outcome}: {record.reason or 'no reason was recorded'}"), err=True)
        sys.exit(exit_status(record))


def exit_status(record: Record) -> int:
    """The exit status of a command whose attempt did not complete."""
    return EXIT_IN_DOUBT if record.outcome == "in-doubt" else EXIT_FAILED


def default_socket() -> Path:
    """``$MIGRATED_SOCKET``, or where a system-wide daemon listens."""
    return Path(os.environ.get("MIGRATED_SOCKET") or DEFAULT_SOCKET)


def console(*, stderr: bool = False) -> Console:
    """A console without markup, so that names and reasons are shown as they are. rich honours NO_COLOR."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else WIDTH_OFF_TERMINAL
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def _clean(text: str) -> str:
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)


# Section: every command


def _set_json(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(dict)["json"] = True


def _set_socket(ctx: click.Context, _param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.ensure_object(dict)["socket"] = value


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_set_json, help="One JSON document on standard output."
)
socket_option = click.option(
    "--socket",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=_set_socket,
    metavar="PATH",
    help="Control socket of the daemon [default: $MIGRATED_SOCKET, else /run/migrated/control.sock].",
)


def with_session(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command its session, and ``--json`` and ``--socket`` behind its name too."""

    @click.pass_context
    @functools.wraps(function)
    def wrapped(ctx: click.Context, *args: Any, **kwargs: Any) -> None:
        given = ctx.ensure_object(dict)
        function(Session(given.get("socket") or default_socket(), bool(given.get("json"))), *args, **kwargs)

    return json_option(socket_option(wrapped))
