"""A real Linux guest in stock QEMU moves to another daemon and back over TCP, beside QEMU's own migration of it.

    host a  [ QEMU, guest "web" ] ==TCP==> host b        and back, each time within 300 ms from stop to run
    QEMU    [ the same guest    ] ==TCP==> QEMU          by QEMU alone, which is asked for the same

The guest has the distribution's kernel and one program, which writes memory, checks every page against what it wrote,
and beats every millisecond; the beats are listened to from outside, so that what the guest noticed is told by nobody
who moves it. The first guest is started as anyone would start it and adopted, the others come of a definition; all have
private memory. Exit status 0 only if each guest found all its pages right after each move and the digests of its memory
were equal; 3 if this machine lacks what QEMU guests need, which is then named: nothing is installed. The last line on
standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from migrated.cli.style import duration
from migrated.kernel.tracking import why_no_tracking
from migrated.report import write_page
from protocol.units import parse_duration_ns
from scripts.basics import say as warn
from scripts.demo import DemoError, insist, keep, migrate, option, out, perform, running_host, say, show_breakdown
from scripts.qemu_rig.baseline import Baseline, DamagedGuestError, booted, migrate_with_qemu, surviving
from scripts.qemu_rig.console import Console
from scripts.qemu_rig.definition import console_paths, write_definition
from scripts.qemu_rig.figures import Comparison, Failure, Move, document, html, remarks, text_table
from scripts.qemu_rig.gaps import handover_gap, said_twice
from scripts.qemu_rig.image import GuestImage, guest_image
from scripts.qemu_rig.kernel import MISSING, missing_packages
from scripts.qemu_rig.launcher import BOOT_TIMEOUT_S, QemuSpec
from scripts.qemu_rig.workload import WORKLOADS
from scripts.rig.host import Host
from scripts.rig.waiting import RigError, until

_WARM_BEATS: Final = 200
_BEATS_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the demonstration happens: two hosts, the directories of their definitions, and the guest's image."""

    hosts: tuple[Host, Host]
    definitions: tuple[Path, Path]
    image: GuestImage
    directory: Path

    def define(self, name: str, spec: QemuSpec) -> None:
        """Write a guest's definition on both hosts."""
        for number, definitions in enumerate(self.definitions):
            write_definition(definitions, name, spec, self.image, number)


async def listen(host: Host, name: str) -> Console:
    """The console of a guest on a host, from the moment on at which its QEMU has one. May be cancelled before that."""
    paths = console_paths(host.directory / "guests", name)

    async def there() -> bool:
        return all(path.exists() for path in paths)

    await until(f"QEMU of guest {name} on host {host.name}", there)
    return await asyncio.to_thread(Console, *paths)


@contextlib.asynccontextmanager
async def adopted(stage: Stage, name: str, spec: QemuSpec) -> AsyncIterator[Console]:
    """A guest that was started without a thought of migration, and then taken over by the first host."""
    host = stage.hosts[0]
    async with booted(spec, stage.image, stage.directory / f"stock-{name}") as qemu:
        out.print(f"Started as anyone would: qemu-system-x86_64 -m {spec.memory_mib}M ..., process {qemu.pid}.")
        await qemu.release_monitor()
        await host.command("x-migrated-guest-adopt", {"guest": name, "qmp": str(qemu.qmp_socket)})
        out.print(f"Adopted by host {host.name} through its QMP socket; it ran on.")
        yield qemu.console


@contextlib.asynccontextmanager
async def defined(stage: Stage, name: str) -> AsyncIterator[Console]:
    """A guest that the first host starts from its definition."""
    host = stage.hosts[0]
    guest = await host.command("x-migrated-guest-create", {"guest": name, "definition": name})
    with await listen(host, name) as console:
        await asyncio.to_thread(console.wait_for, "READY", BOOT_TIMEOUT_S)
        await asyncio.to_thread(console.wait_for_beats, _WARM_BEATS, BOOT_TIMEOUT_S)
        out.print(f"Started by host {host.name} from its definition, process {guest['pid']}.")
        yield console


