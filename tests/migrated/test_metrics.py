"""Prometheus metrics and the notifications to the service manager."""

from __future__ import annotations

import asyncio
import os
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrated.observe.metrics import MOST_REGIMES, Metrics
from migrated.service.notify import Notifier
from migrated.settings.config import Address
from scripts.rig.ports import free_port


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and its labels' values in the order of the labels' names; without ``le`` and times."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if "le" not in sample.labels and not sample.name.endswith("_created")
    }


def test_finished_attempts_are_counted_by_what_they_were(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    metrics = Metrics()
    metrics.observe(record_of(), "source")
    metrics.observe(record_of(downtime=downtime_of(400_000_000, limit_violated=True)), "source")
    metrics.observe(record_of(outcome="aborted", reason="Too late.", downtime=downtime_of(100_000_000)), "source")
    metrics.observe(record_of(outcome="refused", reason="No.", downtime=None, rounds=()), "source")
    metrics.observe(record_of(outcome="in-doubt", reason="No answer."), "source")
    found = values(metrics)
    counted = {key[1]: value for key, value in found.items() if key[0] == "migrated_migrations_total"}
    assert counted == {"completed": 2, "aborted": 1, "refused": 1}
    assert found["migrated_downtime_seconds_count", "source"] == 2
    assert found["migrated_downtime_seconds_sum", "source"] == pytest.approx(0.466)
    assert found["migrated_abort_pause_seconds_sum", "source"] == pytest.approx(0.1)
    assert found["migrated_limit_violations_total", "source"] == 1
    assert found["migrated_prediction_bound_exceeded_total", "unknown", "source"] == 1
    assert found["migrated_prediction_error_ratio_sum", "source"] == pytest.approx(6 / 66 + 340 / 400)
    assert found["migrated_rounds_count", "source"] == 4
    assert found["migrated_bandwidth_bytes_per_second_count", "source"] == 6
    assert found["migrated_transferred_bytes_total", "source"] == 4 * (300 << 20)


def test_misses_of_the_bound_are_counted_by_the_kind_of_attempt(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    metrics = Metrics()
    for ms in (60, 70, 90):
        downtime = downtime_of(ms * 1_000_000, predicted_upper_ns=75_000_000, predicted_regime="later/fast-link")
        metrics.observe(record_of(downtime=downtime), "source")
    found = values(metrics)
    assert found["migrated_prediction_bounds_total", "later/fast-link", "source"] == 3
    assert found["migrated_prediction_bound_exceeded_total", "later/fast-link", "source"] == 1


def test_kinds_of_attempts_that_peers_make_up_are_counted_together(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    metrics = Metrics()
    for number in range(200):
        downtime = downtime_of(50_000_000, predicted_upper_ns=75_000_000, predicted_regime=f"made up {number}")
        metrics.observe(record_of(downtime=downtime), "destination")
    name = "migrated_prediction_bounds_total"
    counted = [line for line in metrics.text().decode().splitlines() if line.startswith(name)]
    assert len(counted) == MOST_REGIMES + 1
    assert f'{name}{{regime="other",role="destination"}} {200 - MOST_REGIMES}.0' in counted


def test_what_an_operator_held_is_no_error_of_the_prediction(
    record_of: Callable[..., Any], downtime_of: Callable[..., Any]
) -> None:
    """Predicted 60 ms with a bound of 75; the guest stood still for 1,066 ms, of which 1,000 were held."""
    metrics = Metrics()
    metrics.observe(record_of(downtime=downtime_of(1_066_000_000, hold_ns=1_000_000_000)), "source")
    found = values(metrics)
    assert found["migrated_downtime_seconds_sum", "source"] == pytest.approx(1.066)
    assert found["migrated_prediction_error_ratio_sum", "source"] == pytest.approx(6 / 66)
    assert found["migrated_prediction_bound_exceeded_total", "unknown", "source"] == 0


def test_what_runs_now_is_told_and_forgotten_when_it_ends(progress_of: Callable[..., Any]) -> None:
    metrics = Metrics()
    assert values(metrics)["migrated_in_doubt", "source"] == 0
    metrics.track(
        [progress_of(), progress_of(guest="g2", status="in-doubt"), progress_of(guest="g3", status="completed")]
    )
    found = values(metrics)
    assert (found["migrated_running", "source"], found["migrated_in_doubt", "source"]) == (1, 1)
    assert found["migrated_running_remaining_bytes", "g1"] == 12 << 20
    assert ("migrated_running_remaining_bytes", "g3") not in found
    metrics.track([])
    found = values(metrics)
    assert (found["migrated_running", "source"], found["migrated_in_doubt", "source"]) == (0, 0)
    assert ("migrated_running_remaining_bytes", "g1") not in found


def test_they_are_served_over_http_until_stopped(record_of: Callable[..., Any]) -> None:
    metrics = Metrics()
    metrics.observe(record_of(), "source")
    port = free_port()
    stop = metrics.serve(Address("127.0.0.1", port))
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            assert b'migrated_migrations_total{outcome="completed",role="source"} 1.0' in reply.read()
        with pytest.raises(OSError, match="in use"):
            metrics.serve(Address("127.0.0.1", port))
    finally:
        stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def test_the_service_manager_is_told(manager: socket.socket) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready("serving\non two lines")
    notifier.reloading()
    notifier.status("g1: round 3")
    notifier.stopping("draining")
    told = [manager.recv(4096).decode() for _ in range(4)]
    assert told[0] == "READY=1\nSTATUS=serving on two lines"
    assert told[1].startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert told[2:] == ["STATUS=g1: round 3", "STOPPING=1\nSTATUS=draining"]


def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0migrated-test-{os.getpid()}")
        sock.settimeout(10)
        Notifier(f"@migrated-test-{os.getpid()}").ready("x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


async def test_the_watchdog_is_fed_at_half_its_interval(manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "20000"}
    feeding = asyncio.create_task(Notifier.from_environment(environment).feed_watchdog())
    for _ in range(3):
        assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
    feeding.cancel()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "junk"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"},
    ],
)
async def test_nobody_asks_or_listens(environment: dict[str, str]) -> None:
    notifier = Notifier.from_environment(environment)
    notifier.ready("x")
    await asyncio.wait_for(notifier.feed_watchdog(), 10)
