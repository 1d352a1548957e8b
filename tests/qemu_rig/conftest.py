"""A guest image and a place for sockets. Where a guest cannot be had, tests that need one are skipped and say why."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.qemu_rig.image import GuestImage, guest_image
from scripts.qemu_rig.kernel import KERNEL_PACKAGE, download_kernel, missing_packages
from scripts.rig.waiting import RigError


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """The rig's guest image. The kernel is downloaded into the cache when it is the only thing that is missing."""
    missing = missing_packages()
    if missing == [KERNEL_PACKAGE]:
        try:
            download_kernel()
        except RigError as error:
            pytest.skip(str(error))
        missing = missing_packages()
    if missing:
        pytest.skip(f"a Linux guest needs {', '.join(missing)}")
    return guest_image()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A temporary directory with room in its path for sockets, on a real disk."""
    with tempfile.TemporaryDirectory(prefix="rig-") as path:
        yield Path(path)
