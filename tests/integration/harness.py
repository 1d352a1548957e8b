"""Real daemons and real guests on one machine: hosts to start, kill and stop, and the questions that every test asks
of them: did two copies of a guest ever run, was anything left behind, did anything fall over.

    with Pair() as pair:
        await pair.a.create_guest("g1")
        record = await pair.a.migrate("g1", pair.b)
        assert (await pair.b.verify("g1"))["ok"]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from migrated.control.client import CommandError, ControlClient, DaemonUnreachableError
from vmm_sim.client import VmmClient, VmmGone

ROOT: Final = Path(__file__).parents[2]
MIB: Final = 1 << 20
START_TIMEOUT_S: Final = 60.0
SETTLE_TIMEOUT_S: Final = 30.0
COMMAND_TIMEOUT_S: Final = 40.0
"""For one command: a migration may be waited for. Below the time that pytest gives a test, which would end nothing."""
POLL_S: Final = 0.01
_LIBUV_THREADS: Final = 4

QUICK_LIMITS: Final = {
    "heartbeat_interval_s": 0.25,
    "heartbeat_timeout_s": 1.0,
    "ready_timeout_s": 2.0,
    "outcome_retry_s": 0.2,
    "tcp_user_timeout_s": 2.0,
    "connect_timeout_s": 2.0,
    "handshake_timeout_s": 15.0,
    "round_timeout_s": 5.0,
    "stop_timeout_s": 1.0,
}
"""Bounds of waits for tests that cut and kill."""

_BUG_EVENTS: Final = frozenset(
    {"a background task failed", "the migration failed unexpectedly", "the incoming migration failed unexpectedly"}
)

Found = TypeVar("Found")


class HarnessError(Exception):
    """Something that the test relies on did not happen; the sentence says what."""


async def until(what: str, probe: Callable[[], Awaitable[Found | None]], timeout_s: float = SETTLE_TIMEOUT_S) -> Found:
    """The first result of ``probe`` that is true.

    Raises:
        HarnessError: there was none in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := await probe()):
        if time.monotonic() > deadline:
            raise HarnessError(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(POLL_S)
    return found


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds: descriptors by kind, mappings of guest memory, threads."""

    descriptors: Counter[str]
    mapped_memories: int
    threads: int


def footprint(pid: int) -> Footprint:
    """What a process holds now."""
    kinds: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(entry.path)
            kinds[target.partition(":")[0] if target.startswith(("socket:", "pipe:")) else target] += 1
    mapped = sum("/memfd:" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return Footprint(kinds, mapped, len(os.listdir(f"/proc/{pid}/task")))


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def _line(entry: dict[str, Any]) -> str:
    """A log entry for people, with the frames of its exceptions."""
    hidden = ("migration_id", "peer", "exception")
    text = " ".join(str(value) for key, value in entry.items() if key not in hidden)
    for raised in entry.get("exception", ()):
        frames = " < ".join(f"{frame['filename']}:{frame['lineno']}" for frame in raised["frames"][::-1])
        text += f"\n    {raised['exc_type']}: {raised['exc_value']} at {frames}"
    return text


class Host:
    """One host: a daemon process, its directory, and the guests that it starts.

    Args:
        directory: short, since socket paths are limited; owned by the caller.
        name: for messages.
        role: role of the daemon.
        sections: further configuration, section by section.
    """

    def __init__(self, directory: Path, name: str, *, role: str = "host", **sections: dict[str, Any]) -> None:
        self.directory = directory
        self.name = name
        self.role = role
        self.port = 0
        self.deaths: dict[int, int] = {}
        """When guest processes that were killed here were gone (CLOCK_MONOTONIC, ns)."""
        self._sections = sections
        self._process: subprocess.Popen[bytes] | None = None
        self._log_mark = 0
        self._baseline: Footprint | None = None
        directory.mkdir(parents=True, exist_ok=True)

    # Section: the daemon

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.directory / "control.sock"

    @property
    def uri(self) -> str:
        """Where guests are sent to reach this host."""
        return f"tcp:127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        if self._process is None:
            raise HarnessError(f"the daemon of host {self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the daemon's process runs."""
        return self._process is not None and self._process.poll() is None

    def write_config(self) -> Path:
        """Write the configuration file, with the port that the daemon got the first time."""
        sections: dict[str, dict[str, Any]] = {
            "control": {"socket": str(self.socket)},
            "state": {"directory": str(self.directory / "state")},
            "listen": {"address": f"127.0.0.1:{self.port}"},
            "vmm": {"directory": str(self.directory / "guests"), "profiles": str(ROOT / "configs" / "guests")},
            "log": {"level": "debug", "format": "json", "file": str(self.directory / "log")},
        }
        for section, values in self._sections.items():
            sections.setdefault(section, {}).update(values)
        lines: list[str] = []
        for section, values in sections.items():
            lines.append(f"[{section}]")
            lines.extend(f"{key} = {json.dumps(value)}" for key, value in values.items())
        path = self.directory / "config.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def start(self) -> None:
        """Start the daemon and wait until it says that it is ready.

        Raises:
            HarnessError: it ended, or never was ready.
        """
        mark = self._log_size()
        path = self.write_config()
        with (self.directory / "stderr").open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "migrated", self.role, "--config", str(path)],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while (ready := next((e for e in self.log(mark) if e["event"] == "ready"), None)) is None:
            if not self.running or time.monotonic() > deadline:
                raise HarnessError(f"the daemon of host {self.name} did not start:\n{self.log_tail()}")
            time.sleep(POLL_S)
        self.port = int(str(ready["listen"]).rpartition(":")[2]) if ready["listen"] != "-" else 0

    def signal(self, number: int) -> None:
        """Send the daemon a signal (SIGSTOP, SIGCONT)."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the daemon's process at once, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self._wait_end()

    def stop(self, timeout_s: float = 30.0) -> int:
        """Let the daemon stop in order. Returns its exit status."""
        self.signal(signal.SIGTERM)
        return self._wait_end(timeout_s)

    def _wait_end(self, timeout_s: float = 10.0) -> int:
        if self._process is None:
            raise HarnessError(f"the daemon of host {self.name} was not started")
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise HarnessError(f"the daemon of host {self.name} does not end:\n{self.log_tail()}") from error

    def restart(self) -> None:
        """Start the daemon again after its end, at the same port."""
        self.start()

    # Section: its log

    def _log_size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "log").stat().st_size
        return 0

    def log(self, mark: int = 0) -> list[dict[str, Any]]:
        """The daemon's log lines from byte ``mark`` on."""
        try:
            data = (self.directory / "log").read_bytes()[mark:]
        except FileNotFoundError:
            return []
        entries: list[dict[str, Any]] = []
        for line in data.splitlines():
            with contextlib.suppress(ValueError):  # the last line may be half written
                entries.append(json.loads(line))
        return entries

    def log_tail(self, count: int = 40) -> str:
        """The end of the log and of standard error, for people."""
        lines = [_line(entry) for entry in self.log()[-count:]]
        with contextlib.suppress(FileNotFoundError):
            lines += (self.directory / "stderr").read_text(errors="replace").splitlines()[-count:]
        return f"-- host {self.name}\n" + "\n".join(lines)

    def bugs(self) -> list[str]:
        """What no fault may cause, since the last call: unexpected exceptions, and anything on standard error."""
        found = [
            f"host {self.name}: {_line(entry)}"
            for entry in self.log(self._log_mark)
            if entry["event"] in _BUG_EVENTS or "logger" in entry
        ]
        self._log_mark = self._log_size()
        path = self.directory / "stderr"
        if path.exists() and path.stat().st_size:
            found.append(f"host {self.name}: standard error: {path.read_text(errors='replace')[:2000]}")
            path.write_bytes(b"")
        return found

    # Section: commands

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Execute one command over a connection of its own.

        Raises:
            CommandError, DaemonUnreachableError: as the client raises them.
            HarnessError: no answer came in time.
        """
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S), await ControlClient.connect(self.socket) as client:
                return await client.command(name, arguments)
        except TimeoutError as error:
            raise HarnessError(f"host {self.name} did not answer {name} within {COMMAND_TIMEOUT_S:g} s") from error

    async def create_guest(self, name: str = "g1", memory_mib: int = 64, **arguments: Any) -> dict[str, Any]:
        """Start a guest. ``arguments`` as QMP names with ``_`` for ``-``."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return dict(
            await self.command("x-migrated-guest-create", {"guest": name, "memory-bytes": memory_mib * MIB, **given})
        )

    async def guests(self) -> dict[str, dict[str, Any]]:
        """All guests of the host by name."""
        return {guest["name"]: guest for guest in await self.command("x-migrated-guest-list")}

    async def guest(self, name: str = "g1") -> dict[str, Any]:
        """One guest, with everything its VMM says."""
        return dict(await self.command("x-migrated-guest-show", {"guest": name}))

    async def verify(self, name: str = "g1") -> dict[str, Any]:
        """Check every byte of a guest."""
        return dict(await self.command("x-migrated-guest-verify", {"guest": name}))

    async def begin_migration(self, name: str, to: Host | str, **parameters: Any) -> str:
        """Start to migrate a guest. ``parameters`` as QMP names with ``_`` for ``-``. Returns the migration id."""
        uri = to if isinstance(to, str) else to.uri
        given = {key.replace("_", "-"): value for key, value in parameters.items()}
        answer = await self.command("migrate", {"guest": name, "uri": uri, **given})
        return str(answer["migration-id"])

    async def wait(self, migration_id: str) -> dict[str, Any]:
        """The record of an attempt, once it ended or is in doubt."""
        return dict(await self.command("x-migrated-wait", {"migration-id": migration_id}))

    async def migrate(self, name: str, to: Host | str, **parameters: Any) -> dict[str, Any]:
        """Migrate a guest and return the record."""
        return await self.wait(await self.begin_migration(name, to, **parameters))

    async def record(self, migration_id: str) -> dict[str, Any] | None:
        """A record from the history, None when there is none."""
        try:
            return dict(await self.command("x-migrated-show", {"migration-id": migration_id}))
        except CommandError as error:
            if error.kind != "DeviceNotFound":
                raise
            return None

    async def progress(self, name: str = "g1") -> dict[str, Any] | None:
        """The guest's latest migration, None when there was none since the daemon's start."""
        found = await self.command("x-migrated-status", {"guest": name, "rounds": 1})
        return dict(found[-1]) if found else None

    async def until_status(self, name: str, *statuses: str) -> dict[str, Any]:
        """The guest's latest migration once it has one of the statuses."""

        async def reached() -> dict[str, Any] | None:
            found = await self.progress(name)
            return found if found is not None and found["status"] in statuses else None

        return await until(f"migration of {name} {' or '.join(statuses)}", reached)

    # Section: guest processes

    def vmm_pids(self) -> dict[int, str]:
        """Process ids of the guest processes of this host, with the names of their guests."""
        found: dict[int, str] = {}
        marker = os.fsencode(str(self.directory / "guests")) + b"/"
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                arguments = path.read_bytes().split(b"\0")
                if b"--api-socket" in arguments:
                    socket = arguments[arguments.index(b"--api-socket") + 1]
                    if socket.startswith(marker):
                        found[int(path.parent.name)] = Path(os.fsdecode(socket)).stem
        return found

    def kill_vmm(self, name: str = "g1") -> None:
        """Kill the process of a guest and wait until it is gone."""
        for pid, guest in self.vmm_pids().items():
            if guest == name:
                self._kill_pid(pid)

    def _kill_pid(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while is_alive(pid):
            if time.monotonic() > deadline:
                raise HarnessError(f"guest process {pid} of host {self.name} does not end")
            time.sleep(0.001)
        self.deaths[pid] = time.monotonic_ns()

    async def vmm(self, name: str = "g1") -> VmmClient:
        """A connection to a guest's VMM, beside the daemon's."""
        return await VmmClient.connect(self.directory / "guests" / f"{name}.sock")

    def run_log(self, name: str = "g1") -> list[dict[str, Any]]:
        """What the guest's processes on this host wrote of their running."""
        try:
            lines = (self.directory / "guests" / f"{name}.runlog").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    # Section: what may not be left

    def take_baseline(self) -> None:
        """Count what the idle daemon holds without guests."""
        self._baseline = footprint(self.pid)

    def excess(self, guests: int) -> list[str]:
        """What the daemon holds beyond its baseline and ``guests`` guests at rest."""
        if self._baseline is None:
            return []
        held = footprint(self.pid)
        expected = self._baseline.descriptors + Counter({"socket": guests, "anon_inode:[pidfd]": guests})
        over = held.descriptors - expected
        found = [f"host {self.name}: {count} more of {kind}" for kind, count in over.items()]
        if held.mapped_memories:
            found.append(f"host {self.name}: {held.mapped_memories} guest memories are still mapped")
        # Executors may have grown to their full size, asyncio's and libuv's; a thread per migration would pass it soon.
        allowed = self._baseline.threads + min(32, (os.cpu_count() or 1) + 4) + _LIBUV_THREADS
        if held.threads > allowed:
            found.append(f"host {self.name}: {held.threads} threads, at most {allowed} are expected")
        return found

    async def leftovers(self) -> list[str]:
        """What is left behind when nothing runs: descriptors, mappings, threads, guest processes without a guest, open
        attempts. Empty when all is well; waits a while for what is still being let go."""
        guests = await self.guests()
        known = {guest["pid"] for guest in guests.values()}

        def found() -> list[str]:
            strangers = [f"{name} (pid {pid})" for pid, name in self.vmm_pids().items() if pid not in known]
            return self.excess(len(guests)) + [f"host {self.name}: no guest has process {one}" for one in strangers]

        async def clean() -> bool:
            return not found()

        with contextlib.suppress(HarnessError):
            await until("clean", clean, 10.0)
        return found()

    def close(self) -> None:
        """End the daemon and every guest process of this host."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            try:
                self.stop(10.0)
            except HarnessError:
                self.kill()
        for pid in self.vmm_pids():
            self._kill_pid(pid)


class Pair:
    """Two hosts that migrate to each other, in a directory that goes with them.

    Args:
        quick: short bounds of waits, for tests that cut and kill.
        limits: further ``[limits]``.
        shared_lock: one directory of ownership locks for both, as on shared storage.
        sections: further configuration of both daemons, section by section.
    """

    def __init__(
        self, *, quick: bool = False, limits: dict[str, Any] | None = None, shared_lock: bool = False,
        **sections: dict[str, Any],
    ) -> None:  # fmt: skip
        self.directory = Path(tempfile.mkdtemp(prefix="mig-"))
        all_limits = {**(QUICK_LIMITS if quick else {}), **(limits or {})}
        common = {"limits": all_limits, **sections}
        if shared_lock:
            common["lock"] = {"directory": str(self.directory / "locks")}
        self.a = Host(self.directory / "a", "a", **common)
        self.b = Host(self.directory / "b", "b", **common)

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both."""
        return self.a, self.b

    def other(self, host: Host) -> Host:
        """The other one."""
        return self.b if host is self.a else self.a

    def start(self) -> None:
        """Start both daemons."""
        for host in self.hosts:
            host.start()
            host.take_baseline()

    async def where(self, name: str = "g1") -> dict[str, dict[str, Any]]:
        """The guest as each host that has it lists it, by the host's name."""
        found = {}
        for host in self.hosts:
            guests = await host.guests()
            if name in guests:
                found[host.name] = guests[name]
        return found

    async def settled(self, name: str = "g1", timeout_s: float = SETTLE_TIMEOUT_S) -> Host | None:
        """The one host that has the guest once no migration of it is open on either side, None when it is gone."""

        async def at_rest() -> tuple[Host | None] | None:
            having: list[Host] = []
            try:
                for host in self.hosts:
                    guest, progress = (await host.guests()).get(name), await host.progress(name)
                    if progress is not None and progress["status"] not in ("completed", "failed", "cancelled"):
                        return None
                    if guest is not None:
                        if guest["migration_id"] or guest["state"] not in ("running", "paused"):
                            return None
                        having.append(host)
            except (CommandError, DaemonUnreachableError):
                return None  # a guest's process has just ended, or a daemon is starting
            return (having[0] if having else None,) if len(having) <= 1 else None

        return (await until(f"guest {name} at rest on one host", at_rest, timeout_s))[0]

    async def remove_guests(self) -> None:
        """Destroy every guest, once its migrations have ended."""
        for host in self.hosts:
            for name in await host.guests():
                with contextlib.suppress(CommandError):
                    await host.command("migrate_cancel", {"guest": name})
        for host in self.hosts:

            async def empty(host: Host = host) -> bool:
                for name in await host.guests():
                    with contextlib.suppress(CommandError):
                        await host.command("x-migrated-guest-destroy", {"guest": name})
                return not await host.guests()

            await until(f"host {host.name} without guests", empty)
        self.forget_runs()

    def forget_runs(self) -> None:
        """Remove the run logs: the next guest of a name is another guest."""
        for host in self.hosts:
            for path in (host.directory / "guests").glob("*.runlog"):
                path.unlink()

    def double_runs(self, name: str = "g1") -> list[str]:
        """Every instant at which two processes of the guest ran, and every step that was lost or executed twice, by
        what the guest's own processes wrote. Empty when all is well."""
        deaths = {pid: at for host in self.hosts for pid, at in host.deaths.items()}
        return check_runs({host.name: host.run_log(name) for host in self.hosts}, deaths)

    async def leftovers(self) -> list[str]:
        """What is left behind, and what fell over, on both hosts."""
        found: list[str] = []
        for host in self.hosts:
            found += host.bugs()
            found += await host.leftovers()
        return found

    def log_tail(self, count: int = 40) -> str:
        """The end of both logs, for people."""
        return "\n".join(host.log_tail(count) for host in self.hosts)

    def close(self) -> None:
        """End everything and remove the directory."""
        try:
            for host in self.hosts:
                host.close()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class RunInterval:
    """One stretch of running of one guest process (CLOCK_MONOTONIC, ns); ``end_step`` is None when it was killed."""

    host: str
    pid: int
    begin_ns: int
    begin_step: int
    end_ns: int | None
    end_step: int | None


def run_intervals(host: str, entries: Iterable[dict[str, Any]], deaths: dict[int, int]) -> list[RunInterval]:
    """The stretches of running in one run log.

    Args:
        deaths: when processes that could not write their end were gone.
    """
    found: list[RunInterval] = []
    open_runs: dict[int, dict[str, Any]] = {}
    for entry in entries:
        pid = entry["pid"]
        begun = open_runs.pop(pid, None)
        if begun is not None:
            found.append(
                RunInterval(host, pid, begun["monotonic_ns"], begun["step"], entry["monotonic_ns"], entry["step"])
            )
        if entry["event"] == "run":
            open_runs[pid] = entry
    for pid, begun in open_runs.items():
        found.append(RunInterval(host, pid, begun["monotonic_ns"], begun["step"], deaths.get(pid), None))
    return found


def check_runs(logs: dict[str, list[dict[str, Any]]], deaths: dict[int, int]) -> list[str]:
    """Compare the run logs of all processes of one guest: no two may run at once, and each must go on at the step at
    which the one before it stopped."""
    runs = sorted(
        (run for host, entries in logs.items() for run in run_intervals(host, entries, deaths)),
        key=lambda run: run.begin_ns,
    )
    found: list[str] = []
    longest: RunInterval | None = None  # of those that began before: the one that ended last
    for earlier, later in zip([None, *runs], runs, strict=False):
        if longest is not None and (longest.end_ns is None or longest.end_ns > later.begin_ns):
            found.append(f"two copies ran at once: {longest} and {later}")
        elif earlier is not None and earlier.end_step is not None and earlier.end_step != later.begin_step:
            found.append(f"steps were lost or repeated: {earlier} and then {later}")
        if longest is None or (longest.end_ns is not None and (later.end_ns is None or later.end_ns > longest.end_ns)):
            longest = later
    return found


__all__ = [
    "MIB", "QUICK_LIMITS", "ROOT", "CommandError", "DaemonUnreachableError", "Footprint", "HarnessError", "Host",
    "Pair", "RunInterval", "VmmGone", "check_runs", "footprint", "is_alive", "run_intervals", "until",
]  # fmt: skip
