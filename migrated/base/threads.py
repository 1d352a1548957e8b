"""Calls in a thread that a cancellation does not leave behind.

asyncio.to_thread   cancelled, returns at once; the call runs on, with descriptors that its owner closes meanwhile,
                    and what it makes belongs to nobody
in_thread           cancelled, waits until the call has ended, lets go of what it made, and is cancelled then
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def in_thread(call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Make a call in a thread. When this returns, or raises, the call has ended."""
    return await made_in_thread(None, call, *args, **kwargs)


async def made_in_thread(
    let_go: Callable[[Result], object] | None,
    make: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """Make something in a thread that its owner must let go of.

    Args:
        let_go: called in a thread with what was made when the caller was cancelled meanwhile, and so does not get it.
        make: makes it; called with the other arguments.
    """
    made = _begin(partial(make, *args, **kwargs))
    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        await _end(made)
        if made.exception() is None and let_go is not None:
            await _end(_begin(partial(let_go, made.result())))
        raise


def _begin(call: Callable[[], Result]) -> asyncio.Future[Result]:
    run = partial(contextvars.copy_context().run, call)
    return asyncio.get_running_loop().run_in_executor(None, run)


async def _end(call: asyncio.Future[Result]) -> None:
    """Wait until a call has ended, whatever comes of it, and however often this task is cancelled."""
    while not call.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((call,))
