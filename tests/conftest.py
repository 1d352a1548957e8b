"""What tests of several packages need: the image of a real Linux guest."""

from __future__ import annotations

import contextlib
import os

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
