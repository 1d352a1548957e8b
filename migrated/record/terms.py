"""The words that records, progress and events use for how an attempt stands: sides, outcomes, statuses, phases, and
QEMU's checkpoints. Each set is closed and stands here once; nothing here needs more than the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Final, Literal, get_args

Role = Literal["source", "destination"]
"""A host's part in an attempt."""
ROLES: Final[tuple[Role, ...]] = get_args(Role)

Side = Literal["source", "destination", "link"]
"""The place where a part of the downtime passes: one of the hosts, by its clock, or the link between them."""
SIDES: Final[tuple[Side, ...]] = ("source", "link", "destination")
"""In the order in which state travels."""

Outcome = Literal["completed", "aborted", "cancelled", "failed", "refused", "in-doubt"]
"""The end of an attempt; docs/record.md explains each."""
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

Status = Literal[
    "setup", "active", "pre-switchover", "device", "completed", "cancelling", "cancelled", "failed", "in-doubt"
]
"""The status of a migration: QEMU's MigrationStatus, and ``in-doubt``: COMMIT was sent and the destination has not
answered."""

STATUS_OF: Final[Mapping[Outcome, Status]] = {
    "completed": "completed",
    "aborted": "failed",
    "cancelled": "cancelled",
    "failed": "failed",
    "refused": "failed",
    "in-doubt": "in-doubt",
}
"""The status in which an attempt with this outcome is left. QEMU knows neither an aborted nor a refused one."""

FINISHED: Final[frozenset[Status]] = frozenset({"completed", "cancelled", "failed"})
"""Statuses in which nothing of the migration is open any more."""

HANDED_OVER: Final[frozenset[Outcome]] = frozenset({"completed", "in-doubt"})
"""Outcomes whose stop is a downtime; after every other one the guest went on at the source, after a pause."""


class Phase(StrEnum):
    """Phases of an attempt on the source. Those that Propolis has too keep its names."""

    SYNC = "Sync"
    """Connect, negotiate, measure."""
    PRE_COPY = "RamPushPrePause"
    PAUSE = "Pause"
    HOLD = "pre-switchover"
    """The guest is stopped, and an operator has not let the switchover go on yet."""
    FINAL_PAGES = "RamPushPostPause"
    TIME_DATA = "TimeData"
    DEVICES = "DeviceState"
    FINISH = "Finish"


Stage = Literal["setting-up", "first-round", "later"]
"""How far an attempt has come with the sending of memory: nothing, most of it, what was written meanwhile."""


class QemuCheckpoint(Enum):
    """QEMU's downtime checkpoints in the order of time: name, the side whose count it is on, and the event that it
    marks."""

    DOWNTIME_START = ("src-downtime-start", "source", "the stop is requested")
    VM_STOPPED = ("src-vm-stopped", "source", "the vCPUs stand still")
    ITERABLE_SAVED = ("src-iterable-saved", "source", "last pages and iterable devices are sent")
    NON_ITERABLE_SAVED = ("src-non-iterable-saved", "source", "all device states are sent")
    LOADED = ("dst-precopy-loadvm-completed", "destination", "everything is loaded")
    VM_STARTED = ("dst-precopy-bh-vm-started", "destination", "the vCPUs run")
    DOWNTIME_END = ("src-downtime-end", "source", "the guest runs again")

    def __init__(self, label: str, side: Role, meaning: str) -> None:
        self.label = label
        self.side: Role = side
        self.meaning = meaning


MEANING_OF_CHECKPOINT: Final[Mapping[str, str]] = {point.label: point.meaning for point in QemuCheckpoint}
"""The meaning of each checkpoint, by the name that it has in a record."""
