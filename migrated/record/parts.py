"""The parts that a downtime is made of, as one closed table.

    part of a downtime (whose clock) -> component of the prediction -> named pieces of the prediction
                                     -> group of the breakdown in the log

Everything that names, sums or draws parts asks this table: the ledger, the prediction and what it learns, the log, the
command line, the report. A record keeps the names as text, so a part that a newer version added can still be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum, StrEnum
from typing import Final

from migrated.record.terms import Side


class Component(StrEnum):
    """The terms that a prediction of the downtime is summed from, in the order of time."""

    STOP = "stop"
    DIRTY_LOG = "dirty-log"
    STATE = "state"
    """Memory and device saves, which run side by side: the longer of the two."""
    DEVICE_LOADS = "device-loads"
    LEGS = "legs"
    """Messages on their way and what is done between them: the part of a downtime that has no other component."""
    RESUME = "resume"


class LogGroup(StrEnum):
    """Cloud Hypervisor's five groups of a downtime, in the order of its log line."""

    STOP = "stop"
    MEMORY = "final_memory_delta"
    SNAPSHOT = "snapshot"
    SENDING = "sending_snapshot"
    COMPLETING = "completing"


class Part(Enum):
    """A part of a downtime: its name in the record, whose time it is, the component of the prediction that foresees it
    (None: it is not predicted and does not count against the limit), and its group in the log.

    They are listed in the order of time. A part that occurs on two sides has the same name on both.
    """

    STOP = ("stop", "source", Component.STOP, LogGroup.STOP)
    STOP_DRAIN = ("stop-drain", "source", Component.STOP, LogGroup.STOP)
    HOLD = ("hold", "source", None, LogGroup.STOP)
    DOWNTIME_MESSAGE = ("downtime-message", "source", Component.LEGS, LogGroup.COMPLETING)
    FINAL_DIRTY_LOG_READ = ("final-dirty-log-read", "source", Component.DIRTY_LOG, LogGroup.MEMORY)
    FENCE = ("fence", "source", Component.DIRTY_LOG, LogGroup.MEMORY)
    FINAL_PAGES = ("final-pages", "source", Component.STATE, LogGroup.MEMORY)
    DEVICE_SAVES = ("device-saves", "source", Component.STATE, LogGroup.SNAPSHOT)
    DIRTY_LOG_READ_AFTER_SAVES = ("dirty-log-read-after-saves", "source", Component.DIRTY_LOG, LogGroup.MEMORY)
    PAGES_AFTER_SAVES = ("pages-after-saves", "source", Component.STATE, LogGroup.MEMORY)
    STATE_END = ("state-end", "source", Component.LEGS, LogGroup.COMPLETING)
    LAST_PAGES_LEG = ("last-pages-leg", "link", Component.STATE, LogGroup.COMPLETING)
    DEVICE_LOADS = ("device-loads", "destination", Component.DEVICE_LOADS, LogGroup.COMPLETING)
    DIGEST_CHECK = ("digest-check", "destination", Component.LEGS, LogGroup.COMPLETING)
    COMPLETING = ("completing", "destination", Component.LEGS, LogGroup.COMPLETING)
    STATE_END_AND_READY_LEGS = ("state-end-and-ready-legs", "link", Component.LEGS, LogGroup.SENDING)
    DECISION = ("decision", "source", Component.LEGS, LogGroup.COMPLETING)
    JOURNAL = ("journal", "source", Component.LEGS, LogGroup.COMPLETING)
    LOCK_RELEASE = ("lock-release", "source", Component.LEGS, LogGroup.COMPLETING)
    COMMIT_LEG = ("commit-leg", "link", Component.LEGS, LogGroup.COMPLETING)
    COMMIT_JOURNAL = ("commit-journal", "destination", Component.LEGS, LogGroup.COMPLETING)
    RESUME = ("resume", "destination", Component.RESUME, LogGroup.COMPLETING)
    UNTIL_ABORT = ("until-abort", "source", Component.LEGS, LogGroup.COMPLETING)
    RESUME_ON_SOURCE = ("resume", "source", Component.RESUME, LogGroup.COMPLETING)

    def __init__(self, label: str, side: Side, component: Component | None, group: LogGroup) -> None:
        self.label = label
        self.side: Side = side
        self.component = component
        self.group = group


_BY_NAME: Final[Mapping[tuple[str, str], Part]] = {(part.label, part.side): part for part in Part}


def find_part(label: str, side: str) -> Part | None:
    """The part with this name and side; None when this version does not know it."""
    return _BY_NAME.get((label, side))


CUT_FINER: Final[Mapping[Part, tuple[Part, ...]]] = {
    Part.COMPLETING: (Part.LAST_PAGES_LEG, Part.DEVICE_LOADS, Part.DIGEST_CHECK),
    Part.RESUME: (Part.COMMIT_JOURNAL,),
}
"""Pieces of a part that only the destination can time. In a record they come before the part, which keeps its rest."""


class PredictedPart(Enum):
    """A named piece of a prediction: its name in progress and record, its component, and whose time it is."""

    STOP = ("stop", Component.STOP, "source")
    DIRTY_LOG = ("dirty-log", Component.DIRTY_LOG, "source")
    MEMORY = ("memory", Component.STATE, "source")
    DEVICE_SAVES = ("device-saves", Component.STATE, "source")
    """The time that saving devices takes beyond sending memory."""
    DEVICE_LOADS = ("device-loads", Component.DEVICE_LOADS, "destination")
    LEGS = ("legs", Component.LEGS, "link")
    RESUME = ("resume", Component.RESUME, "destination")

    def __init__(self, label: str, component: Component, side: Side) -> None:
        self.label = label
        self.component = component
        self.side: Side = side


def predicted_names(component: Component) -> Iterator[str]:
    """The names under which a component stands in ``predicted_parts_ns``."""
    return (piece.label for piece in PredictedPart if piece.component is component)


SIDE_OF_PREDICTED: Final[Mapping[str, Side]] = {piece.label: piece.side for piece in PredictedPart}
"""The side of each named piece of a prediction."""