async def move(
    stage: Stage, name: str, way: tuple[Host, Host], console: Console, limit_ns: int
) -> tuple[Move, Console]:
    """Move a guest and have it check itself. Returns also its console where it is now."""
    source, destination = way
    arrived: Console | None = None

    async def attempt(limit_ns: int) -> dict[str, Any]:
        nonlocal arrived
        # What the guest says before anyone listens is lost, so this listens before it runs there.
        listening = asyncio.create_task(listen(destination, name))
        try:
            record = await migrate(source, destination, name, limit_ns)
            if record["outcome"] == "completed":
                arrived = await listening
        finally:
            if arrived is None:
                await forget(listening)
        return record

    record = await insist(source, destination, limit_ns, attempt)
    if arrived is None:
        raise DemoError(f"guest {name} has no console on host {destination.name}")
    await asyncio.to_thread(arrived.wait_for_beats, _WARM_BEATS, _BEATS_TIMEOUT_S)
    before, after = console.beats(), arrived.beats()
    if twice := said_twice(before, after):
        raise DemoError(f"guest {name} ran twice: it said beat {twice[0]} on both hosts")
    found = Move(record, handover_gap(before, after))
    await verify(name, destination, arrived, found)
    return found, arrived


async def forget(listening: asyncio.Task[Console]) -> None:
    """Stop waiting for a console of an attempt that did not complete."""
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError, RigError):
        (await listening).close()


async def verify(name: str, host: Host, console: Console, found: Move) -> None:
    """Have the guest check every page of its own, compare the digests, and tell what it noticed."""
    bad = await asyncio.to_thread(console.check)
    if bad or console.complaints():
        raise DemoError(f"guest {name} is damaged on host {host.name}: {bad} bad pages; {console.complaints()}")
    digest, downtime = found.record["digest"], found.record["downtime"]
    if digest["source"] != digest["destination"]:
        raise DemoError(f"the digests of the memory of guest {name} differ: {digest}")
    out.print(f"Stopped for {duration(downtime['measured_ns'])}; the limit was {duration(downtime['limit_ns'])}.")
    out.print(
        f"Its beats, heard from outside, were silent for {duration(found.gap.ns)}; its clock stood for "
        f"{duration(found.gap.stood_ns)} of that."
    )
    checked = f"It checked every page on host {host.name} and found all of them right; digests of all memory are equal."
    out.print(Text(checked, style="green"))


async def look(host: Host, name: str) -> None:
    """Have the host look for everything that could break its promise, and tell what is not in order."""
    rows = await host.command("x-migrated-guest-check", {"guest": name})
    worries = [row for row in rows if row["verdict"] != "ok"]
    out.print(f"Host {host.name} looked at {len(rows)} things that could break its promise; {len(worries)} to mention.")
    for row in worries:
        out.print(Text(f"{row['name']}, {row['verdict']}: {row['sentence']}.", style="yellow"))


async def there_and_back(stage: Stage, name: str, console: Console, limit_ns: int) -> dict[str, Move]:
    """Move a guest to the second host and back, and end it."""
    a, b = stage.hosts
    say(f"There: {name}, a -> b")
    there, on_b = await move(stage, name, (a, b), console, limit_ns)
    with on_b:
        say(f"And back: {name}, b -> a")
        back, on_a = await move(stage, name, (b, a), on_b, limit_ns)
    with on_a:
        await a.command("x-migrated-guest-destroy", {"guest": name})
    return {"a -> b": there, "b -> a": back}


async def by_qemu(stage: Stage, name: str, spec: QemuSpec, limit_ms: int) -> Baseline | Failure:
    """QEMU's own migration of an equal guest, or how it failed: that is a result too."""
    say(f"QEMU's own migration of {name}", "An equal guest, stock QEMU to stock QEMU over loopback, nothing of ours.")
    directory = stage.directory / f"own-{name}"
    try:
        try:
            own = await migrate_with_qemu(spec, stage.image, directory / "first", limit_ms)
        except DamagedGuestError as error:
            out.print(Text(str(error), style="yellow"))
            out.print(
                "The guest did not survive it: QEMU before 9.0 may lose what an emulated guest writes meanwhile. With "
                "8 KiB more memory, so that QEMU reads its log page by page, it does:"
            )
            own = await migrate_with_qemu(surviving(spec), stage.image, directory / "second", limit_ms)
    except RigError as error:
        out.print(Text(str(error), style="yellow"))
        return Failure(limit_ms, str(error))
    out.print(
        f"QEMU reports {own.reported_downtime_ms} ms; the beats were silent for {duration(own.observed_gap_ns)}; the "
        f"guest's clock stood for {duration(own.stood_ns)} of that."
    )
    return own


