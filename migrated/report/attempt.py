"""The report on one attempt: which sections it has, in which order.

Everything comes from the record. What is computed from it (shares, positions, differences) never carries a
``data-field``.
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
"""In the order of the page. One that the record has nothing for gives None; ``further`` sees what the others left."""


def body(fields: Fields) -> Markup:
    """The whole page on one attempt."""
    head = summary.header(fields)
    sections = [made for section in SECTIONS if (made := section(fields)) is not None]
    return join([head, contents(sections), *(section.render() for section in sections)])
