"""The cost of watching a migration, in one run: throughput with and without `migratectl watch` and scraped metrics, and
downtime with and without clients on the control socket, one of which does not read.

    python -m scripts.bench.operators_cost         table on stderr, one JSON object on stdout

    COST_SIZE_MIB      guest memory of the bulk samples (1024)
    COST_BULK          bulk samples of each kind (12)
    COST_SWITCHOVERS   downtime samples of each kind (40)
    COST_OUT           also write the JSON there

Samples alternate in the order ABBA, so that what disturbs the machine disturbs both.
The change is that of the medians; its interval comes from drawing the samples again 2,000 times. Processor time, which
other load disturbs less, is counted beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import random
import select
import signal
import socket
import statistics
import struct
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from migrated.control.client import ControlClient
from scripts.basics import GIB, MIB, ROOT, say
from scripts.bench import rivals
from scripts.bench.cases import Bench, moving_s
from scripts.bench.result import machine
from scripts.rig.host import Host
from scripts.rig.ports import free_port
from scripts.rig.processes import cpu_s

CLIENTS: Final = 20
SCRAPE_S: Final = 1.0
ATTACH_TIMEOUT_S: Final = 20.0
DRAWS: Final = 2000
COVERAGE: Final = 0.9


class Watcher:
    """`migratectl watch` in a terminal of 100 columns and 30 rows, whose output is read and thrown away."""

    def __init__(self, host: Host) -> None:
        command = [sys.executable, "-c", "from migrated.cli.migratectl import main; main()", "watch", "--follow"]
        environment = {**os.environ, "TERM": "xterm-256color", "MIGRATED_SOCKET": str(host.socket)}
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(command[0], command, environment)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        if not select.select([self._terminal], [], [], ATTACH_TIMEOUT_S)[0]:
            raise rivals.RivalError(f"migratectl watch showed nothing within {ATTACH_TIMEOUT_S:g} s")
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        # Linux tells by an error that nobody holds the other end any more.
        with contextlib.suppress(OSError):
            while os.read(self._terminal, 1 << 16):
                pass

    def close(self) -> None:
        """End it as Ctrl-C does."""
        os.kill(self.pid, signal.SIGINT)
        self._reading.join()
        os.waitpid(self.pid, 0)
        os.close(self._terminal)


@contextmanager
def scraped(urls: list[str]) -> Iterator[None]:
    """All of these are fetched once a second."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(SCRAPE_S):
            for url in urls:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    answer.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@asynccontextmanager
async def crowd(hosts: tuple[Host, ...]) -> AsyncIterator[None]:
    """CLIENTS clients on each control socket: all take every event, but for one, which asks for much and reads
    nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for host in hosts:
            stack.enter_context(contextlib.closing(deaf_client(host.socket)))
            for _ in range(CLIENTS - 1):
                await stack.enter_async_context(await ControlClient.connect(host.socket))
        yield


def deaf_client(path: Path) -> socket.socket:
    """A client that asks until the daemon takes no more of it, and never reads an answer."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.sendall(b'{"execute": "qmp_capabilities"}\n')
    client.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while True:
            client.sendall(b'{"execute": "query-commands"}\n' * 100)
    return client


class Cost:
    """Both comparisons."""

    def __init__(self, size_mib: int) -> None:
        self.bench = Bench(size_mib, 1)
        pair = self.bench.pair
        ports = [free_port(), free_port()]
        pair.a, pair.b = (
            Host(pair.directory / name, name, log={"level": "info"}, metrics={"address": f"127.0.0.1:{port}"})
            for name, port in zip("ab", ports, strict=True)
        )
        self._urls = [f"http://127.0.0.1:{port}/metrics" for port in ports]
        self.watch_cpu: list[float] = []
        """Processor time of `watch`, as a share of one CPU."""
        self.daemon_cpu: dict[bool, list[float]] = {False: [], True: []}
        """Processor time of both daemons per GiB (s), without and with."""

    async def bulk(self, observed: bool) -> float:
        """Throughput of one migration (GiB/s)."""
        source = await self.bench.guest("bulk", self.bench.size_mib, touched="100%")
        rivals.warm(self.bench.size_mib)
        watcher = Watcher(source) if observed else None
        try:
            with scraped(self._urls) if observed else nullcontext():
                used = [cpu_s(host.pid) for host in self.bench.pair.hosts]
                seen, begin = cpu_s(watcher.pid) if watcher else 0.0, time.monotonic()
                record = await self.bench.move("bulk")
                if watcher:
                    self.watch_cpu.append((cpu_s(watcher.pid) - seen) / (time.monotonic() - begin))
                spent = sum(cpu_s(host.pid) for host in self.bench.pair.hosts) - sum(used)
        finally:
            if watcher:
                await asyncio.to_thread(watcher.close)
        size_gib = self.bench.size_mib * MIB / GIB
        self.daemon_cpu[observed].append(spent / size_gib)
        return size_gib / moving_s(record)

    async def switchover(self, observed: bool) -> float:
        """Downtime of one migration of an idle guest (ms)."""
        await self.bench.guest("idle", 256, touched="25%")
        crowded: AbstractAsyncContextManager[None] = crowd(self.bench.pair.hosts) if observed else nullcontext()
        async with crowded:
            record = await self.bench.move("idle", downtime_limit=300, switchover_abort=False, on_timeout="force")
        return float(record["downtime"]["measured_ns"]) / 1e6


