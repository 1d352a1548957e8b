"""Results of the checks of a QEMU guest: one row for each check."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

Verdict: TypeAlias = Literal["ok", "warning", "refused"]


class Row(NamedTuple):
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    sentence: str


def refusals(rows: Iterable[Row]) -> str | None:
    """The sentences of everything that is refused, as one; None when nothing is."""
    return "; ".join(row.sentence for row in rows if row.verdict == "refused") or None
