"""The error tree of the protocol.

ProtocolError
├── RemoteProtocolError     the peer did what the protocol forbids; carries the wire code for the ERROR frame
└── LocalProtocolError      this side was about to; always a bug here
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """Codes of the ERROR and REFUSE messages. 0 is never valid."""

    MALFORMED = 1
    """A frame or message that cannot be decoded, or fails a check on its values."""
    UNEXPECTED = 2
    """A well-formed message that is not allowed in this state or on this channel."""
    TOO_LARGE = 3
    """A length or count beyond what was agreed."""
    VERSION = 4
    """No common protocol version."""
    CAPABILITY = 5
    """A required capability that the peer does not have."""
    GUEST_EXISTS = 6
    """A guest with this name or uuid is already on the destination."""
    GUEST_MISMATCH = 7
    """The destination cannot build an equal guest."""
    LIMIT = 8
    """A limit cannot be met or is not supported."""
    BUSY = 9
    """The peer cannot take another migration now."""
    CORRUPT = 10
    """Payload whose digest does not match, or memory whose digest differs."""
    INTERNAL = 11
    """The peer failed by itself: its text says how."""
    TIME = 12
    """Time data that cannot be accepted."""
    AUTH = 13
    """A channel that does not prove to belong to the session."""


class ProtocolError(Exception):
    """Base of all protocol errors."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol.

    Attributes:
        code: what to send in the ERROR frame before closing.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.MALFORMED) -> None:
        super().__init__(message)
        self.code = code


class LocalProtocolError(ProtocolError):
    """This side tried something the protocol forbids: a bug here, never the peer's fault."""
