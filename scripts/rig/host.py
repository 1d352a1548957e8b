"""One host: a real daemon to start, kill and stop, commands for it, and the real guests that it runs.

The module is longer than others because tests do all that a host can do through this one class.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Final

from migrated.control.client import CommandError, ControlClient, DaemonUnreachableError
from migrated.settings.config import ENV_PREFIX
from scripts.basics import MIB, ROOT
from scripts.rig.processes import Footprint, anonymous_bytes, footprint, is_alive
from scripts.rig.waiting import POLL_S, RigError, until
from vmm_sim.client import VmmClient

START_TIMEOUT_S: Final = 60.0
GUEST_START_TIMEOUT_S: Final = 30.0
"""A busy machine may take longer than the ten seconds that a guest has by default."""
COMMAND_TIMEOUT_S: Final = 40.0
"""For one command: a migration may be waited for. Below the time that pytest gives a test, which would end nothing."""
CANCEL_S: Final = 0.2
_LIBUV_THREADS: Final = 4

_BUG_EVENTS: Final = frozenset(
    {"a background task failed", "the migration failed unexpectedly", "the incoming migration failed unexpectedly"}
)


def _line(entry: dict[str, Any]) -> str:
    """A log entry for people, with the frames of its exceptions."""
    hidden = ("migration_id", "peer", "exception")
    text = " ".join(str(value) for key, value in entry.items() if key not in hidden)
    for raised in entry.get("exception", ()):
        frames = " < ".join(f"{frame['filename']}:{frame['lineno']}" for frame in raised["frames"][::-1])
        text += f"\n    {raised['exc_type']}: {raised['exc_value']} at {frames}"
    return text


def _api_socket(arguments: list[str]) -> Path | None:
    """Where a guest process listens by its arguments; None for any other process."""
    for option, value in pairwise(arguments):
        if option == "--api-socket":
            return Path(value)
        if option == "-qmp" and value.startswith("unix:"):
            return Path(value.removeprefix("unix:").partition(",")[0])
    return None


class Host:
    """One host: a daemon process, its directory, and the guests that it starts.

    Args:
        directory: short, since socket paths are limited; owned by the caller.
        name: for messages.
        role: role of the daemon.
        namespace, address: the network namespace that the daemon and its guests run in, and the host's address there.
        sections: further configuration, section by section.
    """

    program: ClassVar[tuple[str, ...]] = ("-m", "migrated")
    """Arguments of the interpreter that start a daemon."""

    def __init__(
        self, directory: Path, name: str, *, role: str = "host", namespace: str | None = None,
        address: str = "127.0.0.1", **sections: dict[str, Any],
    ) -> None:  # fmt: skip
        self.directory = directory
        self.name = name
        self.role = role
        self.port = 0
        self.deaths: dict[int, int] = {}
        """When guest processes that were killed here were gone (CLOCK_MONOTONIC, ns)."""
        self.address = address
        self._enter = [] if namespace is None else ["ip", "netns", "exec", namespace]
        self._sections = sections
        self._process: subprocess.Popen[bytes] | None = None
        self._start_mark = 0
        """Where in the log its latest start begins."""
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
        return f"tcp:{self.address}:{self.port}"

    @property
    def unix_socket(self) -> Path:
        """Where a source on this machine reaches this host, to hand memory over."""
        return self.directory / "listen.sock"

    @property
    def unix_uri(self) -> str:
        """The same as a URI."""
        return f"unix:{self.unix_socket}"

    @property
    def log_path(self) -> Path:
        """The daemon's log, lines of JSON."""
        return self.directory / "log"

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        if self._process is None:
            raise RigError(f"the daemon of host {self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the daemon's process runs."""
        return self._process is not None and self._process.poll() is None

    def configure(self, **sections: dict[str, Any]) -> None:
        """Set sections of the configuration in place of what they were; they count from the next start or reload on."""
        self._sections.update(sections)

    def write_config(self) -> Path:
        """Write the configuration file, with the port that the daemon got the first time."""
        sections: dict[str, dict[str, Any]] = {
            "control": {"socket": str(self.socket)},
            "state": {"directory": str(self.directory / "state")},
            "listen": {"address": f"{self.address}:{self.port}", "unix": str(self.unix_socket)},
            "vmm": {
                "directory": str(self.directory / "guests"),
                "profiles": str(ROOT / "configs" / "guests"),
                "start_timeout_s": GUEST_START_TIMEOUT_S,
            },
            "log": {"level": "debug", "format": "json", "file": str(self.log_path)},
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
            RigError: it ended, or never was ready.
        """
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start the daemon's process; ``wait_ready`` waits for it."""
        self._start_mark = self._log_size()
        path = self.write_config()
        # Settings for the user's own daemons must not reach this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        with (self.directory / "stderr").open("ab") as stderr:
            self._process = subprocess.Popen(
                [*self._enter, sys.executable, *self.program, self.role, "--config", str(path)],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Wait until the daemon that was launched says that it is ready.

        Raises:
            RigError: it ended, or never was ready.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while (ready := next((e for e in self.log(self._start_mark) if e["event"] == "ready"), None)) is None:
            if not self.running or time.monotonic() > deadline:
                raise RigError(f"the daemon of host {self.name} did not start:\n{self.log_tail()}")
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
            raise RigError(f"the daemon of host {self.name} was not started")
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RigError(f"the daemon of host {self.name} does not end:\n{self.log_tail()}") from error

    def restart(self) -> None:
        """Start the daemon again after its end, at the same port."""
        self.start()

    def anonymous_bytes(self) -> int:
        """Memory of the daemon that is its own, not a guest's."""
        return anonymous_bytes(self.pid)

    # Section: its log

    def _log_size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self.log_path.stat().st_size
        return 0

    def log(self, mark: int = 0) -> list[dict[str, Any]]:
        """The daemon's log lines from byte ``mark`` on."""
        try:
            data = self.log_path.read_bytes()[mark:]
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
        """Return effects that no fault may have, since the last call: unexpected exceptions, and anything on standard
        error."""
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
            RigError: no answer came in time.
        """
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S), await ControlClient.connect(self.socket) as client:
                return await client.command(name, arguments)
        except TimeoutError as error:
            raise RigError(f"host {self.name} did not answer {name} within {COMMAND_TIMEOUT_S:g} s") from error

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

    def cancel(self, name: str = "g1") -> None:
        """Have the guest's migration cancelled, from any thread; does not wait longer than a moment for the answer."""

        async def ask() -> None:
            with contextlib.suppress(CommandError, DaemonUnreachableError, RigError):
                await self.command("migrate_cancel", {"guest": name})

        asking = threading.Thread(target=asyncio.run, args=[ask()], daemon=True)
        asking.start()
        asking.join(CANCEL_S)

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

    async def begin_replacement(self, name: str = "g1", **parameters: Any) -> str:
        """Start to give a guest another VMM on this host. Returns the migration id."""
        given = {key.replace("_", "-"): value for key, value in parameters.items()}
        return str((await self.command("x-migrated-replace", {"guest": name, **given}))["migration-id"])

    async def replace(self, name: str = "g1", **parameters: Any) -> dict[str, Any]:
        """Give a guest another VMM on this host and return the record."""
        return await self.wait(await self.begin_replacement(name, **parameters))

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
        """Process ids of the guest processes of this host, simulated ones and QEMUs that a daemon started, with the
        names of their guests."""
        found: dict[int, str] = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                socket = _api_socket(os.fsdecode(path.read_bytes()).split("\0"))
                if socket is not None and socket.is_relative_to(self.directory / "guests"):
                    found[int(path.parent.name)] = socket.stem.removesuffix("~")
        return found

    def kill_vmm(self, name: str = "g1") -> None:
        """Kill the process of a guest and wait until it is gone."""
        for pid, guest in self.vmm_pids().items():
            if guest == name:
                self.kill_process(pid)

    def kill_process(self, pid: int) -> None:
        """Kill one guest process of this host and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while is_alive(pid):
            if time.monotonic() > deadline:
                raise RigError(f"guest process {pid} of host {self.name} does not end")
            time.sleep(0.001)
        self.deaths[pid] = time.monotonic_ns()

    async def vmm(self, name: str = "g1") -> VmmClient:
        """A connection to a guest's VMM, beside the daemon's."""
        return await VmmClient.connect(self.directory / "guests" / f"{name}.sock")

    def run_log(self, name: str = "g1") -> list[dict[str, Any]]:
        """Return the entries of the guest's run logs, which its processes on this host wrote, in order of time."""
        entries: list[dict[str, Any]] = []
        for place in (name, f"{name}~"):
            with contextlib.suppress(FileNotFoundError):
                lines = (self.directory / "guests" / f"{place}.runlog").read_text(encoding="utf-8").splitlines()
                entries += [json.loads(line) for line in lines]
        return sorted(entries, key=lambda entry: int(entry["monotonic_ns"]))

    def forget_everything(self) -> None:
        """Remove what the daemon, which does not run, and its guests have kept."""
        for kept in ("guests", "state"):
            for path in (self.directory / kept).rglob("*"):
                if not path.is_dir():
                    path.unlink()

    # Section: what may not be left

    def take_baseline(self) -> None:
        """Count what the idle daemon holds without guests."""
        self._baseline = footprint(self.pid)

    def excess(self, guests: int) -> list[str]:
        """Return what the daemon holds beyond its baseline and ``guests`` guests at rest: descriptors, mappings,
        threads."""
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
        """Return the things that are left behind when nothing runs: descriptors, mappings, threads, guest processes
        without a guest, open attempts. Empty when all is well; waits a while for what is still being let go."""
        guests = await self.guests()
        known = {guest["pid"] for guest in guests.values()}

        def found() -> list[str]:
            strangers = [f"{name} (pid {pid})" for pid, name in self.vmm_pids().items() if pid not in known]
            return self.excess(len(guests)) + [f"host {self.name}: no guest has process {one}" for one in strangers]

        async def clean() -> bool:
            return not found()

        with contextlib.suppress(RigError):
            await until("clean", clean, 10.0)
        return found()

    def close(self) -> None:
        """End the daemon and every guest process of this host."""
        self.ask_to_end()
        self.end()

    def ask_to_end(self) -> None:
        """Tell the daemon, if it runs, to stop in order; ``end`` waits for it."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
                self.signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait for the end of a daemon that was told to stop, or kill it; then kill every guest process of this
        host."""
        if self.running:
            try:
                self._wait_end()
            except RigError:
                self.kill()
        for pid in self.vmm_pids():
            self.kill_process(pid)


def start_side_by_side(hosts: Iterable[Host]) -> None:
    """Start daemons at once, and wait until all of them are ready.

    Raises:
        RigError: one ended, or never was ready.
    """
    launched = list(hosts)
    for host in launched:
        host.launch()
    for host in launched:
        host.wait_ready()


def close_side_by_side(hosts: Iterable[Host]) -> None:
    """End daemons at once, and every guest process of their hosts."""
    ending = list(hosts)
    for host in ending:
        host.ask_to_end()
    for host in ending:
        host.end()
