"""Waiting for something to become true, with a bound and a sentence for when it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

SETTLE_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.01

Found = TypeVar("Found")


class RigError(Exception):
    """Something that the test relies on did not happen; the sentence says what."""


async def until(what: str, probe: Callable[[], Awaitable[Found | None]], timeout_s: float = SETTLE_TIMEOUT_S) -> Found:
    """The first result of ``probe`` that is true.

    Raises:
        RigError: there was none in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := await probe()):
        if time.monotonic() > deadline:
            raise RigError(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(POLL_S)
    return found
