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
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
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
from scripts.basics import ROOT

GUEST: Final = "web"
ATTEMPTS: Final = 4
"""On a machine that is busy with other things a limit may not be kept. That costs an attempt, never the guest."""
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
PR_SET_CHILD_SUBREAPER: Final = 36

CONFIG: Final = """\
[control]
socket = "{directory}/control.sock"
[state]
directory = "{directory}/state"
[listen]
address = "127.0.0.1:0"
[vmm]
directory = "{directory}/guests"
profiles = "{profiles}"
[migration]
timeout_s = 20
[log]
format = "json"
"""

out = console()


class DemoError(Exception):
    """The demo cannot go on; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """A running daemon: where it takes guests in, and a connection to its control socket."""

    name: str
    address: str
    client: ControlClient


@contextlib.asynccontextmanager
async def running_host(name: str, directory: Path, log_path: Path) -> AsyncIterator[Host]:
    """A daemon with everything of its own in ``directory``; its log goes to ``log_path``."""
    directory.mkdir()
    config = directory / "host.toml"
    config.write_text(CONFIG.format(directory=directory, profiles=ROOT / "configs" / "guests"))
    # Settings for the user's own daemons must not reach this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIGRATED_")}
    command = [sys.executable, "-m", "migrated", "host", "--config", str(config)]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    logging = asyncio.create_task(keep_log(process.stderr, log_path, ready))
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            address = await ready
        async with await ControlClient.connect(directory / "control.sock") as client:
            yield Host(name, address, client)
    except TimeoutError:
        raise DemoError(f"host {name} was not ready within {START_TIMEOUT_S:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(logging, STOP_TIMEOUT_S)


async def keep_log(lines: asyncio.StreamReader, path: Path, ready: asyncio.Future[str]) -> None:
    """Write a daemon's log to a file until it ends; its line ``ready`` tells the address."""
    with path.open("wb") as log:
        async for line in lines:
            log.write(line)
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry["event"] == "ready" and not ready.done():
                    ready.set_result(entry["listen"])
    if not ready.done():
        ready.set_exception(DemoError(f"a daemon did not start; {path} says why"))


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
            "uri": f"tcp:{destination.address}",
            "downtime-limit": options.downtime_limit / 1e6 * 2**attempt,
            "max-bandwidth": options.max_bandwidth,
        }
        begun = await source.client.command("migrate", wanted)
        with display(as_json=False, stderr=True, rounds=6) as update:
            record: dict[str, Any] = await attend(source.client, GUEST, begun["migration-id"], update)
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
    elsewhere = await other.client.command("x-migrated-guest-list")
    if elsewhere:
        raise DemoError(f"host {other.name} still has a guest: {elsewhere}")
    guest = await host.client.command("x-migrated-guest-show", {"guest": GUEST})
    downtime, gap_ns = record["downtime"], guest["stop_gap"]["guest_ns"]
    out.print(f"Stopped for {duration(downtime['measured_ns'])}; the limit was {duration(downtime['limit_ns'])}.")
    out.print(f"The guest's own heartbeat, which beats every millisecond, missed {duration(gap_ns)}.")
    verdict = await host.client.command("x-migrated-guest-verify", {"guest": GUEST})
    if not verdict["ok"]:
        raise DemoError(f"the guest is damaged on host {host.name}: {verdict['message']}")
    out.print(Text(f"Verified on host {host.name}: {verdict['message']}", style="green"))


async def demo(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """The whole story; returns the records of both moves."""
    async with contextlib.AsyncExitStack() as stack:
        say("Two hosts", "Two daemons on this machine, each with its own state, control socket and TCP address.")
        a, b = [
            await stack.enter_async_context(running_host(name, directory / name, options.output / f"host-{name}.log"))
            for name in ("a", "b")
        ]
        out.print(f"Host a takes guests at tcp:{a.address}, host b at tcp:{b.address}.")

        say("A guest")
        spec = {
            "guest": GUEST,
            "memory-bytes": options.memory,
            "profile": options.profile,
            "workload": "hot-cold",
            "dirty-rate-bytes-per-s": options.dirty_rate,
        }
        guest = await a.client.command("x-migrated-guest-create", spec)
        memory, rate = format_size(guest["memory_bytes"]), format_rate(guest["dirty_rate_bytes_per_s"])
        out.print(f"{GUEST!r} runs on host a, as process {guest['pid']}, with {memory} of memory.")
        out.print(f"It writes {rate}, most of it again and again into a few hot pages.")

        say("There: a -> b", "It runs on while its memory follows in rounds; then it stops, and the budget counts.")
        there = await move(a, b, options)
        await check(b, a, there)

        say("And back: b -> a", "Host a has nothing of it any more, so all of its memory moves again.")
        back = await move(b, a, options)
        await check(a, b, back)
        await a.client.command("x-migrated-guest-destroy", {"guest": GUEST})

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


def adopt_orphans() -> None:
    """A guest outlives its daemon by design; this makes it a child of ours then, so that none is left behind."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kill and collect every process that is still below us."""
    while children := _children():
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    own, found = str(os.getpid()), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything; behind the last one come the state and the parent.
            if stat.read_text().rpartition(")")[2].split()[1] == own:
                found.append(int(stat.parent.name))
    return found


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
    option("profile", "PROFILE", str, "demo", "a guest profile of configs/guests")
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
    adopt_orphans()
    reason = ""
    try:
        records = asyncio.run(run(options))
        keep(records, options.output)
        say(f"Done in {time.monotonic() - begin:.1f} s: moved there and back, intact both times.")
        print(json.dumps({"demo": "ok", "migrations": records}))
        return 0
    except (DemoError, CommandError, DaemonUnreachableError, OSError) as error:
        reason = str(error).rstrip(".")
    except (KeyboardInterrupt, asyncio.CancelledError):
        reason = "interrupted"
    finally:
        end_children()
    print(f"The demo failed: {reason}. What the daemons logged is in {options.output}.", file=sys.stderr)
    print(json.dumps({"demo": "failed", "reason": reason}))
    return 1


if __name__ == "__main__":
    sys.exit(main())
