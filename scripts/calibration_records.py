"""The attempts of the prediction campaign, and the file that they are kept in: one JSON document a line, appended as
soon as an attempt has ended, so that a campaign can be run in slices and goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Part = Literal["training", "counted", "cell", "check"]
"""What an attempt is for: the drawn campaign's training is not counted; cells choose constants, checks do not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One attempt of the campaign.

    Attributes:
        seed: of the campaign.
        subject: the guest's name.
        first: whether it was the first attempt of its guest.
        first_ever: whether the source's daemon had never migrated anything.
        forced: whether the guest was stopped in any case, which samples what a refusal would have hidden.
        load: what wanted to run on this machine for each of its processors, just before.
        record: the record's document.
    """

    part: Part
    cell: str
    seed: int
    subject: str
    first: bool
    first_ever: bool
    forced: bool
    limit_ms: float
    load: float
    record: dict[str, Any]

    @property
    def actual_ns(self) -> int | None:
        """The downtime where the switchover was seen through and had been predicted."""
        downtime = self.record["downtime"]
        if downtime is None or self.record["outcome"] != "completed" or downtime["predicted_upper_ns"] is None:
            return None
        return int(downtime["measured_ns"])

    @property
    def goal(self) -> str:
        """``downtime_goal`` of the attempt."""
        return str(self.record["parameters"]["downtime_goal"])


def load_now() -> float:
    """What wants to run on this machine for each of its processors (mean of the last minute)."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


class RecordsFile:
    """The file of a campaign's attempts.

    Args:
        path: may not exist yet; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.outcomes: list[Outcome] = [] if path is None or not path.exists() else read_outcomes([path])

    def add(self, outcome: Outcome) -> None:
        """Keep one attempt, on disk at once."""
        self.outcomes.append(outcome)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")

    def done(self, seed: int) -> Counter[str]:
        """How many attempts of a seed there are in each cell."""
        return Counter(outcome.cell for outcome in self.outcomes if outcome.seed == seed)


def read_outcomes(paths: Iterable[Path]) -> list[Outcome]:
    """All attempts of some files. A last line that was cut off is left out.

    Raises:
        ValueError: a file holds something else.
    """
    found: list[Outcome] = []
    for path in paths:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            try:
                found.append(Outcome(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no attempt of a campaign; give the file of --records ({error})"
                ) from error
        if rest:
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return found