async def compare(stage: Stage, name: str, adopt: bool, limit_ns: int) -> Comparison:
    """Everything with one guest, whose name is that of its workload."""
    spec = QemuSpec(workload=WORKLOADS[name])
    stage.define(name, spec)
    writes = spec.workload.rate_mib_per_s
    say(f"A Linux guest: {name}", f"{spec.memory_mib} MiB of private memory; its program writes {writes} MiB/s.")
    async with adopted(stage, name, spec) if adopt else defined(stage, name) as console:
        await look(stage.hosts[0], name)
        moves = await there_and_back(stage, name, console, limit_ns)
    return Comparison(name, moves, await by_qemu(stage, name, spec, limit_ns // 1_000_000))


async def demo(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The whole story; returns the document of the last line."""
    with contextlib.ExitStack() as stack:
        say("Two hosts", "Two daemons on this machine, each with its own state and its own definitions of guests.")
        definitions = (directory / "definitions-a", directory / "definitions-b")
        # Memory of guests that arrive; on tmpfs, as on a real host.
        ram = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{directory.name}-", dir="/dev/shm"))
        a, b = (
            stack.enter_context(
                running_host(
                    name,
                    directory / name,
                    options.output / f"host-{name}.log",
                    vmm={"driver": "qemu"},
                    qemu={"definitions": str(own), "ram_directory": ram},
                )
            )
            for name, own in zip("ab", definitions, strict=True)
        )
        stage = Stage((a, b), definitions, await asyncio.to_thread(guest_image), directory)
        compared = [
            await compare(stage, name, number == 0, options.downtime_limit)
            for number, name in enumerate(options.workloads)
        ]
    for one in compared:
        for way, moved in one.moves.items():
            show_breakdown(f"{one.guest}, {way}", dict(moved.record))
    leave(compared, options.output)
    return document(compared)


def leave(compared: list[Comparison], directory: Path) -> None:
    """Show the comparison, and leave it with records and reports where the user finds them."""
    setting = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, guests emulated (TCG)."
    say("Promised, reported, noticed", setting)
    out.print(text_table(compared))
    for remark in remarks(compared):
        out.print(Text(remark))
    say(f"Left for you in {directory}")
    for one in compared:
        for word, moved in zip(("there", "back"), one.moves.values(), strict=True):
            keep(f"{one.guest}-{word}", dict(moved.record), directory)
    write_page("QEMU guests moved by two daemons and by QEMU", html(compared, setting), directory / "comparison.html")
    out.print("comparison.html   the table above;   GUEST-there.html, GUEST-back.html   a report of each migration")
    out.print("GUEST-there.json, GUEST-back.json   their records;   host-a.log, host-b.log   what the daemons logged")


def lacks() -> dict[str, Any]:
    """Return what this machine lacks: ``packages`` by name and a ``reason`` for people. Empty if it lacks nothing."""
    if packages := missing_packages():
        return {"packages": packages, "reason": f"install these packages first: {' '.join(packages)}"}
    if os.geteuid() != 0:
        return {"packages": [], "reason": "run it as root, who may follow the writes of a process of somebody else"}
    if (reason := why_no_tracking()) is not None:
        return {"packages": [], "reason": reason}
    return {}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=["idle", "hot-cold"],
        help="what the guests do, each a guest of its own; the first one is adopted [idle hot-cold]",
    )
    option(parser, "downtime-limit", "DURATION", parse_duration_ns, "300ms", "the whole budget from stop to run")
    option(parser, "output", "DIRECTORY", Path, "run/demo-qemu", "where records, reports and logs are left")
    return parser.parse_args()


def main() -> int:
    """Run the demonstration."""
    options = parse_options()
    if lacking := lacks():
        warn(f"QEMU guests cannot be moved on this machine yet: {lacking['reason']}.")
        print(json.dumps({"demo": "missing", **lacking}))
        return MISSING
    return perform(functools.partial(demo, options), options.output)


if __name__ == "__main__":
    sys.exit(main())
