"""How long a thread waits for a processor, by the kernel's account of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.kernel import processor
from migrated.kernel.processor import ProcessorLoad

_RUN_S = 0.4


@pytest.fixture
def one_processor() -> Iterator[int]:
    """One processor that this thread is bound to."""
    before = os.sched_getaffinity(0)
    chosen = min(before)
    os.sched_setaffinity(0, {chosen})
    yield chosen
    os.sched_setaffinity(0, before)


def run_for(seconds: float) -> None:
    """Use the processor."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.skipif(not processor._ACCOUNT.exists(), reason="this kernel keeps no account of waiting")
def test_a_thread_that_shares_its_processor_waits_about_as_long_as_it_runs(one_processor: int) -> None:
    spin = f"import os; os.sched_setaffinity(0, {{{one_processor}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            load = ProcessorLoad()
            run_for(_RUN_S)
            assert load.now() > 1.5
        finally:
            other.kill()


def test_a_thread_that_only_sleeps_has_no_load() -> None:
    load = ProcessorLoad()
    assert 1.0 <= load.now() < 1.5


def test_without_an_account_the_host_s_mean_load_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "_ACCOUNT", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert ProcessorLoad().now() == 3.0
