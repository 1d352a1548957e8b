#!/usr/bin/env python3
"""The side-by-side benchmark: migrated, the bare socket, iperf3 and stock QEMU, interleaved in one run.

    python scripts/bench.py          table on stderr, one JSON object on stdout

Every repetition runs every case once, so that what disturbs the machine disturbs all of them; figures are medians, and
what counts is their ratios. Two real daemons move simulated guests over loopback, driven through the control socket.

    BENCH_SIZE_MIB   guest memory of the bulk cases (1024)
    BENCH_REPEATS    repetitions (5)
    BENCH_SWITCHOVERS of each of the downtime cases, over all repetitions (100)
    BENCH_CASES      comma list of cases (all)
    BENCH_OUT        also write the JSON there, and a plot beside it
    BENCH_HUGE_PAGES 0: leave the host's setting for huge pages of shared memory alone, do not measure with them (1)

On a virtual machine the first touch of memory that the host has not backed yet is ten times slower, and free memory
may be given back to the host within seconds: before every sample as much memory is touched and freed as it uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import bench_rivals as rivals  # noqa: E402 - beside this file
from bench_plot import plot  # noqa: E402

from migrated.record.parts import Part  # noqa: E402 - in the checkout
from tests.integration.harness import Host, Pair, until  # noqa: E402

MIB: Final = 1 << 20
GIB: Final = 1 << 30
PAGE: Final = 4096
SHMEM_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
CHANNELS: Final = (1, 2, 3)
SWITCHOVERS: Final = int(os.environ.get("BENCH_SWITCHOVERS", "100"))
CAP_BYTES_PER_S: Final = 100_000_000
HOT_PAGES: Final = 20_000
FINAL_PAGES: Final = 2_000
GENEROUS_MS: Final = 5_000
PING_S: Final = 0.001


def say(text: str) -> None:
    """Tell a person."""
    print(text, file=sys.stderr, flush=True)


@dataclass(slots=True)
class Case:
    """One row of the result."""

    name: str
    unit: str
    samples: list[float] = field(default_factory=list)
    details: dict[str, list[float]] = field(default_factory=dict)
    """Further figures of the same samples, by name."""

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)

    def note(self, **figures: float) -> None:
        """Keep further figures of a sample."""
        for name, value in figures.items():
            self.details.setdefault(name, []).append(value)

    def document(self) -> dict[str, Any]:
        """As the result shows it."""
        document: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "samples": self.samples,
            "median": self.median,
        }
        if len(self.samples) >= 20:
            document |= {
                "p50": quantile(self.samples, 0.5),
                "p99": quantile(self.samples, 0.99),
                "max": max(self.samples),
            }
        return document | ({"details": self.details} if self.details else {})


def quantile(samples: list[float], q: float) -> float:
    """The smallest sample that at least a share of ``q`` does not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, int(np.ceil(q * len(ordered))) - 1))]


