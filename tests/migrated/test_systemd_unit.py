"""The shipped systemd unit, as systemd itself judges it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "configs" / "systemd" / "migrated@.service"
MAX_EXPOSURE = 2.0
"""systemd-analyze security: 0 is best; below 2.0 it says OK."""

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit as instance "host", with a program that exists."""
    path = tmp_path / "migrated@host.service"
    path.write_text(UNIT.read_text().replace("/usr/bin/migrated", "/bin/true"))
    return path


def analyze(*arguments: str) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)
    if "Unknown" in done.stderr or "unrecognized option" in done.stderr:
        pytest.skip(f"this systemd-analyze is too old: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_it_is_valid(unit: Path) -> None:
    assert unit.name not in analyze("verify", "--man=no", str(unit))


def test_it_is_hardened(unit: Path) -> None:
    told = analyze("security", "--offline=true", "--no-pager", str(unit))
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", told)
    assert exposure is not None
    assert float(exposure[1]) <= MAX_EXPOSURE
