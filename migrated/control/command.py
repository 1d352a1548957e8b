"""One command of the control socket: its name, what it is told and tells, and the operation that it calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from migrated.control.operations import Operations
from migrated.control.schema import Argument

Arguments: TypeAlias = Mapping[str, Any]
Handler: TypeAlias = Callable[[Operations, Arguments], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    ``changes``: for operators only, and who called is logged. ``oob``: may be executed out of band. ``waits``: ends
    with its client, as nothing hangs on it. ``large``: its result is encoded in a thread, as that may take longer than
    the event loop can spare.
    """

    name: str
    doc: str
    returns: str
    arguments: tuple[Argument, ...]
    run: Handler
    changes: bool = False
    oob: bool = False
    waits: bool = False
    large: bool = False

    def document(self) -> dict[str, Any]:
        """For ``x-migrated-schema``."""
        return {
            "name": self.name,
            "doc": self.doc,
            "returns": self.returns,
            "allow-oob": self.oob,
            "arguments": [argument.document() for argument in self.arguments],
        }
