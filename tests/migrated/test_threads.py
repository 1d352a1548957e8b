"""Calls in a thread, cancelled in the middle.

caller   in_thread ---- cancelled ........ waits ........ raises CancelledError
thread             open ---------------------- done, let go of
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from migrated.base.threads import in_thread, made_in_thread

WAIT_S = 30.0


class Slow:
    """A call that ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.ended = False

    def __call__(self) -> str:
        self.begun.set()
        assert self.may_end.wait(WAIT_S)
        self.ended = True
        return "made"


async def test_a_call_gives_its_result_or_its_error() -> None:
    assert await in_thread(sum, (1, 2)) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


@pytest.mark.parametrize("times", [1, 3])
async def test_who_is_cancelled_waits_for_the_call_and_lets_go_of_what_it_made(times: int) -> None:
    slow, let_go = Slow(), list[str]()
    task = asyncio.create_task(made_in_thread(let_go.append, slow))
    await asyncio.to_thread(slow.begun.wait, WAIT_S)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done()
    slow.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.ended
    assert let_go == ["made"]


async def test_what_was_not_made_is_not_let_go_of() -> None:
    slow, let_go = Slow(), list[str]()

    def fail() -> str:
        slow()
        raise OSError

    task = asyncio.create_task(made_in_thread(let_go.append, fail))
    await asyncio.to_thread(slow.begun.wait, WAIT_S)
    task.cancel()
    slow.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert let_go == []
