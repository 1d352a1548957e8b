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
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
def running_host(name: str, directory: Path, log_path: Path) -> Iterator[Host]:
    """A host whose daemon runs; its log is left at ``log_path``."""
    host = Host(directory, name, migration={"timeout_s": 20}, log={"level": "info"})
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


async def move(source: Host, destination: Host, options: argparse.Namespace) -> dict[str, Any]:
    """Migrate the guest with live progress; returns the record of the attempt that completed."""
    for attempt in range(ATTEMPTS):
        wanted = {
            "guest": GUEST,
            "uri": destination.uri,
            "downtime-limit": options.downtime_limit / 1e6 * 2**attempt,
            "max-bandwidth": options.max_bandwidth,
        }
        async with await ControlClient.connect(source.socket) as client:
            begun = await client.command("migrate", wanted)
            with display(as_json=False, stderr=True, rounds=6) as update:
                record: dict[str, Any] = await attend(client, GUEST, begun["migration-id"], update)
        if record["outcome"] == "completed":
            return record
        out.print(Text(f"{record['outcome'].capitalize()}: {record['reason']}", style="yellow"))
        if record["outcome"] == "in-doubt":
            break
        out.print(
            f"The guest runs on on host {source.name}: that is what the limit is for. Again, with twice the limit."
        )
    raise DemoError(f"the guest did not get from host {source.name} to host {destination.name}")


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


async def demo(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """The whole story; returns the records of both moves."""
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

    for title, record in (("Where the downtime went: a -> b", there), ("Where the downtime went: b -> a", back)):
        say(title)
        out.print(record_view(read_record(record), details=False))
    return [there, back]


def keep(records: list[dict[str, Any]], directory: Path) -> None:
    """Leave records and reports where the user finds them."""
    say(f"Left for you in {directory}")
    for name, record in zip(("there", "back"), records, strict=True):
        (directory / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        write_report(record, directory / f"{name}.html")
    out.print("there.html, back.html   a report of each migration, to open in a browser or to send on")
    out.print("there.json, back.json   their records;   host-a.log, host-b.log   what the daemons logged")


def parse_options() -> argparse.Namespace:
    """The command line."""

    def option(name: str, metavar: str, parse: Callable[[str], object], default: str, meaning: str) -> None:
        def value(text: str) -> object:
            try:
                return parse(text)
            except UnitError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        shown = f"{meaning} [{default}]"
        parser.add_argument(f"--{name}", metavar=metavar, type=value, default=default, help=shown)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option("memory", "SIZE", parse_size, "256MiB", "guest memory")
    option("dirty-rate", "RATE", parse_rate, "100MiB/s", "how fast the guest writes")
    option("profile", "PROFILE", str, "demo", "a guest profile of configs/guests, or the path of one")
    option("downtime-limit", "DURATION", parse_duration_ns, "300ms", "the whole budget from stop to run")
    option(
        "max-bandwidth", "RATE", parse_rate, "0", "cap, to have more to watch: 120MiB/s is about 1 Gbit/s; 0 is none"
    )
    option("output", "DIRECTORY", Path, "run/demo", "where records, reports and logs are left")
    return parser.parse_args()


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The demo, which SIGTERM ends as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # Sockets have short paths only under the temporary directory: a checkout may lie anywhere.
    with tempfile.TemporaryDirectory(prefix="migrated-demo-") as directory:
        return await demo(options, Path(directory))


def main() -> int:
    """Run the demo."""
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    reason = ""
    try:
        records = asyncio.run(run(options))
        keep(records, options.output)
        say(f"Done in {time.monotonic() - begin:.1f} s: moved there and back, intact both times.")
        print(json.dumps({"demo": "ok", "migrations": records}))
        return 0
    except (DemoError, RigError, CommandError, DaemonUnreachableError, OSError) as error:
        reason = str(error).rstrip(".")
    except (KeyboardInterrupt, asyncio.CancelledError):
        reason = "interrupted"
    print(f"The demo failed: {reason}. What the daemons logged is in {options.output}.", file=sys.stderr)
    print(json.dumps({"demo": "failed", "reason": reason}))
    return 1


if __name__ == "__main__":
    sys.exit(main())
