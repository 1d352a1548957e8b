"""The shipped systemd units, as systemd itself judges them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parents[2] / "configs" / "systemd"
MAX_EXPOSURE = 2.0
"""systemd-analyze security: 0 is best; below 2.0 it says OK."""

OLDEST = 250
"""Version of systemd from which on it knows every key of the units, and "security --offline"."""


def version() -> int:
    """The version of systemd here, 0 without it."""
    if shutil.which("systemd-analyze") is None:
        return 0
    told = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, timeout=60).stdout
    return int(told.split()[1])


pytestmark = pytest.mark.skipif(version() < OLDEST, reason=f"systemd-analyze {OLDEST} or newer is not installed")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A directory with the units as instance "host" and their drop-ins, with a program that exists."""
    for template in DIRECTORY.glob("**/*.*"):
        path = tmp_path / str(template.relative_to(DIRECTORY)).replace("@", "@host")
        if template.is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text(template.read_text().replace("/usr/bin/migrated", "/bin/true"))
    return tmp_path


def analyze(*arguments: str) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["migrated@host.service", "migrated@host.socket"])
def test_it_is_valid(units: Path, name: str) -> None:
    assert "migrated@" not in analyze("verify", "--man=no", str(units / name))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("migrated@host.service", "WatchdogSec=", "WatchdogSeconds="),
        ("migrated@host.socket", "ListenStream=127.0.0.1:4460", "ListenStream=nowhere:port"),
        ("migrated@host.service.d/precedence.conf", "RestrictRealtime=no", "RestrictRealtime=rather not"),
        ("migrated@host.service.d/qemu.conf", "ptrace pidfd_getfd", "ptrace pidfd_get"),
    ],
)
def test_what_is_wrong_would_be_told(units: Path, name: str, good: str, bad: str) -> None:
    unit = units / name
    assert good in unit.read_text()
    unit.write_text(unit.read_text().replace(good, bad))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_it_is_valid(units, name.partition(".d/")[0])


def test_it_is_hardened(units: Path) -> None:
    shutil.rmtree(units / "migrated@host.service.d")
    told = analyze("security", "--offline=true", "--no-pager", str(units / "migrated@host.service"))
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", told)
    assert exposure is not None
    assert float(exposure[1]) <= MAX_EXPOSURE
