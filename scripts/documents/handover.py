"""The parts of docs/handover.md that follow from the tables: the state diagrams and every row.

python -m scripts.documents.handover            print the document as it should be
python -m scripts.documents.handover --write    bring docs/handover.md up to date
"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Final

from protocol.handover import (
    DESTINATION,
    FLEET_ROWS,
    SOURCE,
    Action,
    DestinationEvent,
    DestinationState,
    DestinationTable,
    SourceEvent,
    SourceState,
    SourceTable,
)
from scripts.basics import ROOT
from scripts.documents.blocks import Blocks, main

DOCUMENT: Final = ROOT / "docs" / "handover.md"


def diagram(table: SourceTable | DestinationTable, begin: SourceState | DestinationState) -> str:
    """A mermaid state diagram of the rows that change the state, one arrow for all events with the same effect."""
    arrows: dict[tuple[str, str, tuple[Action, ...]], list[str]] = {}
    for (state, event), (after, actions) in table.items():
        if after is not state:
            arrows.setdefault((state, after, actions), []).append(event)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {begin}"]
    for (left, entered, actions), events in arrows.items():
        deeds = f" / {', '.join(actions)}" if actions else ""
        lines.append(f"    {left} --> {entered}: {', '.join(events)}{deeds}")
    leaving = {left for left, _, _ in arrows}
    lines += [f"    {end} --> [*]" for end in _used(table, type(begin), 0) if end not in leaving]
    return "\n".join([*lines, "```"])


def rows(
    table: SourceTable | DestinationTable,
    states: type[SourceState] | type[DestinationState],
    events: type[SourceEvent] | type[DestinationEvent],
) -> str:
    """Every cell: the state after the event and the actions in their order; empty where the event is illegal."""
    cells = {(str(state), str(event)): result for (state, event), result in table.items()}
    used = _used(table, states, 0)
    lines = [f"| event | {' | '.join(used)} |", f"|---{'|---' * len(used)}|"]
    for event in _used(table, events, 1):
        line = []
        for state in used:
            after, actions = cells.get((state, event), (None, ()))
            if after is None:
                line.append("")
                continue
            stays = after == state
            line.append(", ".join(actions) or "–" if stays else f"**{after}**: {', '.join(actions) or '–'}")
        lines.append(f"| {event} | {' | '.join(line)} |")
    return "\n".join(lines)


def _used(table: SourceTable | DestinationTable, names: type[StrEnum], place: int) -> list[str]:
    """The states (place 0 of a row's key) or events (place 1) that a table has rows for."""
    return [name for name in names if any(name == row[place] for row in table)]


BLOCKS: Final[Blocks] = {
    "source diagram": lambda: diagram(SOURCE, SourceState.RUNNING),
    "destination diagram": lambda: diagram(DESTINATION, DestinationState.LOADING),
    "source table": lambda: rows(SOURCE, SourceState, SourceEvent),
    "destination table": lambda: rows(DESTINATION, DestinationState, DestinationEvent),
    "fleet table": lambda: rows(FLEET_ROWS, SourceState, SourceEvent),
}


if __name__ == "__main__":
    sys.exit(main(DOCUMENT, BLOCKS))
