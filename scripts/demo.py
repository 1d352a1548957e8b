"""The first thing to run: a busy guest moves to another daemon and back over TCP, while you watch.

    host a  [ guest "web" ] ==TCP==> host b        and back, each time within 300 ms from stop to run

Two daemons on this machine play two hosts. After each move every byte of the guest's memory is checked against what its
seed and step count say. Exit status 0 only if both moves completed and both checks passed; the last line on standard
output is one JSON object with both records. Every process that was started is ended, whatever happens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from migrated.cli.render import record_view
from migrated.cli.session import console
from migrated.cli.style import duration
from migrated.cli.watch import attend, display
from migrated.control.client import CommandError, ControlClient, DaemonUnreachableError
from migrated.record.reading import read_record
from migrated.report import write_report
from protocol.units import UnitError, format_rate, format_size, parse_duration_ns, parse_rate, parse_size
from scripts.rig.host import Host
from scripts.rig.waiting import RigError

GUEST: Final = "web"
ATTEMPTS: Final = 4
"""On a machine that is busy with other things a limit may not be kept. That costs an attempt, never the guest."""

out = console()


class DemoError(Exception):
    """The demo cannot go on; the sentence says why."""


@contextlib.contextmanager
def running_host(name: str, directory: Path, log_path: Path, **sections: dict[str, Any]) -> Iterator[Host]:
    """A host whose daemon runs; its log is left at ``log_path``. ``sections`` are more of its configuration."""
    host = Host(directory, name)
    host.configure(migration={"timeout_s": 20}, log={"level": "info"}, **sections)
    try:
        host.start()
        yield host
    finally:
        host.close()
        with contextlib.suppress(FileNotFoundError):  # there is none before the daemon has begun
            shutil.copyfile(host.log_path, log_path)


def say(title: str, text: str = "") -> None:
    """A step of the story."""
    out.print()
    out.print(Text(title, style="bold"))
    if text:
        out.print(Text(text))


async def migrate(source: Host, destination: Host, guest: str, limit_ns: int, max_bandwidth: int = 0) -> dict[str, Any]:
    """Migrate a guest once, with live progress; returns the record, whatever became of it."""
    wanted = {
        "guest": guest,
        "uri": destination.uri,
        "downtime-limit": limit_ns / 1e6,
        "max-bandwidth": max_bandwidth,
    }
    async with await ControlClient.connect(source.socket) as client:
        begun = await client.command("migrate", wanted)
        with display(as_json=False, stderr=True, rounds=6) as update:
            record: dict[str, Any] = await attend(client, guest, begun["migration-id"], update)
    return record


async def insist(
    source: Host, destination: Host, limit_ns: int, attempt: Callable[[int], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Try again with twice the limit until an attempt completes; returns its record. ``attempt`` gets the limit."""
    for number in range(ATTEMPTS):
        record = await attempt(limit_ns * 2**number)
        if record["outcome"] == "completed":
            return record
        out.print(Text(f"{record['outcome'].capitalize()}: {record['reason']}", style="yellow"))
        if record["outcome"] == "in-doubt":
            break
        out.print(
            f"The guest runs on on host {source.name}: that is what the limit is for. Again, with twice the limit."
        )
    raise DemoError(f"the guest did not get from host {source.name} to host {destination.name}")


async def move(source: Host, destination: Host, options: argparse.Namespace) -> dict[str, Any]:
    """Migrate the guest, again if need be; returns the record of the attempt that completed."""

    def attempt(limit_ns: int) -> Awaitable[dict[str, Any]]:
        return migrate(source, destination, GUEST, limit_ns, options.max_bandwidth)

    return await insist(source, destination, options.downtime_limit, attempt)


async def check(host: Host, other: Host, record: dict[str, Any]) -> None:
    """Say what the guest noticed, and have every byte of it verified where it runs now."""
    if elsewhere := await other.guests():
        raise DemoError(f"host {other.name} still has a guest: {', '.join(elsewhere)}")
    guest = await host.guest(GUEST)
    downtime, gap_ns = record["downtime"], guest["stop_gap"]["guest_ns"]
    out.print(f"Stopped for {duration(downtime['measured_ns'])}; the limit was {duration(downtime['limit_ns'])}.")
    out.print(f"The guest's own heartbeat, which beats every millisecond, missed {duration(gap_ns)}.")
    verdict = await host.verify(GUEST)
    if not verdict["ok"]:
        raise DemoError(f"the guest is damaged on host {host.name}: {verdict['message']}")
    out.print(Text(f"Verified on host {host.name}: {verdict['message']}", style="green"))


