"""Records, snapshots of progress, and whole hosts whose guests are tiny, for tests of what stands around the daemon."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop

from migrated.observe.logs import configure
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
from migrated.record.terms import Phase, QemuCheckpoint
from migrated.settings.parameters import MigrationParameters
from protocol.guest_time import TimeStage, VmTimeData
from scripts.authority import Authority
from tests.tiny_vmm.hosts import TinyHost, TinyHosts, need_write_tracking

MS = 1_000_000


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
def short_directory() -> Iterator[Path]:
    """A directory with room in its path for sockets, which every user may enter."""
    with tempfile.TemporaryDirectory(prefix="mig-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


@pytest.fixture
async def daemon(short_directory: Path) -> AsyncIterator[TinyHost]:
    """A host without guests, behind a control socket."""
    async with TinyHost(short_directory / "a") as host:
        yield host


@pytest.fixture
def control_socket(daemon: TinyHost) -> Path:
    """The path of the control socket of ``daemon``."""
    return daemon.socket


@pytest.fixture
async def destination(daemon: TinyHost, short_directory: Path) -> AsyncIterator[TinyHost]:
    """A second host, to which guests of ``daemon`` can be moved."""
    need_write_tracking()
    async with TinyHost(short_directory / "b") as host:
        yield host


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that starts waits a moment only for guests that do not answer: those here never do in that time."""
    monkeypatch.setattr("migrated.guests.registry.ANSWER_S", 0.1)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of all hosts that belong together."""
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another authority, which they do not know."""
    return Authority(tmp_path_factory.mktemp("strangers"))


@pytest.fixture
def silent_uri() -> Iterator[str]:
    """Where connections are accepted and nothing is ever said: a migration to there waits until it is cancelled."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "tcp:{}:{}".format(*server.getsockname()[:2])


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
def served(short_directory: Path, logging_restored: None) -> Iterator[TinyHosts]:
    """A host with the paused guest g1, behind a control socket that another thread serves."""
    configure("info", stream=io.StringIO())  # its log must not end up in what a command prints
    with TinyHosts(short_directory) as hosts:
        hosts.do(hosts.a.add_guest("g1", paused=True))
        yield hosts


def pytest_asyncio_loop_factories(config: Any, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The daemons run on uvloop; the control socket's server and client must work on both."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.path.name in ("test_control_server.py", "test_control_commands.py", "test_control_client.py"):
        factories["asyncio"] = asyncio.new_event_loop
    return factories
