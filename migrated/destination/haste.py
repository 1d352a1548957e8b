"""When the threads of an incoming attempt run before others here: in the blackout, and for small rounds before it.

    round 1 (all of memory)     no: it takes seconds, and others would wait all that time
    a round is acknowledged     yes, for the next one, until that proves to be large
    the guest has stopped       yes, its VMM too, until the guest runs here or is given up

The source judges by its small rounds what the blackout will cost, so these must go as that does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Final

from migrated.base.collector import QuietCollector
from migrated.kernel.scheduling import SMALL_ROUND_BYTES, Precedence, may_take_precedence, threads_of

_LOOK_S: Final = 0.02


class Haste:
    """The precedence of one incoming attempt.

    Args:
        received_bytes: called for what came over the data channels until now.
        vmm_pid: process of the guest's VMM.
    """

    def __init__(self, received_bytes: Callable[[], int], vmm_pid: int) -> None:
        self._received_bytes = received_bytes
        self._vmm_pid = vmm_pid
        self._deciding = contextlib.ExitStack()
        self._moving = contextlib.ExitStack()
        self._begun_at_bytes = 0
        self._stopped = False
        self._small = False

    def begin(self) -> None:
        """Give the event loop precedence until the end: it decides, and hardly uses a processor."""
        self._deciding.enter_context(Precedence([threading.get_native_id()]))

    def round_over(self) -> bool:
        """A round was acknowledged: the next one goes first. Returns whether that one went like others, although this
        process may go before them: what was measured in it does not hold for the blackout."""
        if self._stopped:
            return False
        went_like_others, self._small = not self._small, True
        self._moving.close()
        self._begun_at_bytes = self._received_bytes()
        self._moving.enter_context(Precedence(threads_of(os.getpid())))
        return went_like_others and may_take_precedence()

    def guest_stopped(self) -> None:
        """The blackout has begun."""
        self._stopped = True
        self._moving.enter_context(QuietCollector())
        self._moving.enter_context(Precedence(threads_of(os.getpid(), self._vmm_pid)))

    async def watch(self) -> None:
        """Take precedence from rounds that prove to be large."""
        while not self._stopped:
            await asyncio.sleep(_LOOK_S)
            if not self._stopped and self._received_bytes() - self._begun_at_bytes > SMALL_ROUND_BYTES:
                self._small = False
                self._moving.close()

    def end(self) -> None:
        """The guest runs here, or is given up. Idempotent."""
        self._stopped = True
        self._moving.close()
        self._deciding.close()
