"""Records, progress snapshots and an in-memory daemon (``MemoryDaemon``) for tests of what stands around the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import structlog
import uvloop

from migrated.control.operations import EventBus, GuestSpec, OperationError
from migrated.control.server import ControlServer
from migrated.observe.logs import configure
from migrated.observe.metrics import Metrics
from migrated.observe.progress import Progress
from migrated.record.model import (
    Checkpoint,
    DeviceRow,
    Digest,
    Downtime,
    DowntimePart,
    LogLine,
    PhaseRow,
    Ram,
    Record,
    RoundRow,
    TimeSummary,
)
from migrated.record.parts import Part
from migrated.record.terms import STATUS_OF, Phase, QemuCheckpoint
from migrated.settings.config import parse_uri
from migrated.settings.parameters import MigrationParameters
from migrated.state.history import History, HistoryQuery
from protocol.guest_time import TimeStage, VmTimeData

MS = 1_000_000
T = TypeVar("T")


def _round(number: int) -> RoundRow:
    return RoundRow(
        round=number,
        scanned_pages=65536,
        dirty_pages=65536 >> number,
        zero_pages=100,
        bytes=(65536 >> number) * 4096,
        ns=80 * MS,
        scan_ns=2 * MS,
        bandwidth_bytes_per_s=1.5e9,
        dirty_rate_pages_per_s=12800.0,
        predicted_downtime_ns=58 * MS,
        decision="another round: predicted 412ms, bound 455ms, limit 300ms",
    )


def make_downtime(measured_ns: int = 66 * MS, **changes: Any) -> Downtime:
    parts = (
        DowntimePart.of(Part.STOP, 1 * MS),
        DowntimePart.of(Part.LAST_PAGES_LEG, measured_ns - 21 * MS),
        DowntimePart.of(Part.DEVICE_LOADS, 19 * MS),
    )
    fields: dict[str, Any] = {
        "measured_ns": measured_ns,
        "lower_ns": measured_ns - 50_000,
        "upper_ns": measured_ns + 50_000,
        "limit_ns": 300 * MS,
        "limit_violated": False,
        "predicted_ns": 60 * MS,
        "predicted_upper_ns": 75 * MS,
        "parts": parts,
        "unattributed_ns": 1 * MS,
        "source_reported_ns": 40 * MS,
        "destination_measured_ns": 64 * MS,
    }
    return Downtime(**(fields | changes))


def make_record(**changes: Any) -> Record:
    """A completed migration of g1; fields by name to change it."""
    before = VmTimeData(
        guest_freq=1_000_000_000, guest_tsc=5_000, hrtime=9_000, hres_sec=1_700_000_000, hres_ns=0, boot_hrtime=4_000
    )
    fields: dict[str, Any] = {
        "migration_id": "m-0001",
        "guest": "g1",
        "epoch": 1,
        "peer": "127.0.0.1:4460",
        "source_host": "a",
        "destination_host": "b",
        "started_at": "2026-03-01T10:00:00.000000+00:00",
        "outcome": "completed",
        "reason": None,
        "parameters": MigrationParameters(),
        "total_ns": 960 * MS,
        "setup_ns": 20 * MS,
        "downtime": make_downtime(),
        "devices": (DeviceRow(name="nvme0", kind="non-iterable", bytes=4096, save_ns=2 * MS, load_ns=19 * MS),),
        "checkpoints": (Checkpoint.of(QemuCheckpoint.VM_STOPPED, 1 * MS),),
        "rounds": (_round(1), _round(2)),
        "ram": Ram(
            total_bytes=256 << 20,
            page_size=4096,
            transferred_bytes=300 << 20,
            normal_pages=60000,
            zero_pages=1000,
            sparse_pages=4536,
            precopy_bytes=290 << 20,
            downtime_bytes=10 << 20,
            precopy_pages=58000,
            downtime_pages=2000,
            dirty_sync_count=3,
            pages_per_second=350000.0,
            dirty_tracking="pagemap-scan",
            channels=2,
        ),
        "phases": (PhaseRow(name=Phase.PRE_COPY, begin_ns=20 * MS, end_ns=890 * MS),),
        "time": TimeSummary(
            policy="midpoint",
            elapsed_lower_ns=65 * MS,
            elapsed_upper_ns=66 * MS,
            elapsed_ns=65_500_000,
            before=before,
            after=before,
            guest_uptime_ns=5_000,
            tsc_delta=65_500_000,
            boot_hrtime_delta=-7,
            wall_clock_skew_ns=(-1 * MS, 2 * MS),
            round_trip_ns=1 * MS,
            stages=(TimeStage(name="daemon", ns=1000, tsc_delta=1000, boot_hrtime_delta=0),),
        ),
        "digest": Digest(algorithm="xxh3-sum", source="ab12", destination="ab12"),
        "events": (LogLine(side="source", at="2026-03-01T10:00:00Z", level="info", event="begun"),),
    }
    return Record(**(fields | changes))


def make_progress(**changes: Any) -> Progress:
    """A running migration of g1 in its third round; fields by name to change it."""
    fields: dict[str, Any] = {
        "migration_id": "m-0001",
        "guest": "g1",
        "role": "source",
        "peer": "127.0.0.1:4460",
        "status": "active",
        "phase": "RamPushPrePause",
        "started_at": "2026-03-01T10:00:00.000000+00:00",
        "elapsed_ns": 700 * MS,
        "setup_ns": 20 * MS,
        "round": 3,
        "dirty_sync_count": 4,
        "total_bytes": 256 << 20,
        "transferred_bytes": 290 << 20,
        "remaining_bytes": 12 << 20,
        "normal_pages": 58000,
        "zero_pages": 1000,
        "bandwidth_bytes_per_s": 1.5e9,
        "dirty_rate_pages_per_s": 12800.0,
        "predicted_downtime_ns": 412 * MS,
        "predicted_upper_ns": 455 * MS,
        "predicted_parts_ns": {"memory": 290 * MS, "device-loads": 110 * MS},
        "downtime_limit_ns": 300 * MS,
        "downtime_ns": None,
        "throttle_percent": 0,
        "decision": "not yet: predicted 412ms, bound 455ms, limit 300ms",
        "destination": "loading",
        "acknowledged": {"rounds": 3, "received_bytes": 286 << 20},
        "reason": None,
        "rounds": (_round(1), _round(2)),
    }
    return Progress(**(fields | changes))


class MemoryDaemon:
    """Operations without guests or peers: migrations move when the test says so. History and metrics are real."""

    def __init__(self, directory: Path) -> None:
        self.events = EventBus()
        self.store = History(directory)
        self.metrics = Metrics()
        self.guests: dict[str, dict[str, Any]] = {}
        self.specs: list[GuestSpec] = []
        self.defaults = MigrationParameters()
        self.own_parameters: dict[str, dict[str, object]] = {}
        self.migrations: dict[str, Progress] = {}
        self.ended: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.started: list[tuple[str, str, dict[str, object]]] = []
        self.resolved: list[tuple[str, bool]] = []
        self.continued: list[str] = []
        self.quitting = asyncio.Event()
        self.refusal: OperationError | None = None
        self.gate: asyncio.Event | None = None
        """While set, guest_pause waits for it: a slow command."""
        self.ending: dict[str, Any] | None = None
        """While set, a migration ends like this (fields of its record) as soon as somebody waits for it."""
        self._ids = itertools.count(1)

    def add_guest(self, name: str, state: str = "running") -> None:
        self.guests[name] = {
            "name": name,
            "state": state,
            "memory_bytes": 256 << 20,
            "api_socket": f"/run/guests/{name}.sock",
            "pid": 4711,
        }

    def move(self, migration_id: str, **changes: Any) -> None:
        """Change a running migration and tell its status to everybody."""
        progress = self.migrations[migration_id] = self.migrations[migration_id].model_copy(update=changes)
        if "status" in changes:
            data = {"status": progress.status, "guest": progress.guest, "migration-id": migration_id}
            self.events.publish("MIGRATION", data)

    def end(self, migration_id: str, **changes: Any) -> None:
        """End a migration with a record (fields by name)."""
        guest = self.migrations[migration_id].guest
        record = make_record(migration_id=migration_id, guest=guest, **changes)
        downtime = record.downtime.measured_ns if record.downtime else None
        self.store.add(record, "source")
        self.metrics.observe(record, "source")
        self.move(
            migration_id,
            status=STATUS_OF[record.outcome],
            reason=record.reason,
            downtime_ns=downtime,
            remaining_bytes=0,
        )
        self.ended[migration_id].set_result(record.document())

    def _guest(self, name: str) -> dict[str, Any]:
        try:
            return self.guests[name]
        except KeyError:
            raise OperationError(f"There is no guest {name!r} on this host.", "DeviceNotFound") from None

    async def guest_create(self, spec: GuestSpec) -> dict[str, Any]:
        self.specs.append(spec)
        self.add_guest(spec.name, "paused" if spec.paused else "running")
        return self.guests[spec.name]

    def guest_names(self) -> list[str]:
        return [name for name, guest in self.guests.items() if guest["state"] != "retired"] or [*self.guests]

    async def guest_list(self) -> list[dict[str, Any]]:
        return list(self.guests.values())

    async def guest_show(self, name: str) -> dict[str, Any]:
        return self._guest(name) | {"guest_uptime_ns": 5 * MS}

    async def guest_pause(self, name: str) -> dict[str, Any]:
        guest = self._guest(name)
        if self.gate is not None:
            await self.gate.wait()
        guest["state"] = "paused"
        self.events.publish("STOP", {"guest": name})
        return guest

    async def guest_resume(self, name: str) -> dict[str, Any]:
        self._guest(name)["state"] = "running"
        self.events.publish("RESUME", {"guest": name})
        return self.guests[name]

    async def guest_destroy(self, name: str) -> dict[str, Any]:
        self._guest(name)
        return self.guests.pop(name)

    async def guest_verify(self, name: str) -> dict[str, Any]:
        ok = self._guest(name)["state"] != "retired"
        return {"ok": ok, "bad_pages": 0 if ok else 3, "message": "65536 pages" if ok else "page 7 is stale"}

    async def migrate(self, guest: str, uri: str, overrides: dict[str, object]) -> str:
        self._guest(guest)
        try:
            parse_uri(uri)
        except ValueError as error:
            raise OperationError(str(error)) from error
        if self.refusal is not None:
            raise self.refusal
        migration_id = f"m-{next(self._ids):04}"
        self.started.append((guest, uri, overrides))
        self.migrations[migration_id] = make_progress(migration_id=migration_id, guest=guest, status="setup")
        self.ended[migration_id] = asyncio.get_running_loop().create_future()
        self.move(migration_id, status="active")
        return migration_id

    async def wait(self, migration_id: str) -> dict[str, Any]:
        if migration_id not in self.ended:
            return self.store.get(migration_id)
        if self.ending is not None and not self.ended[migration_id].done():
            self.end(migration_id, **self.ending)
        return await asyncio.shield(self.ended[migration_id])

    def progress(self, guest: str | None) -> list[Progress]:
        return [p for p in self.migrations.values() if guest in (None, p.guest)]

    async def cancel(self, guest: str) -> None:
        for migration_id, progress in list(self.migrations.items()):
            if progress.guest == guest and not self.ended[migration_id].done():
                self.end(migration_id, outcome="cancelled", reason="Cancelled by the operator.", downtime=None)

    async def set_parameters(self, guest: str | None, values: dict[str, object]) -> None:
        if guest is None:
            self.defaults = self.defaults.model_copy(update=values)
        else:
            self._guest(guest)
            self.own_parameters.setdefault(guest, {}).update(values)

    def parameters(self, guest: str | None) -> MigrationParameters:
        return self.defaults.model_copy(update=self.own_parameters.get(guest or "", {}))

    async def continue_switchover(self, guest: str) -> None:
        self.continued.append(guest)

    def history(self, query: HistoryQuery) -> list[dict[str, Any]]:
        return self.store.query(query)

    def history_stats(self, query: HistoryQuery) -> dict[str, Any]:
        return self.store.stats(query)

    def record(self, migration_id: str) -> dict[str, Any]:
        return self.store.get(migration_id)

    async def resolve(self, migration_id: str, run_here: bool) -> dict[str, Any]:
        self.resolved.append((migration_id, run_here))
        return self.store.get(migration_id)

    async def estimate(self, guest: str, uri: str, overrides: dict[str, object]) -> dict[str, Any]:
        self._guest(guest)
        return {
            "predicted_ns": 412 * MS,
            "predicted_upper_ns": 455 * MS,
            "limit_ns": 300 * MS,
            "fits": False,
            "reason": "Device loads alone take 310ms.",
            "parts_ns": {"memory": 102 * MS, "device-loads": 310 * MS},
            "total_ns": 3_000 * MS,
        }

    def metrics_text(self) -> bytes:
        return self.metrics.text()

    def version(self) -> dict[str, Any]:
        return {"version": "0.1.0", "protocol": "1.0", "role": "host"}

    async def quit(self) -> None:
        self.quitting.set()


@pytest.fixture
def record_of() -> Callable[..., Record]:
    """``make_record``."""
    return make_record


@pytest.fixture
def downtime_of() -> Callable[..., Downtime]:
    """``make_downtime``."""
    return make_downtime


@pytest.fixture
def progress_of() -> Callable[..., Progress]:
    """``make_progress``."""
    return make_progress


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[MemoryDaemon]:
    """An in-memory daemon without guests."""
    memory = MemoryDaemon(tmp_path)
    with contextlib.closing(memory.store):
        yield memory


@pytest.fixture
async def control_socket(daemon: MemoryDaemon, tmp_path: Path) -> AsyncIterator[Path]:
    """The path of a control socket that serves ``daemon``."""
    path = tmp_path / "control.sock"
    server = ControlServer(daemon, path)
    await server.start()
    try:
        yield path
    finally:
        await server.close()


class ServedDaemon:
    """A ``MemoryDaemon`` behind a control socket, in a thread of its own: commands bring their own event loop."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "control.sock"
        self._directory = directory
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))

    async def _serve(self) -> None:
        self.memory = MemoryDaemon(self._directory)
        self._loop, self._down = asyncio.get_running_loop(), asyncio.Event()
        server = ControlServer(self.memory, self.socket)
        await server.start()
        self._up.set()
        await self._down.wait()
        await server.close()
        self.memory.store.close()

    def do(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the daemon's event loop."""

        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._down.set)
        self._thread.join(30)


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Whatever a test does to logging ends with it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def served(tmp_path: Path, logging_restored: None) -> Iterator[ServedDaemon]:
    """A daemon with the guest g1, behind a control socket."""
    configure("info", stream=io.StringIO())  # its log must not end up in what a command prints
    with ServedDaemon(tmp_path) as daemon:
        daemon.do(lambda: daemon.memory.add_guest("g1"))
        yield daemon


def pytest_asyncio_loop_factories(config: Any, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The daemons run on uvloop; the control socket's server and client must work on both."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.path.name in ("test_control_server.py", "test_control_client.py"):
        factories["asyncio"] = asyncio.new_event_loop
    return factories