class Bench:
    """The daemons, the guests that stay over all repetitions, and the cases.

    Args:
        size_mib: guest memory of the bulk cases.
        repeats: how many times each case is sampled; of switchovers and pings there are more.
    """

    def __init__(self, size_mib: int, repeats: int) -> None:
        self.size_mib = size_mib
        self.repeats = repeats
        self.cases: dict[str, Case] = {}
        self.pair = Pair(log={"level": "info"})
        self._where: dict[str, Host] = {}
        self._qemu: dict[str, rivals.QemuSource] = {}

    def close(self) -> None:
        """End everything that was started."""
        for source in self._qemu.values():
            source.close()
        self.pair.close()

    def case(self, name: str, unit: str) -> Case:
        """The row of that name."""
        return self.cases.setdefault(name, Case(name, unit))

    # Section: guests

    async def guest(self, name: str, memory_mib: int, **profile: Any) -> Host:
        """The host on which a guest runs, which is started the first time it is asked for. See ``rest``."""
        if name in self._where:
            await self._where[name].command("x-migrated-guest-resume", {"guest": name})
        else:
            path = self.pair.directory / f"{name}.toml"
            values = {"workload": "idle", **profile}
            path.write_text("[guest]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
            await self.pair.a.create_guest(name, memory_mib, profile=str(path))
            self._where[name] = self.pair.a
            await until(f"{name} booted", partial(self._booted, name), 120.0)
        return self._where[name]

    async def _booted(self, name: str) -> bool:
        return not (await self.pair.a.guest(name))["booting"]

    async def stop(self, name: str) -> None:
        """Stop the vCPUs of a guest."""
        await self._where[name].command("x-migrated-guest-pause", {"guest": name})

    async def rest(self) -> None:
        """Stop all guests: those of one case must not take time from the next."""
        for name in self._where:
            await self.stop(name)

    async def move(self, name: str, **parameters: Any) -> dict[str, Any]:
        """Migrate a guest to the other host. Returns the record."""
        here = self._where[name]
        record = await here.migrate(name, self.pair.other(here), **{"downtime_limit": GENEROUS_MS, **parameters})
        if record["outcome"] != "completed":
            raise rivals.RivalError(f"the migration of {name} was {record['outcome']}: {record['reason']}")
        self._where[name] = self.pair.other(here)
        return record

    async def drop(self, name: str) -> None:
        """End a guest, checked once more byte for byte."""
        host = self._where.pop(name)
        verdict = await host.verify(name)
        if not verdict["ok"]:
            raise rivals.RivalError(f"guest {name} is damaged: {verdict['message']}")
        await host.command("x-migrated-guest-destroy", {"guest": name})

    async def drop_all(self) -> None:
        """End all guests."""
        for name in list(self._where):
            await self.drop(name)

    async def _bulk(self, case: Case, name: str, **profile: Any) -> None:
        """One migration of a stopped guest, as QEMU's is, with each number of channels; the sample is that of the
        number that is best so far."""
        for channels in CHANNELS:
            if profile.get("content") == "zero" and name in self._where:
                await self.drop(name)  # zero pages arrive as memory that was never touched: they travel once
            await self.guest(name, self.size_mib, touched="100%", **profile)
            await self.stop(name)
            rivals.warm(self.size_mib)
            record = await self.move(name, multifd_channels=channels)
            case.note(**{f"channels={channels}": self.size_mib * MIB / GIB / moving_s(record)})
        best = max(CHANNELS, key=lambda channels: statistics.median(case.details[f"channels={channels}"]))
        case.samples = list(case.details[f"channels={best}"])

    # Section: cases. Each takes one sample (or several) into its row.

    async def raw(self) -> None:
        self.case("raw", "GiB/s").samples.append(await asyncio.to_thread(rivals.raw, self.size_mib))

    async def iperf3(self) -> None:
        self.case("iperf3", "GiB/s").samples.append(await asyncio.to_thread(rivals.iperf3))

    async def qemu(self) -> None:
        await self._rival("qemu", "random", 1)

    async def qemu_multifd(self) -> None:
        await self._rival("qemu-multifd", "random", 2)

    async def qemu_zero(self) -> None:
        await self._rival("qemu-zero", "zero", 1)

    async def _rival(self, name: str, content: str, channels: int) -> None:
        if content not in self._qemu:
            self._qemu[content] = rivals.QemuSource(self.pair.directory, self.size_mib, content)
        rivals.warm(self.size_mib)
        self.case(name, "GiB/s").samples.append(await self._qemu[content].migrate(channels))

    async def random(self) -> None:
        await self._bulk(self.case("random", "GiB/s"), "random")

    async def zero(self) -> None:
        await self._bulk(self.case("zero", "GiB/s"), "zero", content="zero")
        await self.drop("zero")

    async def sparse(self) -> None:
        await self._whole("sparse", 16 * self.size_mib, touched=f"{self.size_mib // 4}MiB")

    async def touched(self) -> None:
        await self._whole("touched", self.size_mib // 4, touched="100%")

    async def _whole(self, name: str, memory_mib: int, **profile: Any) -> None:
        """Total time, setup and all."""
        await self.guest(name, memory_mib, **profile)
        rivals.warm(self.size_mib // 4)
        record = await self.move(name)
        case = self.case(name, "s")
        case.samples.append(record["total_ns"] / 1e9)
        case.note(moving_s=moving_s(record), daemons_rss_mib=max(peak_rss_mib(host.pid) for host in self.pair.hosts))

    async def scattered(self) -> None:
        """A guest goes on dirtying every 8th page until it is stopped by force; what is dirty then moves into memory
        that is populated already."""
        pages = self.size_mib * MIB // PAGE
        rate = self.size_mib * MIB // 4  # all of them are dirty again within half a second
        await self.guest(
            "scattered", self.size_mib, touched="100%", workload="stride", stride=8, working_set_pages=pages - 1,
            dirty_rate=f"{rate}/s",
        )  # fmt: skip
        rivals.warm(self.size_mib)
        record = await self.move(
            "scattered", downtime_limit=10, timeout_s=2, on_timeout="force", switchover_abort=False
        )
        took_ns = sum(part["ns"] for part in record["downtime"]["parts"] if part["name"] in MOVING_PARTS)
        self.case("scattered", "GiB/s").samples.append(record["ram"]["downtime_bytes"] / GIB / (took_ns / 1e9))
        self.case("scattered", "GiB/s").note(pages=record["ram"]["downtime_pages"], rounds=len(record["rounds"]))

    async def final_round(self) -> None:
        """2,000 scattered pages are left when the guest stops: from the collect to the vote that they are in place."""
        await self.guest(
            "final", self.size_mib, workload="stride", stride=8, working_set_pages=8 * FINAL_PAGES,
            dirty_rate=f"{64 * MIB}/s",
        )  # fmt: skip
        rivals.warm(self.size_mib // 2)
        record = await self.move("final")
        parts = {part["name"]: part["ns"] / 1e6 for part in record["downtime"]["parts"]}
        case = self.case("final-round", "ms")
        case.samples.append(sum(ms for name, ms in parts.items() if name in FINAL_PARTS))
        case.note(pages=record["ram"]["downtime_pages"], downtime_ms=record["downtime"]["measured_ns"] / 1e6, **parts)

    async def plain_capped(self) -> None:
        await self._capped("plain-capped", {})

    async def delta_capped(self) -> None:
        await self._capped("delta-capped", {"xor_delta": True, "xor_delta_cache_bytes": 2 * HOT_PAGES * PAGE})

    async def _capped(self, name: str, encoding: dict[str, Any]) -> None:
        """64 bytes change in each of 20,000 hot pages all the time, over a link of 100 MB/s; the sample is the time
        that the attempt's traffic takes on that link. What does not converge in 10 s is stopped by force."""
        await self.guest(
            name, 256, touched=f"{(HOT_PAGES + 64) * PAGE}", workload="delta", working_set_pages=HOT_PAGES + 1,
            hot_pages=HOT_PAGES, dirty_rate=f"{200 * MIB}/s",
        )  # fmt: skip
        record = await self.move(
            name, max_bandwidth=CAP_BYTES_PER_S, downtime_limit=300, timeout_s=10, on_timeout="force",
            switchover_abort=False, **encoding,
        )  # fmt: skip
        traffic = record["ram"]["transferred_bytes"]
        case = self.case(name, "s")
        case.samples.append(traffic / CAP_BYTES_PER_S)
        case.note(
            traffic_bytes=traffic, downtime_ms=record["downtime"]["measured_ns"] / 1e6, rounds=len(record["rounds"]),
            final_round_bytes=record["ram"]["downtime_bytes"],
        )  # fmt: skip

    async def downtime_idle(self) -> None:
        await self._switchovers("downtime-idle", workload="idle")

    async def downtime_busy(self) -> None:
        await self._switchovers("downtime-busy", workload="hot-cold", dirty_rate=f"{50 * MIB}/s")

    async def _switchovers(self, name: str, **profile: Any) -> None:
        """Many migrations there and back of a guest without costs of devices."""
        await self.guest(name, self.size_mib, touched="25%", **profile)
        case = self.case(name, "ms")
        for _ in range(-(-SWITCHOVERS // self.repeats)):
            record = await self.move(name, downtime_limit=300, timeout_s=10, on_timeout="force", switchover_abort=False)
            downtime = record["downtime"]
            case.samples.append(downtime["measured_ns"] / 1e6)
            case.note(**{part["name"]: part["ns"] / 1e6 for part in downtime["parts"]})

    async def loop_lag(self) -> None:
        """How long the sending daemon's control socket takes to answer while bulk runs. For comparison, how late this
        machine wakes a process that only sleeps meanwhile."""
        here = await self.guest("random", self.size_mib, touched="100%")
        rivals.warm(self.size_mib)
        pinger = Pinger(here.socket)
        pinger.start()
        try:
            await self.move("random", multifd_channels=max(CHANNELS))
        finally:
            pinger.stop()
        self.case("loop-lag", "ms").samples += pinger.answers_ms
        self.case("bare-wake", "ms").samples += pinger.wakes_ms


MOVING_PARTS: Final = frozenset(
    part.label for part in (Part.FINAL_PAGES, Part.DEVICE_SAVES, Part.PAGES_AFTER_SAVES, Part.LAST_PAGES_LEG)
)
"""Parts of a downtime in which the last pages are on their way."""
FINAL_PARTS: Final = frozenset(
    part.label
    for part in (
        Part.FENCE,
        Part.FINAL_DIRTY_LOG_READ,
        Part.FINAL_PAGES,
        Part.DIRTY_LOG_READ_AFTER_SAVES,
        Part.PAGES_AFTER_SAVES,
        Part.LAST_PAGES_LEG,
        Part.STATE_END_AND_READY_LEGS,
    )
)
"""Parts of a downtime that pass while the last pages are on their way, until the destination is known to have them."""


class Pinger(threading.Thread):
    """Asks a daemon for its version once a millisecond, until it is stopped."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(path))
        self._replies = self._connection.makefile("rb")
        self._replies.readline()  # the greeting
        self._ask("qmp_capabilities")
        self._ending = False
        self.answers_ms: list[float] = []
        self.wakes_ms: list[float] = []
        """How much longer than asked for it slept between its questions."""

    def _ask(self, command: str) -> None:
        self._connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while b'"event"' in self._replies.readline():
            pass

    def run(self) -> None:
        while not self._ending:
            begin = time.perf_counter()
            self._ask("query-version")
            answered = time.perf_counter()
            self.answers_ms.append((answered - begin) * 1e3)
            time.sleep(PING_S)
            self.wakes_ms.append((time.perf_counter() - answered - PING_S) * 1e3)

    def stop(self) -> None:
        """End it."""
        self._ending = True
        self.join()
        self._connection.close()


def moving_s(record: dict[str, Any]) -> float:
    """Time of an attempt from the first round to the end; the setup starts a process, which no rival's figure has."""
    return float(record["total_ns"] - record["setup_ns"]) / 1e9


def peak_rss_mib(pid: int) -> float:
    """The largest resident set that a process had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


CASES: Final[dict[str, Callable[[Bench], Awaitable[None]]]] = {
    "raw": Bench.raw,
    "iperf3": Bench.iperf3,
    "qemu": Bench.qemu,
    "qemu-multifd": Bench.qemu_multifd,
    "random": Bench.random,
    "qemu-zero": Bench.qemu_zero,
    "zero": Bench.zero,
    "sparse": Bench.sparse,
    "touched": Bench.touched,
    "scattered": Bench.scattered,
    "final-round": Bench.final_round,
    "plain-capped": Bench.plain_capped,
    "delta-capped": Bench.delta_capped,
    "downtime-idle": Bench.downtime_idle,
    "downtime-busy": Bench.downtime_busy,
    "loop-lag": Bench.loop_lag,
}
ON_HUGE_PAGES: Final = ("raw", "qemu", "qemu-multifd", "random")
RATIOS: Final = (
    ("random", "raw"),
    ("random", "iperf3"),
    ("random", "qemu"),
    ("random", "qemu-multifd"),
    ("zero", "qemu-zero"),
    ("sparse", "touched"),
    ("scattered", "random"),
    ("plain-capped", "delta-capped"),
)


def missing(name: str, size_mib: int) -> str | None:
    """Why a case cannot run here, None when it can."""
    if name.startswith("qemu") and not rivals.installed(rivals.QEMU):
        return f"{rivals.QEMU} is not installed"
    if name == "iperf3" and not rivals.installed("iperf3"):
        return "iperf3 is not installed"
    free_mib = os.sysconf("SC_AVPHYS_PAGES") * PAGE // MIB
    if free_mib < 5 * size_mib:
        return f"{free_mib} MiB of memory are free, at least {5 * size_mib} are needed"
    return None


async def measure(names: list[str], size_mib: int, repeats: int, skipped: dict[str, str]) -> dict[str, Case]:
    """Run the cases, interleaved. What fails is named in ``skipped`` and tried no more."""
    bench = Bench(size_mib, repeats)
    task = asyncio.current_task()
    assert task is not None
    # Told to end, it must not leave daemons and busy guests behind.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        bench.pair.start()
        for repeat in range(repeats):
            for name in names:
                if name in skipped:
                    continue
                begin = time.monotonic()
                try:
                    await CASES[name](bench)
                    await bench.rest()
                except Exception as error:  # one case must not cost the others
                    skipped[name] = f"failed: {error}"
                    bench.cases.pop(name, None)
                shown = f"{bench.cases[name].median:.3g}" if name in bench.cases else skipped[name]
                say(f"  {repeat + 1}/{repeats} {name:14} {shown:>10}   {time.monotonic() - begin:.1f} s")
        await bench.drop_all()
    finally:
        bench.close()
    return bench.cases


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Let shared memory have huge pages when it asks for them; afterwards the host's own setting is back."""
    text = SHMEM_HUGE.read_text()
    before = text[text.index("[") + 1 : text.index("]")]
    SHMEM_HUGE.write_text("advise")
    try:
        yield
    finally:
        SHMEM_HUGE.write_text(before)


def ratios_of(cases: dict[str, Case]) -> dict[str, float]:
    """Ratios of medians, as far as both cases ran."""
    return {
        f"{mine}/{other}": round(cases[mine].median / cases[other].median, 3)
        for mine, other in RATIOS
        if mine in cases and other in cases
    }


def block(cases: dict[str, Case]) -> dict[str, Any]:
    """Cases and ratios as the result shows them."""
    return {"cases": [case.document() for case in cases.values()], "ratios": ratios_of(cases)}


def table(cases: dict[str, Case]) -> str:
    """For people."""
    rows = [f"{'case':15} {'median':>10} {'min':>10} {'max':>10}  unit"]
    for case in cases.values():
        tail = f"   p99 {quantile(case.samples, 0.99):.3g}" if len(case.samples) >= 20 else ""
        low, high = min(case.samples), max(case.samples)
        rows.append(f"{case.name:15} {case.median:10.3g} {low:10.3g} {high:10.3g}  {case.unit}{tail}")
    rows += [f"{name:31} {value:.3g}" for name, value in ratios_of(cases).items()]
    return "\n".join(rows)


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.machine(),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * PAGE // MIB,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "shmem_enabled": SHMEM_HUGE.read_text().strip() if SHMEM_HUGE.exists() else None,
        "load_at_start": os.getloadavg()[0],
    }


def main() -> int:
    """Run it. Returns the exit status."""
    size_mib, repeats = int(os.environ.get("BENCH_SIZE_MIB", "1024")), int(os.environ.get("BENCH_REPEATS", "5"))
    names = [name for name in os.environ.get("BENCH_CASES", "").split(",") if name] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        say(f"BENCH_CASES names unknown cases: {', '.join(unknown)}; there are {', '.join(CASES)}")
        return 2
    result: dict[str, Any] = {"machine": machine(), "size_mib": size_mib, "repeats": repeats}
    skipped = {name: reason for name in names if (reason := missing(name, size_mib)) is not None}
    cases = asyncio.run(measure(names, size_mib, repeats, skipped))
    result |= block(cases) | {"skipped": skipped}
    say("\n" + table(cases))
    if os.environ.get("BENCH_HUGE_PAGES", "1") != "0":
        huge_names = [name for name in ON_HUGE_PAGES if name in cases]
        if huge_names and os.access(SHMEM_HUGE, os.W_OK):
            with huge_pages():
                huge = asyncio.run(measure(huge_names, size_mib, repeats, {}))
            result["with_huge_pages"] = block(huge)
            say("\nwith huge pages for shared memory (shmem_enabled = advise):\n" + table(huge))
        elif huge_names:
            skipped["with_huge_pages"] = f"{SHMEM_HUGE} cannot be written; run as root to measure with huge pages too"
    for name, reason in skipped.items():
        say(f"skipped {name}: {reason}")
    text = json.dumps(result)
    if out := os.environ.get("BENCH_OUT"):
        Path(out).write_text(text + "\n")
        Path(out).with_suffix(".svg").write_text(plot(result))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
