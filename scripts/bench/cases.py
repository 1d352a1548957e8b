"""The cases of the benchmark: two real daemons move simulated guests over loopback. The module is longer than others
because all cases share the daemons and guests of one run, and are best compared side by side."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

from migrated.kernel.memory import available_bytes
from migrated.record.parts import Part
from protocol.guest import PAGE_SIZE
from scripts.basics import GIB, MIB
from scripts.bench import pages_left, rivals, tracking
from scripts.bench.pinger import Pinger
from scripts.bench.result import CPU_SIDES, Case
from scripts.rig.host import Host
from scripts.rig.network import Network
from scripts.rig.pair import Pair
from scripts.rig.processes import cpu_s
from scripts.rig.waiting import until

Meanwhile: TypeAlias = Callable[[str, Host, Host], Awaitable[None]]

CHANNELS: Final = (1, 2, 3)
SWITCHOVERS: Final = int(os.environ.get("BENCH_SWITCHOVERS", "100"))
CAP_BYTES_PER_S: Final = 100_000_000
HOT_PAGES: Final = 20_000
FINAL_PAGES: Final = 2_000
PAGES_LEFT_MOVES: Final = 4
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
TRACKED_MIB: Final = 64
RSS_GUESTS: Final = {"256MiB": (256, "100%"), "4GiB": (4096, "25%")}
"""Guests whose move is watched for the daemons' memory: size in MiB, and how much of it they have touched."""
SMALL_MIB: Final = 16
SPARSE_GIB: Final = 64
"""Such a one beside them that has touched 256 MiB; half as large, and so on, where a host would refuse it."""
RSS_POLL_S: Final = 0.01
LINK_CHANNELS: Final = (1, 2)
WIRE_PER_PAYLOAD: Final = 1514 / 1448
"""Bytes of Ethernet, IP and TCP frames for each byte that they carry, with frames of 1500 bytes and timestamps."""


def moving_s(record: dict[str, Any]) -> float:
    """Time of an attempt from the first round to the end; the setup starts a process, which no rival's figure has."""
    return float(record["total_ns"] - record["setup_ns"]) / 1e9


def peak_rss_mib(pid: int) -> float:
    """The largest resident set that a process had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def most_that_fits(memory_mib: int) -> int:
    """Guest memory that a host takes now (MiB): as much as asked for, or that halved as often as needed."""
    while memory_mib * MIB > available_bytes() - GIB:
        memory_mib //= 2
    return memory_mib


def profiled_pair(network: Network | None = None) -> Pair:
    """Two hosts that are not started yet, and take profiles of guests from the pair's directory."""
    pair = Pair(network=network, log={"level": "info"}, tls={"insecure": network is not None})
    for host in pair.hosts:
        host.configure(vmm={"profiles": str(pair.directory)})
    return pair


async def create_guest(pair: Pair, name: str, memory_mib: int, **profile: Any) -> None:
    """Start a guest with a profile of its own, idle if the profile does not say more, on the first host of a
    ``profiled_pair``."""
    values = {"workload": "idle", **profile}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (pair.directory / f"{name}.toml").write_text("\n".join(["[guest]", *lines, ""]))
    await pair.a.create_guest(name, memory_mib, profile=name)


