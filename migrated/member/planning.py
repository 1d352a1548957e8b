"""Planning in a process of its own: it takes seconds for many guests, and the daemon's interpreter has migrations to
serve. The process gets the question on its standard input, answers on its standard output, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class PlanningError(Exception):
    """The process ended without an answer; the message is a sentence."""


async def elsewhere(function: Callable[..., Answer], *arguments: Any) -> Answer:
    """Call a function of a module in another process.

    Raises:
        PlanningError: it ended without an answer; what it wrote is on this daemon's standard error.
    """
    question = pickle.dumps((function, arguments))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # modules that lie in the working directory are not the daemon's
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        answer, _ = await process.communicate(question)
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise PlanningError(f"The process that plans ended with status {process.returncode}.")
    found: Answer = pickle.loads(answer)
    return found


def main() -> None:
    """Answer one question."""
    function, arguments = pickle.loads(sys.stdin.buffer.read())
    sys.stdout.buffer.write(pickle.dumps(function(*arguments)))


if __name__ == "__main__":
    main()
