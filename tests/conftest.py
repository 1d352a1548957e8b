"""What tests of several packages need: the image of a real Linux guest, and which tests may run beside which.

    worker 1   tests that measure time, one after the other            as if they were alone on the machine
    worker 2   patient tests, each as slow as it may be                what the first leaves of the processors

``make test`` has these two workers; without them everything runs in one process, in order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from typing import Any

import pytest

from migrated.kernel.tracking import why_no_tracking
from scripts.qemu_rig.image import GuestImage, guest_image
from scripts.qemu_rig.kernel import KERNEL_PACKAGE, download_kernel, missing_packages
from scripts.rig.waiting import RigError

_PATIENT = tuple(f"tests/{name}" for name in ("explorer/", "migrated/", "protocol/", "scripts/", "vmm_sim/", "test_"))
"""Tests that hold however slow the machine is: what they wait for has generous bounds, or they only compute."""
_IMPATIENT = ("tests/migrated/kernel/test_scheduling.py",)
"""Exceptions: this one looks at the very policies that patient tests run under."""
_USUAL_POLICY = os.sched_getscheduler(0)


def _is_patient(test: str) -> bool:
    return test.startswith(_PATIENT) and not test.startswith(_IMPATIENT)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give one worker all tests that measure time, and the other ones file by file."""
    from xdist.scheduler import LoadScopeScheduling  # here: who runs tests in one process need not have it

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if _is_patient(nodeid) else "measures time"

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Beside another worker, patient tests and all that they start take only what that one leaves of the processors."""
    if hasattr(item.config, "workerinput"):
        policy = os.SCHED_IDLE if _is_patient(item.nodeid) else _USUAL_POLICY
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