async def demo(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The whole story; returns the document of the last line."""
    with contextlib.ExitStack() as stack:
        say("Two hosts", "Two daemons on this machine, each with its own state, control socket and TCP address.")
        a, b = [
            stack.enter_context(running_host(name, directory / name, options.output / f"host-{name}.log"))
            for name in ("a", "b")
        ]
        out.print(f"Host a takes guests at {a.uri}, host b at {b.uri}.")

        say("A guest")
        spec = {
            "guest": GUEST,
            "memory-bytes": options.memory,
            "profile": options.profile,
            "workload": "hot-cold",
            "dirty-rate-bytes-per-s": options.dirty_rate,
        }
        guest = await a.command("x-migrated-guest-create", spec)
        memory, rate = format_size(guest["memory_bytes"]), format_rate(guest["dirty_rate_bytes_per_s"])
        out.print(f"{GUEST!r} runs on host a, as process {guest['pid']}, with {memory} of memory.")
        out.print(f"It writes {rate}, most of it again and again into a few hot pages.")

        say("There: a -> b", "It runs on while its memory follows in rounds; then it stops, and the budget counts.")
        there = await move(a, b, options)
        await check(b, a, there)

        say("And back: b -> a", "Host a has nothing of it any more, so all of its memory moves again.")
        back = await move(b, a, options)
        await check(a, b, back)
        await a.command("x-migrated-guest-destroy", {"guest": GUEST})

    show_breakdown("a -> b", there)
    show_breakdown("b -> a", back)
    say(f"Left for you in {options.output}")
    keep("there", there, options.output)
    keep("back", back, options.output)
    out.print("there.html, back.html   a report of each migration, to open in a browser or to send on")
    out.print("there.json, back.json   their records;   host-a.log, host-b.log   what the daemons logged")
    return {"demo": "ok", "migrations": [there, back]}


def show_breakdown(way: str, record: dict[str, Any]) -> None:
    """Say where the downtime of a move went."""
    say(f"Where the downtime went: {way}")
    out.print(record_view(read_record(record), details=False))


def keep(name: str, record: dict[str, Any], directory: Path) -> None:
    """Leave a record and its report where the user finds them."""
    (directory / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    write_report(record, directory / f"{name}.html")


def option(
    parser: argparse.ArgumentParser, name: str, metavar: str, parse: Callable[[str], object], default: str, meaning: str
) -> None:
    """Add an option whose values are parsed, and which tells its default."""

    def value(text: str) -> object:
        try:
            return parse(text)
        except UnitError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument(f"--{name}", metavar=metavar, type=value, default=default, help=f"{meaning} [{default}]")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option(parser, "memory", "SIZE", parse_size, "256MiB", "guest memory")
    option(parser, "dirty-rate", "RATE", parse_rate, "100MiB/s", "how fast the guest writes")
    option(parser, "profile", "PROFILE", str, "demo", "a guest profile of configs/guests")
    option(parser, "downtime-limit", "DURATION", parse_duration_ns, "300ms", "the whole budget from stop to run")
    cap = "cap, to have more to watch: 120MiB/s is about 1 Gbit/s; 0 is none"
    option(parser, "max-bandwidth", "RATE", parse_rate, "0", cap)
    option(parser, "output", "DIRECTORY", Path, "run/demo", "where records, reports and logs are left")
    return parser.parse_args()


Story = Callable[[Path], Coroutine[Any, Any, dict[str, Any]]]
"""A demonstration: it gets a temporary directory and returns the document of the last line."""


async def run(story: Story) -> dict[str, Any]:
    """Tell a story, which SIGTERM ends as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # Sockets have short paths only under the temporary directory: a checkout may lie anywhere.
    with tempfile.TemporaryDirectory(prefix="migrated-demo-") as directory:
        return await story(Path(directory))


def perform(story: Story, output: Path, achieved: str = "moved there and back, intact both times") -> int:
    """Tell a story and print its document as the last line, or why it failed. Returns the exit status.

    Args:
        output: where logs are left; made if need be.
        achieved: what a story that came to its end has shown.
    """
    output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    reason = ""
    try:
        document = asyncio.run(run(story))
        say(f"Done in {time.monotonic() - begin:.1f} s: {achieved}.")
        print(json.dumps(document))
        return 0
    except (DemoError, RigError, CommandError, DaemonUnreachableError, OSError) as error:
        reason = str(error).rstrip(".")
    except (KeyboardInterrupt, asyncio.CancelledError):
        reason = "interrupted"
    print(f"The demo failed: {reason}. What the daemons logged is in {output}.", file=sys.stderr)
    print(json.dumps({"demo": "failed", "reason": reason}))
    return 1


def main() -> int:
    """Run the demo."""
    options = parse_options()
    return perform(functools.partial(demo, options), options.output)


if __name__ == "__main__":
    sys.exit(main())
