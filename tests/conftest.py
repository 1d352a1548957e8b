"""What tests of several packages need: the image of a real Linux guest, and which tests may run beside which.

    worker 1   tests that measure time, one after the other            as if they were alone on the machine
    worker 2   patient tests, each as slow as it may be                what the first leaves of the processors

``make test`` has these two workers; without them everything runs in one process, in order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from migrated.kernel.tracking import why_no_tracking
from scripts.qemu_rig.image import GuestImage, guest_image
from scripts.qemu_rig.kernel import KERNEL_PACKAGE, download_kernel, missing_packages
from scripts.rig.waiting import RigError

_TESTS = Path(__file__).parent
_PATIENT = ("explorer", "migrated", "protocol", "scripts", "vmm_sim", "test_documentation.py", "test_packaging.py")
"""Tests that hold however slow the machine is: what they wait for has generous bounds, or they only compute."""
_IMPATIENT = ("migrated/kernel/test_scheduling.py",)
"""Exceptions: this one looks at the very policies that patient tests run under."""
_USUAL_POLICY = os.sched_getscheduler(0)


def _is_patient(item: pytest.Item) -> bool:
    path = item.path.relative_to(_TESTS)
    return path.parts[0] in _PATIENT and path.as_posix() not in _IMPATIENT


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep all tests together in one worker that want the machine to themselves."""
    if hasattr(config, "workerinput"):
        for item in items:
            if not _is_patient(item):
                item.add_marker(pytest.mark.xdist_group("machine"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Beside another worker, patient tests and all that they start take only what that one leaves of the processors."""
    if hasattr(item.config, "workerinput"):
        policy = os.SCHED_IDLE if _is_patient(item) else _USUAL_POLICY
        with contextlib.suppress(PermissionError):  # only root may go back from idle; nobody has to
            os.sched_setscheduler(0, policy, os.sched_param(0))
    return (yield)


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
