"""Watching daemons from outside while something happens to them: how late they answer, and what memory they take.

    python -m scripts.hostile.watch SOCKET PID ...

It is a process of its own, so that neither the attack nor whoever waits for it shares an interpreter with the clock. It
says ``watching``, and at the end of its input one JSON object per daemon, in their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scripts.basics import ROOT
from scripts.bench.pinger import Pinger
from scripts.rig.host import Host
from scripts.rig.processes import anonymous_bytes

PING_S: Final = 0.005
SAMPLE_S: Final = 0.01
_END_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Watched:
    """What one daemon showed.

    Attributes:
        lag_p50_ms, lag_p99_ms, lag_max_ms: how long it took to answer a question on its control socket.
        wake_p99_ms: how late this machine woke the watching process, which only slept: the measure of the measure.
        peak_bytes: most memory of its own at once.
        answers: how many there were.
    """

    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float
    wake_p99_ms: float
    peak_bytes: int
    answers: int


def _quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of the others does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@contextlib.asynccontextmanager
async def watching(hosts: Sequence[Host]) -> AsyncIterator[dict[Host, Watched]]:
    """Watch the daemons of hosts while the block runs; the dictionary is filled when it is left."""
    arguments = [text for host in hosts for text in (str(host.socket), str(host.pid))]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.hostile.watch", *arguments, cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    if process.stdout is None or process.stdin is None:
        raise RuntimeError("the watching process has no pipes")
    found: dict[Host, Watched] = {}
    try:
        async with asyncio.timeout(_END_S):
            await process.stdout.readline()
        yield found
        process.stdin.close()
        async with asyncio.timeout(_END_S):
            for host in hosts:
                found[host] = Watched(**json.loads(await process.stdout.readline()))
            await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()


def main() -> None:
    """Watch until the input ends."""
    with contextlib.suppress(OSError):  # who waits for a processor measures himself
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    pids = [int(pid) for pid in sys.argv[2::2]]
    pingers = [Pinger(Path(path), PING_S) for path in sys.argv[1::2]]
    peaks, ended = [0] * len(pids), threading.Event()

    def sample() -> None:
        while not ended.is_set():
            for index, pid in enumerate(pids):
                peaks[index] = max(peaks[index], anonymous_bytes(pid))
            time.sleep(SAMPLE_S)

    threads = [*pingers, threading.Thread(target=sample)]
    for thread in threads:
        thread.start()
    print("watching", flush=True)
    sys.stdin.read()
    ended.set()
    for pinger, peak in zip(pingers, peaks, strict=True):
        pinger.stop()
        answers = pinger.answers_ms
        shown = {
            "lag_p50_ms": _quantile(answers, 0.5), "lag_p99_ms": _quantile(answers, 0.99), "lag_max_ms": max(answers),
            "wake_p99_ms": _quantile(pinger.wakes_ms, 0.99), "peak_bytes": peak, "answers": len(answers),
        }  # fmt: skip
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
