"""The demonstration of QEMU guests: what it says where it cannot run, and that it leaves nothing behind when it does.

What it tells of its figures is tested with them, in tests/qemu_rig/test_figures.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import demo_qemu
from scripts.basics import ROOT
from scripts.qemu_rig.kernel import MISSING


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A temporary directory with room in its path for sockets."""
    with tempfile.TemporaryDirectory(prefix="m") as directory:
        yield Path(directory)


def run(path: str, *options: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The demonstration with another search path for programs and no kernel in the user's cache."""
    environment = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-m", "scripts.demo_qemu", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=60)


def test_missing_packages_are_named_and_nothing_else_happens(tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = run(str(tmp_path), "--output", str(output), home=tmp_path)
    assert done.returncode == MISSING == 3
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["demo"] == "missing"
    assert {"qemu-system-x86", "gcc", "libc6-dev"} <= set(told["packages"])
    assert all(package in done.stderr for package in told["packages"])
    assert not output.exists()


def test_a_kernel_without_tracking_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages come first: without them nothing else matters."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(demo_qemu, "missing_packages", list)
    monkeypatch.setattr(demo_qemu, "why_no_tracking", lambda: "this kernel is too old")
    assert demo_qemu.lacks() == {"packages": [], "reason": "this kernel is too old"}
    monkeypatch.setattr(demo_qemu, "missing_packages", lambda: ["gcc"])
    assert demo_qemu.lacks()["packages"] == ["gcc"]


def test_without_root_it_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(demo_qemu, "missing_packages", list)
    assert "root" in demo_qemu.lacks()["reason"]


def qemus_below(directory: Path) -> list[int]:
    """QEMUs that have a socket below a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes()
        except OSError:  # it has ended
            continue
        if arguments.startswith(b"qemu-system") and os.fsencode(directory) in arguments:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(bool(demo_qemu.lacks()), reason="this machine lacks what QEMU guests need")
def test_a_demonstration_that_is_terminated_leaves_no_qemu_behind(tmp_path: Path, short_directory: Path) -> None:
    command = [sys.executable, "-m", "scripts.demo_qemu", "--workloads", "idle", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(short_directory)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT
    ) as demo:
        assert demo.stdout is not None
        told: list[str] = []
        for line in demo.stdout:
            told.append(line)
            if line.startswith("There: "):
                break
        running = qemus_below(short_directory)
        [own] = short_directory.iterdir()
        memory_files = list(Path("/dev/shm").glob(f"{own.name}-*"))
        demo.send_signal(signal.SIGTERM)
        told += demo.stdout
    assert running, told
    assert memory_files
    assert qemus_below(short_directory) == []
    assert demo.returncode == 1
    document: dict[str, Any] = json.loads(told[-1])
    assert document == {"demo": "failed", "reason": "interrupted"}
    assert not list(short_directory.iterdir())
    assert not any(path.exists() for path in memory_files)
