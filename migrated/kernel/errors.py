"""Errors of calls that act on another process, each with a sentence that an operator can act on."""

from __future__ import annotations


class OtherProcessError(Exception):
    """Base: something could not be done to another process, which was left as it was."""


class InjectionError(OtherProcessError):
    """A system call could not be made inside another process."""


class TrackingError(OtherProcessError):
    """Writes to another process's memory cannot be tracked by this kernel, or not in that process."""
