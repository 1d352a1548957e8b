"""Interruption of an attempt from outside its story: by an operator, by the destination, by the loss of the
connection."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from migrated.base.errors import CancelledByOperatorError, MigrationError
from migrated.source.switchover import Happened, Item
from protocol.handover import SourceEvent

Result = TypeVar("Result")


class Interruption:
    """Ends one attempt: until the guest is stopped by cancelling what is under way, then by an event of the hand-over.

    Args:
        inbox: takes the events of the hand-over.
    """

    def __init__(self, inbox: asyncio.Queue[Item]) -> None:
        self._inbox = inbox
        self._ended: asyncio.Future[MigrationError] = asyncio.get_running_loop().create_future()
        self._guest_is_stopped = False

    @property
    def error(self) -> MigrationError | None:
        """The error that ended the attempt, None when nobody ended it."""
        return self._ended.result() if self._ended.done() else None

    @property
    def by_operator(self) -> bool:
        """True when an operator ended it."""
        return isinstance(self.error, CancelledByOperatorError)

    @property
    def undisturbed(self) -> bool:
        """True while the guest has not been stopped."""
        return not self._guest_is_stopped

    def end(self, error: MigrationError, event: SourceEvent) -> None:
        """End the attempt. The first reason is kept.

        Args:
            event: the event of the hand-over that this is once the guest is stopped.
        """
        if not self._ended.done():
            self._ended.set_result(error)
        if self._guest_is_stopped:
            self._inbox.put_nowait(Happened(event, str(error)))

    async def unless_ended(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do the part of the story that does not disturb the guest. When it returns the guest may be stopped: from
        then on an end is an event.

        Raises:
            MigrationError: it was ended; whatever else ``work`` raises.
        """
        task = asyncio.create_task(work)
        either: tuple[asyncio.Future[Any], ...] = (task, self._ended)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel(str(self.error or ""))
                await asyncio.gather(task, return_exceptions=True)
        if (error := self.error) is not None and (task.cancelled() or task.exception() is None):
            raise error
        result = task.result()
        self._guest_is_stopped = True
        return result
