#!/usr/bin/env python3
"""The parts of docs/handover.md that follow from the tables: the state diagrams and every row.

handover_document.py            print the document as it should be
handover_document.py --write    bring docs/handover.md up to date
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from protocol_document import refreshed

from protocol.handover import (
    DESTINATION,
    SOURCE,
    Action,
    DestinationEvent,
    DestinationState,
    DestinationTable,
    SourceEvent,
    SourceState,
    SourceTable,
)

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "handover.md"


def diagram(table: SourceTable | DestinationTable, begin: SourceState | DestinationState) -> str:
    """A mermaid state diagram of the rows that change the state, one arrow for all events with the same effect."""
    arrows: dict[tuple[str, str, tuple[Action, ...]], list[str]] = {}
    for (state, event), (after, actions) in table.items():
        if after is not state:
            arrows.setdefault((state, after, actions), []).append(event)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {begin}"]
    for (state, after, actions), events in arrows.items():
        deeds = f" / {', '.join(actions)}" if actions else ""
        lines.append(f"    {state} --> {after}: {', '.join(events)}{deeds}")
    leaving = {state for state, after, _ in arrows}
    lines += [f"    {state} --> [*]" for state in type(begin) if state not in leaving]
    return "\n".join([*lines, "```"])


def rows(
    table: SourceTable | DestinationTable,
    states: type[SourceState] | type[DestinationState],
    events: type[SourceEvent] | type[DestinationEvent],
) -> str:
    """Every cell: the state after the event and the actions in their order; empty where the event is illegal."""
    cells = {(str(state), str(event)): result for (state, event), result in table.items()}
    lines = [f"| event | {' | '.join(states)} |", f"|---{'|---' * len(states)}|"]
    for event in events:
        line = []
        for state in states:
            after, actions = cells.get((state, event), (None, ()))
            if after is None:
                line.append("")
                continue
            stays = after == state
            line.append(", ".join(actions) or "–" if stays else f"**{after}**: {', '.join(actions) or '–'}")
        lines.append(f"| {event} | {' | '.join(line)} |")
    return "\n".join(lines)


BLOCKS: Final[dict[str, Callable[[], str]]] = {
    "source diagram": lambda: diagram(SOURCE, SourceState.RUNNING),
    "destination diagram": lambda: diagram(DESTINATION, DestinationState.LOADING),
    "source table": lambda: rows(SOURCE, SourceState, SourceEvent),
    "destination table": lambda: rows(DESTINATION, DestinationState, DestinationEvent),
}


def main() -> int:
    """Print the document or bring it up to date."""
    text = refreshed(DOCUMENT.read_text(encoding="utf-8"), BLOCKS)
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