async def alternately(name: str, sample: Callable[[bool], Any], count: int) -> dict[bool, list[float]]:
    """So many samples of each kind, in the order ABBA."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for index in range(count):
        for observed in (False, True) if index % 2 == 0 else (True, False):
            found[observed].append(await sample(observed))
        say(f"  {name} {index + 1}/{count}: {found[False][-1]:.3g} without, {found[True][-1]:.3g} with")
    return found


def compared(samples: dict[bool, list[float]], unit: str) -> dict[str, Any]:
    """Medians and quartiles of both, and the change from one to the other in percent with its interval."""
    draw = random.Random(1)
    without, observed = samples[False], samples[True]

    def change(a: list[float], b: list[float]) -> float:
        return (statistics.median(b) / statistics.median(a) - 1) * 100

    drawn = sorted(
        change(draw.choices(without, k=len(without)), draw.choices(observed, k=len(observed))) for _ in range(DRAWS)
    )
    tail = round(DRAWS * (1 - COVERAGE) / 2)
    return {
        "unit": unit,
        "without": spread(without),
        "with": spread(observed),
        "change_pct": round(change(without, observed), 2),
        "change_ci_pct": [round(drawn[tail], 2), round(drawn[-tail - 1], 2)],
    }


def spread(samples: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high], "samples": samples}


async def measure(size_mib: int, bulk: int, switchovers: int) -> dict[str, Any]:
    """Run everything."""
    cost = Cost(size_mib)
    try:
        cost.bench.pair.start()
        throughput = await alternately("throughput (GiB/s)", cost.bulk, bulk)
        await cost.bench.drop("bulk")
        downtime = await alternately("downtime (ms)", cost.switchover, switchovers)
        await cost.bench.drop_all()
    finally:
        cost.bench.close()
    return {
        "machine": machine(),
        "size_mib": size_mib,
        "clients": CLIENTS,
        "throughput": compared(throughput, "GiB/s"),
        "daemon_cpu": compared(cost.daemon_cpu, "s/GiB"),
        "watch_cpu_share": spread(cost.watch_cpu),
        "downtime": compared(downtime, "ms"),
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    rows = [f"{'':14} {'without':>9} {'quartiles':>16} {'with':>9} {'quartiles':>16}  {'unit':6} {'change':>8}"]
    for name in ("throughput", "daemon_cpu", "downtime"):
        found = result[name]
        cells = []
        for kind in ("without", "with"):
            low, high = found[kind]["quartiles"]
            cells.append(f"{found[kind]['median']:9.3g} {f'{low:.3g} to {high:.3g}':>16}")
        low, high = found["change_ci_pct"]
        change = f"{found['change_pct']:+.1f} % ({low:+.1f} to {high:+.1f})"
        rows.append(f"{name:14} {cells[0]} {cells[1]}  {found['unit']:6} {change}")
    share = result["watch_cpu_share"]["median"] / (os.cpu_count() or 1)
    rows.append(f"watch itself takes {share:.2%} of this machine's processors")
    return "\n".join(rows)


def main() -> int:
    """Run it. Returns the exit status."""
    sizes = [int(os.environ.get(name, default)) for name, default in (
        ("COST_SIZE_MIB", "1024"), ("COST_BULK", "12"), ("COST_SWITCHOVERS", "40"))]  # fmt: skip
    if sizes[1] < 2 or sizes[2] < 2:
        say("COST_BULK and COST_SWITCHOVERS must be 2 or more: a spread needs two samples")
        return 2
    result = asyncio.run(measure(*sizes))
    say("\n" + table(result))
    text = json.dumps(result)
    if out := os.environ.get("COST_OUT"):
        Path(out).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
