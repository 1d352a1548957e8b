"""A move whose guest stands still with a known number of scattered pages left to send.

rounds go on while the guest writes -> the destination is held until every page is written again -> a stop by force

A guest writes the same pages over and over. While the destination's daemon is held, the round under way cannot end, so
the dirty log is not read; once the guest has had time for all of its pages, the next read finds all of them, and the
guest is stopped.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any, Final

from protocol.guest import PAGE_SIZE
from scripts.rig.host import Host
from scripts.rig.waiting import until

PARAMETERS: Final[dict[str, Any]] = {
    "downtime_limit": 0, "timeout_s": 0, "on_timeout": "force", "switchover_abort": False
}  # fmt: skip
"""Of the move: no stop fits, so it goes on until ``stop_by_force``."""
_SPACING: Final = 8
"""Every so many pages there is one that the guest writes."""
_WRITTEN_AGAIN_S: Final = 0.5
"""In this time the guest writes each of its pages once."""
_HELD_S: Final = 2 * _WRITTEN_AGAIN_S
_ROUNDS_S: Final = 0.5
"""Rounds go on for so long after the first: the destination maps what has arrived meanwhile, as it does in a move that
nobody holds up."""
_OTHER_PAGES: Final = 8
"""Beyond its own pages a guest has its heartbeat's."""


def profile(pages: int) -> dict[str, Any]:
    """The profile of a guest that writes so many pages."""
    return {
        "workload": "stride", "stride": _SPACING, "working_set_pages": _SPACING * pages,
        "dirty_rate": f"{int(pages * PAGE_SIZE / _WRITTEN_AGAIN_S)}/s",
    }  # fmt: skip


async def stop_by_force(name: str, here: Host, there: Host) -> None:
    """While a move with ``PARAMETERS`` is under way: have the guest stopped when it has written all of its pages since
    they were sent.

    Raises:
        RigError: the first round does not end.
    """

    async def first_round_over() -> bool:
        progress = await here.progress(name)
        return progress is not None and bool(progress["rounds"])

    await until(f"the first round of {name} is over", first_round_over)
    await asyncio.sleep(_ROUNDS_S)
    there.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(_HELD_S)
        await here.command("migrate-set-parameters", {"guest": name, "timeout-s": 0.001})
    finally:
        there.signal(signal.SIGCONT)


def as_many(record: dict[str, Any], pages: int) -> bool:
    """Whether a move had so many pages to send after the stop."""
    left: int = record["ram"]["downtime_pages"]
    return pages <= left <= pages + _OTHER_PAGES