async def booted(host: Host, name: str) -> None:
    """Wait until a guest has filled its memory."""

    async def done() -> bool:
        return not (await host.guest(name))["booting"]

    await until(f"{name} booted", done, 120.0)


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
        self.pair = profiled_pair()
        self._where: dict[str, Host] = {}
        self._qemu: dict[str, rivals.QemuSource] = {}
        self.rss_mib: dict[str, dict[str, float]] = {}
        """The largest memory of their own that both daemons had while a guest of some size moved, by that size."""

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
            await create_guest(self.pair, name, memory_mib, **profile)
            self._where[name] = self.pair.a
            await booted(self.pair.a, name)
        return self._where[name]

    async def stop(self, name: str) -> None:
        """Stop the vCPUs of a guest."""
        await self._where[name].command("x-migrated-guest-pause", {"guest": name})

    async def rest(self) -> None:
        """Stop all guests: those of one case must not take time from the next."""
        for name in self._where:
            await self.stop(name)

    async def move(self, name: str, meanwhile: Meanwhile | None = None, **parameters: Any) -> dict[str, Any]:
        """Migrate a guest to the other host. ``meanwhile`` is called with the guest's name and both hosts while it is
        under way. Returns the record."""
        here = self._where[name]
        there = self.pair.other(here)
        migration_id = await here.begin_migration(name, there, **{"downtime_limit": GENEROUS_MS, **parameters})
        if meanwhile is not None:
            await meanwhile(name, here, there)
        record = await here.wait(migration_id)
        if record["outcome"] != "completed":
            raise rivals.RivalError(f"the migration of {name} was {record['outcome']}: {record['reason']}")
        self._where[name] = there
        return record

    async def _move_with_pages_left(self, name: str, pages: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Migrate a guest that has so many scattered pages left to send when it is stopped. A move that had another
        number is made again, some times. Returns the record, and the processor time that each daemon took (s)."""
        left: list[int] = []
        for _ in range(PAGES_LEFT_MOVES):
            await self.guest(name, self.size_mib, touched="100%", **pages_left.profile(pages))
            rivals.warm(self.size_mib)
            record, spent = await self._timed_move(name, meanwhile=pages_left.stop_by_force, **pages_left.PARAMETERS)
            if pages_left.as_many(record, pages):
                return record, spent
            left.append(record["ram"]["downtime_pages"])
        raise rivals.RivalError(f"{pages} pages should be left when {name} stops; in {len(left)} moves {left} were")

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
            record, spent = await self._timed_move(name, multifd_channels=channels)
            size_gib = self.size_mib * MIB / GIB
            case.note(**{f"channels={channels}": size_gib / moving_s(record)})
            case.note(**{f"channels={channels} {side}": seconds / size_gib for side, seconds in spent.items()})
        best = max(CHANNELS, key=lambda channels: statistics.median(case.details[f"channels={channels}"]))
        case.samples = list(case.details[f"channels={best}"])
        case.details |= {side: list(case.details[f"channels={best} {side}"]) for side in CPU_SIDES}

    async def _timed_move(self, name: str, **parameters: Any) -> tuple[dict[str, Any], dict[str, float]]:
        """Migrate a guest. Returns the record, and the processor time that each daemon took for it (s)."""
        here = self._where[name]
        hosts = (here, self.pair.other(here))
        used = [cpu_s(host.pid) for host in hosts]
        record = await self.move(name, **parameters)
        spent = [cpu_s(host.pid) - before for host, before in zip(hosts, used, strict=True)]
        return record, dict(zip(CPU_SIDES, spent, strict=True))

    # Section: cases. Each takes one sample (or several) into its row.

    async def raw(self) -> None:
        self._rival_sample("raw", await asyncio.to_thread(rivals.raw, self.size_mib))

    def _rival_sample(self, name: str, moved: rivals.Moved) -> None:
        case = self.case(name, "GiB/s")
        case.samples.append(moved.gib_per_s)
        case.note(**dict(zip(CPU_SIDES, (moved.source_s_per_gib, moved.destination_s_per_gib), strict=True)))

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
        self._rival_sample(name, await self._qemu[content].migrate(channels))

    async def random(self) -> None:
        await self._bulk(self.case("random", "GiB/s"), "random")

    async def zero(self) -> None:
        await self._bulk(self.case("zero", "GiB/s"), "zero", content="zero")
        await self.drop("zero")

    async def small_move(self) -> None:
        """A stopped guest of hardly any memory: what a move costs both daemons whatever is moved."""
        await self.guest("small", SMALL_MIB, touched="100%")
        await self.stop("small")
        _, spent = await self._timed_move("small")
        case = self.case("small-move", "s")
        case.samples.append(sum(spent.values()))
        case.note(**{side.removesuffix("_per_gib"): seconds for side, seconds in spent.items()})

    async def sparse(self) -> None:
        memory_mib = most_that_fits(16 * self.size_mib)
        await self._whole("sparse", memory_mib, touched=f"{self.size_mib // 4}MiB")
        self.case("sparse", "s").note(memory_mib=memory_mib)

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
        """A tenth of the guest's pages, every 8th, is left when it stops; they move into memory that is populated
        already."""
        record, spent = await self._move_with_pages_left("scattered", self.size_mib * MIB // PAGE_SIZE // 10)
        took_ns = sum(part["ns"] for part in record["downtime"]["parts"] if part["name"] in MOVING_PARTS)
        self.case("scattered", "GiB/s").samples.append(record["ram"]["downtime_bytes"] / GIB / (took_ns / 1e9))
        sent_gib = record["ram"]["transferred_bytes"] / GIB
        self.case("scattered", "GiB/s").note(
            pages=record["ram"]["downtime_pages"], rounds=len(record["rounds"]),
            **{side: seconds / sent_gib for side, seconds in spent.items()},
        )  # fmt: skip

    async def final_round(self) -> None:
        """2,000 scattered pages are left when the guest stops: from the collect to the vote that they are in place."""
        record, _ = await self._move_with_pages_left("final", FINAL_PAGES)
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

    async def track(self) -> None:
        """Pages that the dirty log reports for each page that the guest wrote, before a move and after it."""
        name = "tracking"
        await self.guest(name, TRACKED_MIB, touched="100%", **tracking.PROFILE)
        case = self.case(name, "ratio")
        for move in range(2):
            if move:
                await self.move(name)
            case.samples.append(await tracking.reported_per_written(self._where[name], name, TRACKED_MIB))

    async def rss(self) -> None:
        """The daemons' own memory while guests of several sizes move; once in a run, since it hardly varies."""
        if self.rss_mib:
            return
        sparse_gib = most_that_fits(SPARSE_GIB * 1024) // 1024
        for name, (memory_mib, touched) in {
            **RSS_GUESTS,
            f"{sparse_gib}GiB-sparse": (1024 * sparse_gib, "256MiB"),
        }.items():
            here = await self.guest(name, memory_mib, touched=touched)
            await self.stop(name)
            hosts = {"source": here, "destination": self.pair.other(here)}
            peak = dict.fromkeys(hosts, 0.0)
            moving = asyncio.ensure_future(self.move(name))
            while not moving.done():
                peak = {side: max(peak[side], host.anonymous_bytes() / MIB) for side, host in hosts.items()}
                await asyncio.sleep(RSS_POLL_S)
            try:
                await moving
            except BaseException:
                del self._where[name]  # nobody knows where it is
                raise
            self.rss_mib[name] = peak
            await self.drop(name)

    async def link_1gbit(self) -> None:
        await self._link("link-1gbit", 1_000_000_000, 256)

    async def link_5gbit(self) -> None:
        await self._link("link-5gbit", 5_000_000_000, 1024)

    async def _link(self, name: str, bits_per_s: int, memory_mib: int) -> None:
        """Which share of a shaped link the first round of a stopped guest uses, headers of its frames included."""
        case = self.case(name, "%")
        with Network(f"{bits_per_s // 1_000_000}mbit") as network, profiled_pair(network) as pair:
            await create_guest(pair, "g1", memory_mib, touched="100%")
            await booted(pair.a, "g1")
            await pair.a.command("x-migrated-guest-pause", {"guest": "g1"})
            here = pair.a
            for channels in LINK_CHANNELS:
                there = pair.other(here)
                used = sum(cpu_s(host.pid) for host in pair.hosts)
                record = await here.migrate("g1", there, multifd_channels=channels, downtime_limit=GENEROUS_MS)
                used = sum(cpu_s(host.pid) for host in pair.hosts) - used
                if record["outcome"] != "completed":
                    raise rivals.RivalError(f"over {name} a migration was {record['outcome']}: {record['reason']}")
                first = record["rounds"][0]
                sent_share = first["bytes"] * WIRE_PER_PAYLOAD * 8 / (first["ns"] / 1e9) / bits_per_s
                case.note(**{f"channels={channels}": 100 * sent_share, "daemons_cpu_share": used / (first["ns"] / 1e9)})
                here = there
        shares = (case.details[f"channels={channels}"] for channels in LINK_CHANNELS)
        case.samples = [max(both) for both in zip(*shares, strict=True)]


CASES: Final[dict[str, Callable[[Bench], Awaitable[None]]]] = {
    "raw": Bench.raw,
    "iperf3": Bench.iperf3,
    "qemu": Bench.qemu,
    "qemu-multifd": Bench.qemu_multifd,
    "random": Bench.random,
    "qemu-zero": Bench.qemu_zero,
    "zero": Bench.zero,
    "small-move": Bench.small_move,
    "sparse": Bench.sparse,
    "touched": Bench.touched,
    "scattered": Bench.scattered,
    "final-round": Bench.final_round,
    "plain-capped": Bench.plain_capped,
    "delta-capped": Bench.delta_capped,
    "downtime-idle": Bench.downtime_idle,
    "downtime-busy": Bench.downtime_busy,
    "loop-lag": Bench.loop_lag,
    "tracking": Bench.track,
    "rss": Bench.rss,
    "link-1gbit": Bench.link_1gbit,
    "link-5gbit": Bench.link_5gbit,
}
