"""What tests of several packages need: the image of a real Linux guest, and a disk that is soon full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.kernel.tracking import why_no_tracking
from scripts.qemu_rig.image import GuestImage, guest_image
from scripts.qemu_rig.kernel import KERNEL_PACKAGE, download_kernel, missing_packages
from scripts.rig.waiting import RigError


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """The rig's guest; skipped, with the reason, where it cannot be had or not be tracked. The kernel is downloaded
    into the cache when it is the only thing that is missing."""
    if os.geteuid() != 0:
        pytest.skip("only root may track another process for sure")
    if (reason := why_no_tracking()) is not None:
        pytest.skip(reason)
    if missing_packages() == [KERNEL_PACKAGE]:
        with contextlib.suppress(RigError):
            download_kernel()
    if missing := missing_packages():
        pytest.skip(f"a Linux guest needs {', '.join(missing)}")
    return guest_image()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)
