"""Stopping and running a bare QEMU's vCPUs, also while somebody sets the wall clock, which QEMU's stamps are of."""

from __future__ import annotations

import time

import pytest

from migrated.vmm.qemu.vcpus import Vcpus
from tests.migrated.qemu.conftest import START_S, BareQemu

HOUR_NS = 3600 * 10**9


@pytest.mark.parametrize("set_by_ns", [0, HOUR_NS, -HOUR_NS])
async def test_what_a_stop_and_a_run_took_lies_within_their_calls(
    bare_qemu: BareQemu, monkeypatch: pytest.MonkeyPatch, set_by_ns: int
) -> None:
    vcpus, wall_ns = Vcpus(await bare_qemu(), START_S), time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + set_by_ns)
    pause, ran = await vcpus.stop()
    assert ran
    assert 0 <= pause.drain_ns <= pause.total_ns
    pause, ran = await vcpus.stop()
    assert not ran
    assert pause.drain_ns == 0
    begin_ns = time.monotonic_ns()
    assert begin_ns <= await vcpus.run() <= time.monotonic_ns()
