"""Errors of the file itself."""

from __future__ import annotations

from migrated.base.errors import MigrationError


class SaveFileError(MigrationError):
    """The file cannot be written, or what is in it cannot be used; the sentence says which part and where."""
