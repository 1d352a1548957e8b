"""Faults of a network and of processes: where on the way they strike, and what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.frames import HEADER_BYTES
from protocol.messages import FrameType


class Way(StrEnum):
    """A direction. The side that connects is the source of the migration."""

    TO_DESTINATION = "to-destination"
    TO_SOURCE = "to-source"

    @property
    def back(self) -> Way:
        """The other direction."""
        return Way.TO_SOURCE if self is Way.TO_DESTINATION else Way.TO_DESTINATION


BOTH: Final = (Way.TO_DESTINATION, Way.TO_SOURCE)


# Section: where


@dataclass(frozen=True, slots=True)
class AtFrame:
    """When the ``nth`` frame of a type (over all connections, from 1) is about to be forwarded."""

    type: FrameType
    nth: int = 1


@dataclass(frozen=True, slots=True)
class AtByte:
    """When byte ``offset`` of one direction of the ``connection``-th connection (both from 0) is about to be
    forwarded. The bytes before it are forwarded first."""

    offset: int
    way: Way = Way.TO_DESTINATION
    connection: int = 0


@dataclass(frozen=True, slots=True)
class AtTime:
    """So many seconds after the first connection."""

    seconds: float


Point = AtFrame | AtByte | AtTime


# Section: what


@dataclass(frozen=True, slots=True)
class Cut:
    """The network is gone in some directions: bytes vanish without an error, until ``heal``. The piece at hand
    vanishes too, if it goes that way."""

    ways: tuple[Way, ...] = BOTH


@dataclass(frozen=True, slots=True)
class Reset:
    """Every connection is reset (RST), at both ends."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing moves in some directions for a while; then all of it arrives."""

    seconds: float
    ways: tuple[Way, ...] = BOTH


@dataclass(frozen=True, slots=True)
class Delay:
    """Every byte takes this much longer in one direction, from here on."""

    seconds: float
    way: Way


@dataclass(frozen=True, slots=True)
class Throttle:
    """No more than this rate in one direction and connection, from here on."""

    bytes_per_s: float
    way: Way


@dataclass(frozen=True, slots=True)
class Corrupt:
    """One byte of the frame is changed: ``offset`` counts from the frame's first byte, or from its end if negative."""

    offset: int = HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Truncate:
    """Only the first bytes of the frame are forwarded, then the connection ends, at both ends."""

    keep_bytes: int = HEADER_BYTES // 2


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The frame is forwarded twice."""


@dataclass(frozen=True, slots=True)
class Call:
    """Something is done before the frame is forwarded: a process is killed or stopped."""

    function: Callable[[], None]
    name: str = "call"


Action = Cut | Reset | Stall | Delay | Throttle | Corrupt | Truncate | Duplicate | Call


@dataclass(slots=True)
class Fault:
    """An action at a point; it happens once.

    Attributes:
        struck: whether it began to happen.
        fired_at_ns: when it happened (CLOCK_MONOTONIC), 0 until it is done.
        failed: why it could not be done, None while it could.
    """

    at: Point
    action: Action
    struck: bool = False
    fired_at_ns: int = 0
    failed: str | None = None
