"""Errors: the reasons why an attempt did not complete, or why a document cannot be read. The message is the sentence
that reaches the operator and the record."""

from __future__ import annotations


class MigrationError(Exception):
    """Base: the attempt failed before the guest was stopped, and the guest was never disturbed."""


class RefusedError(MigrationError):
    """The destination, or the gate on the source, does not let the migration begin or the guest stop."""


class NoRoomError(RefusedError):
    """This host has no place for one more guest."""


class GuestHereError(RefusedError):
    """A guest of this name or uuid is on this host already."""


class LinkLostError(MigrationError):
    """The connection to the peer is gone: closed, reset, timed out, or silent for too long."""


class CancelledByOperatorError(MigrationError):
    """An operator cancelled the attempt, here or on the destination."""


class VmmError(MigrationError):
    """The VMM refused or failed at something, or is gone."""


class VmmGoneError(VmmError):
    """The VMM process has ended."""


class VmmSilentError(VmmError):
    """The VMM process is there and does not answer in time. ``pid`` is its process id."""

    def __init__(self, message: str, pid: int) -> None:
        super().__init__(message)
        self.pid = pid


class DocumentError(Exception):
    """A document, of a record or of a running migration, that this version cannot read."""
