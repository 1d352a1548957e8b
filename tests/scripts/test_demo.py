"""The demo ends everything that it started, also when it is ended itself. ``make demo`` shows that it completes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from scripts.basics import ROOT


def descendants(pid: int) -> set[int]:
    """All processes below ``pid``."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A temporary directory with room in its path for sockets."""
    with tempfile.TemporaryDirectory(prefix="m") as directory:
        yield Path(directory)


def test_a_demo_that_is_terminated_leaves_nothing_behind(tmp_path: Path, short_directory: Path) -> None:
    command = [sys.executable, "-m", "scripts.demo", "--output", str(tmp_path), "--memory", "64MiB"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(short_directory)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT
    ) as demo:
        assert demo.stdout is not None
        # Both daemons and the guest run once the story gets there.
        told = list(takewhile(lambda line: not line.startswith("There: "), demo.stdout))
        pidfds = [os.pidfd_open(pid) for pid in descendants(demo.pid)]
        demo.send_signal(signal.SIGTERM)
        told += demo.stdout
    ended = [bool(select.select([pidfd], [], [], 0)[0]) for pidfd in pidfds]
    for pidfd in pidfds:
        os.close(pidfd)
    assert len(ended) >= 3, told
    assert all(ended)
    assert demo.returncode == 1
    assert json.loads(told[-1]) == {"demo": "failed", "reason": "interrupted"}
    assert not list(short_directory.iterdir())
