"""Negotiation: two daemons agree on a version and on capabilities.

Every connection opens with a 16-byte preface in each direction whose layout is fixed for all future versions:

    0      4       5       6          8            12        16
    | MGRP | major | minor | reserved | max_payload | reserved |

The major versions a side can speak are the one it sends and all down to ``OLDEST_MAJOR``; both use the highest they
share. Capabilities are negotiated by name in HELLO and WELCOME: the result is the intersection, and a capability that
the source requires and the destination lacks refuses the migration before any memory moves.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import MAX_PAYLOAD_BYTES

PREFACE: Final = struct.Struct("!4sBBHII")
PREFACE_BYTES: Final = PREFACE.size
PREFACE_MAGIC: Final = b"MGRP"
MAJOR: Final = 2
"""1 had one checksum over header and meta together; since 2 a header is checked before its lengths are believed."""
MINOR: Final = 0
OLDEST_MAJOR: Final = 2
MIN_PAYLOAD_BYTES: Final = 64 << 10

HOLD: Final = "hold"
OWNER_TOKEN: Final = "owner-token"
CAPABILITIES: Final = frozenset(
    {
        "switchover-abort",  # the destination enforces the downtime limit
        "digest-xxh3-frames",  # the running memory digest of protocol/digest.py
        "zero-runs",  # zero pages travel as runs without payload
        "extents",  # memory that is about to travel is announced, so that it can be populated ahead
        "zstd",  # batches may travel compressed with Zstandard
        "lz4",  # batches may travel compressed with LZ4
        "xor-delta",  # pages may travel as XOR against the page last sent
        OWNER_TOKEN,  # in a fleet the source says with which fencing token the destination takes the guest's lock
        HOLD,  # the source says when its operator holds the switchover
        "shared-memory",  # guest memory is handed over as descriptors that come with HELLO, and is not copied
    }
)
REQUIRED_CAPABILITIES: Final = frozenset({"zero-runs"})
SHARED: Final = "shared-memory"
"""Offered and taken only where both daemons are on one host."""


@dataclass(frozen=True, slots=True)
class Preface:
    """The first message of each side: its newest protocol version and the largest payload that it accepts (bytes)."""

    major: int
    minor: int
    max_payload_bytes: int


def pack_preface(max_payload_bytes: int) -> bytes:
    """Return this side's 16 opening bytes."""
    return PREFACE.pack(PREFACE_MAGIC, MAJOR, MINOR, 0, max_payload_bytes, 0)


def unpack_preface(data: bytes) -> Preface:
    """Decode the peer's 16 opening bytes.

    Raises:
        RemoteProtocolError: it is not our protocol, or the payload limit is out of range.
    """
    magic, major, minor, _reserved, max_payload_bytes, _reserved_too = PREFACE.unpack(data)
    if magic != PREFACE_MAGIC:
        raise RemoteProtocolError(
            f"the peer does not speak the migrated protocol: it opened with {magic!r}; check that the address is "
            "the listen address of a migrated destination",
            ErrorCode.VERSION,
        )
    if not MIN_PAYLOAD_BYTES <= max_payload_bytes <= MAX_PAYLOAD_BYTES:
        raise RemoteProtocolError(
            f"the peer's payload limit {max_payload_bytes} is outside {MIN_PAYLOAD_BYTES}..{MAX_PAYLOAD_BYTES}"
        )
    return Preface(major, minor, max_payload_bytes)


def agree_version(theirs: Preface) -> int:
    """Return the highest major version that both sides speak.

    Raises:
        RemoteProtocolError: there is none; the sentence names both.
    """
    if theirs.major < OLDEST_MAJOR:
        raise RemoteProtocolError(
            f"the peer speaks protocol version {theirs.major}, this side speaks {OLDEST_MAJOR} to {MAJOR}: "
            "update the older of the two",
            ErrorCode.VERSION,
        )
    return min(MAJOR, theirs.major)


def agree_capabilities(offered: frozenset[str], supported: frozenset[str], required: frozenset[str]) -> frozenset[str]:
    """Return the capabilities in force: those offered by one side and supported by the other.

    Raises:
        RemoteProtocolError: one that is required is missing.
    """
    agreed = offered & supported
    missing = required - agreed
    if missing:
        raise RemoteProtocolError(
            f"the peers do not share the required {'capability' if len(missing) == 1 else 'capabilities'} "
            f"{', '.join(sorted(missing))}",
            ErrorCode.CAPABILITY,
        )
    return agreed
