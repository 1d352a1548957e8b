"""The one error that crosses the API socket: a name for programs, a sentence for people."""

from __future__ import annotations


class VmmError(Exception):
    """An operation that the VMM refused or could not finish.

    Attributes:
        name: which error, stable (``Interrupted``, ``InvalidArgument``, ``TimeNotImported`` ...).
        message: a whole sentence that says what went wrong, where, and what to do.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name
        self.message = message

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


class VmmGone(Exception):  # noqa: N818  # the name says what happened to the VMM, and "Error" would add nothing
    """The connection to the VMM broke, or nobody answers at its socket."""
