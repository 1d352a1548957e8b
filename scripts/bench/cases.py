"""The cases of the benchmark: two real daemons move simulated guests over loopback."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from migrated.record.parts import Part
from protocol.guest import PAGE_SIZE
from scripts.basics import GIB, MIB
from scripts.bench import rivals
from scripts.bench.pinger import Pinger
from scripts.bench.result import Case
from scripts.rig.host import Host
from scripts.rig.pair import Pair
from scripts.rig.waiting import until

CHANNELS: Final = (1, 2, 3)
SWITCHOVERS: Final = int(os.environ.get("BENCH_SWITCHOVERS", "100"))
CAP_BYTES_PER_S: Final = 100_000_000
HOT_PAGES: Final = 20_000
FINAL_PAGES: Final = 2_000
GENEROUS_MS: Final = 5_000
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


def moving_s(record: dict[str, Any]) -> float:
    """Time of an attempt from the first round to the end; the setup starts a process, which no rival's figure has."""
    return float(record["total_ns"] - record["setup_ns"]) / 1e9


def peak_rss_mib(pid: int) -> float:
    """The largest resident set that a process had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


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
        for host in self.pair.hosts:
            host.configure(vmm={"profiles": str(self.pair.directory)})  # daemons take profiles from there only
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
            await self.pair.a.create_guest(name, memory_mib, profile=name)
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
        pages = self.size_mib * MIB // PAGE_SIZE
        rate = self.size_mib * MIB // 4  # all of them are dirty again within half a second
        await self.guest(
            "scattered", self.size_mib, touched="100%", workload="stride", stride=8, working_set_pages=pages - 1,
            dirty_rate=f"{rate}/s",
        )  # fmt: skip
        rivals.warm(self.size_mib)
        record = await self.move("scattered", downtime_limit=1, timeout_s=2, on_timeout="force", switchover_abort=False)
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
        await self._capped("delta-capped", {"xor_delta": True, "xor_delta_cache_bytes": 2 * HOT_PAGES * PAGE_SIZE})

    async def _capped(self, name: str, encoding: dict[str, Any]) -> None:
        """64 bytes change in each of 20,000 hot pages all the time, over a link of 100 MB/s; the sample is the time
        that the attempt's traffic takes on that link. What does not converge in 10 s is stopped by force."""
        await self.guest(
            name, 256, touched=f"{(HOT_PAGES + 64) * PAGE_SIZE}", workload="delta", working_set_pages=HOT_PAGES + 1,
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
