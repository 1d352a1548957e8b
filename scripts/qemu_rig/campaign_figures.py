"""The figures of campaigns of moves, the file that they are kept in, and what many runs show together.

A run is one line of the file, written when the run has ended, however it ended: so a hundred moves need not be one run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_NS_PER_MS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class MoveFigures:
    """A move that completed.

    Attributes:
        downtime_ms: as the record says.
        bound_ms: what the daemon promised when it decided to stop the guest; None where it promised nothing.
        late: the record says that the limit was violated.
        stood_ms: by how much the guest's clock fell behind: how long it was stopped, as it sees it itself.
        beyond_ms: how far that lies outside of the record's interval and two beats; not above 0 when right.
        gap_ms: how long the guest was heard by nobody.
        total_ms: from the command to the end.
        ram_mib_per_s: the guest's memory as a whole, over the time from the first round to the end.
        parts_ms: of the downtime, by name.
        predicted_parts_ms: the prediction behind the bound, by component; empty where there was none.
        scale_ms: how far such a prediction was expected to be off.
    """

    downtime_ms: float
    bound_ms: float | None
    late: bool
    stood_ms: float
    beyond_ms: float
    gap_ms: float
    total_ms: float
    ram_mib_per_s: float
    parts_ms: dict[str, float]
    predicted_parts_ms: dict[str, float]
    scale_ms: float

    def line(self) -> str:
        """The move for people."""
        return (
            f"downtime {self.downtime_ms:7.2f} ms, bound {self.bound_ms or 0:7.2f} ms, guest's clock stood "
            f"{self.stood_ms:7.2f} ms, silent {self.gap_ms:7.2f} ms, total {self.total_ms:7.0f} ms"
        )


@dataclass(slots=True)
class RunFigures:
    """The moves of one guest in one run.

    Attributes:
        guest: what kind of guest it is, in words; runs of the same words are summed up together.
        downtime_limit_ms: of each move.
        load: what wanted to run on this machine when the run began (mean of the last minute).
        attempts: moves that were tried.
        moves: those that completed.
        violations: what must not be, as sentences.
        finished: whether it came to its end, where everything is checked once more.
    """

    guest: str
    downtime_limit_ms: float
    load: float
    attempts: int = 0
    moves: list[MoveFigures] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    finished: bool = False

    @property
    def ram_mib_per_s(self) -> float | None:
        """How fast memory got over, the median; None when none did."""
        return _median([move.ram_mib_per_s for move in self.moves])

    def append_to(self, path: Path) -> None:
        """Write the run behind those that the file has."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self)) + "\n")


def read_runs(path: Path) -> list[RunFigures]:
    """All runs of a file.

    Raises:
        ValueError: it holds something else.
    """
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            document = json.loads(line)
            moves = [MoveFigures(**move) for move in document.pop("moves")]
            runs.append(RunFigures(**document, moves=moves))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is no run of a campaign ({error})") from error
    return runs


def summary(runs: Iterable[RunFigures]) -> dict[str, Any]:
    """The figures of runs of one kind of guest, all moves taken together."""
    known = list(runs)
    moves = [move for run in known for move in run.moves]
    bounded = [(move.bound_ms, move.downtime_ms) for move in moves if move.bound_ms]
    return {
        "moves": sum(run.attempts for run in known),
        "completed": len(moves),
        "late": sum(move.late for move in moves),
        "downtime_ms": spread([move.downtime_ms for move in moves]),
        "bounds_held": sum(downtime_ms <= bound_ms for bound_ms, downtime_ms in bounded),
        "bound_ms": spread([bound_ms for bound_ms, _ in bounded]),
        "bound_over_truth": _median([bound_ms / downtime_ms for bound_ms, downtime_ms in bounded]),
        "clock_stood_ms": spread([move.stood_ms for move in moves]),
        "gap_ms": spread([move.gap_ms for move in moves]),
        "beyond_record_ms": spread([move.beyond_ms for move in moves]),
        "total_ms": spread([move.total_ms for move in moves]),
        "ram_mib_per_s": _median([move.ram_mib_per_s for move in moves]),
        "parts_ms": _medians([move.parts_ms for move in moves]),
        "predicted_parts_ms": _medians([move.predicted_parts_ms for move in moves]),
        "scale_ms": spread([move.scale_ms for move in moves]),
        "load": spread([run.load for run in known]),
        "cut_short": sum(not run.finished for run in known),
        "violations": sum(len(run.violations) for run in known),
    }


def summaries(runs: Iterable[RunFigures]) -> dict[str, dict[str, Any]]:
    """The summary of each kind of guest."""
    by_guest: dict[str, list[RunFigures]] = {}
    for run in runs:
        by_guest.setdefault(run.guest, []).append(run)
    return {guest: summary(of_it) for guest, of_it in by_guest.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum; empty without values."""
    if not values:
        return {}
    ranked = sorted(values)
    chosen = {"p50": statistics.median(ranked), "p99": ranked[math.ceil(0.99 * len(ranked)) - 1], "max": ranked[-1]}
    return {name: round(value, 3) for name, value in chosen.items()}


def _medians(parts: list[dict[str, float]]) -> dict[str, float]:
    """The median of each part, 0 in a move that lacks it."""
    names = {name: None for of_move in parts for name in of_move}
    return {name: round(statistics.median(of_move.get(name, 0.0) for of_move in parts), 3) for name in names}


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None
