"""The report on one attempt: which sections it has, in which order.

All figures come from the record. Computed figures (shares, positions, differences) never carry a ``data-field``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from migrated.report import appendix, downtime, summary, timing, transfer
from migrated.report.fields import Fields
from migrated.report.markup import Markup, join
from migrated.report.pieces import Section, contents

SECTIONS: Final[tuple[Callable[[Fields], Section | None], ...]] = (
    downtime.prediction,
    timing.timeline,
    downtime.breakdown,
    transfer.rounds,
    transfer.devices,
    downtime.checkpoints,
    timing.guest_time,
    transfer.memory,
    appendix.parameters,
    appendix.log,
    appendix.further,
    appendix.document,
)
"""The sections in the order of the page. A section returns None when the record has nothing for it; ``further`` shows
the members that the others left."""


def body(fields: Fields) -> Markup:
    """The whole page on one attempt."""
    head = summary.header(fields)
    sections = [made for section in SECTIONS if (made := section(fields)) is not None]
    return join([head, contents(sections), *(section.render() for section in sections)])
