"""System calls made inside another process leave it as it was, whatever happens to whoever makes them.

target    sleep | poll | epoll | select | futex | compute | signal handler ...   goes round, and checks all of it
injector        SEIZE INTERRUPT regs frame call call regs DETACH                 killed at every one of these points
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import get_args

import pytest

from migrated.kernel.errors import InjectionError, TrackingError
from migrated.kernel.injection import Inside, run_inside, tracer_of
from migrated.kernel.syscalls import MACHINE
from migrated.kernel.tracking import start_tracking
from migrated.vmm.dirty_log import PagemapScanLog
from migrated.vmm.memory import Span
from tests.migrated.injectors import Injectors, When
from tests.migrated.kernel.conftest import MEMORY_BYTES, Target


def test_a_tracked_process_goes_on_and_its_writes_are_found(target: Target) -> None:
    tracking = start_tracking(target.pid, [target.span])
    log = PagemapScanLog(
        os.open(f"/proc/{target.pid}/pagemap", os.O_RDONLY), [Span(target.span[0], MEMORY_BYTES // 4096, 0)], True
    )
    assert int(log.collect()[:, 1].sum()) == MEMORY_BYTES // 4096
    assert log.collect().tolist() == []
    with open(f"/proc/{target.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(target.span[0] + 5 * 4096)
        memory.write(b"x")
    assert log.collect().tolist() == [[5, 1]]
    log.close()
    tracking.close()
    assert target.userfaultfds() == 0
    target.beats_again()
    assert tracer_of(target.pid) is None


def test_a_tracking_that_ended_can_begin_again(target: Target) -> None:
    for _ in range(20):
        start_tracking(target.pid, [target.span]).close()
    target.beats_again()
    assert target.userfaultfds() == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_every_request_it_leaves_the_process_running(target: Target) -> None:
    killed = 0
    with Injectors(target.pid) as injectors:
        requests = injectors.track_once()
        assert requests is not None
        for number in range(1, requests + 1):
            for when in get_args(When):
                killed += injectors.track_once(number, when) is None
                target.beats_again()
                assert tracer_of(target.pid) is None
    assert killed >= 20  # one that meets a better moment needs fewer requests, and ends before it is killed
    signals = target.signals
    target.beats_again(20)
    assert target.signals > signals


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_moment_it_leaves_the_process_running(target: Target) -> None:
    with Injectors(target.pid) as injectors:
        for number in range(60):
            injector = injectors.begin_loop()
            end_ns = time.monotonic_ns() + number * 437_000  # somewhere else every time
            while time.monotonic_ns() < end_ns:
                pass
            injectors.end_loop(injector)
            target.beats_again(1)
    assert tracer_of(target.pid) is None
    start_tracking(target.pid, [target.span]).close()
    target.beats_again()


def test_a_call_returns_what_the_kernel_said(target: Target) -> None:
    def work(inside: Inside) -> tuple[int, int]:
        return inside.call("close", 4000), inside.call("close", 4001)

    assert run_inside(target.pid, work) == (-9, -9)
    target.beats_again()


def test_work_that_fails_leaves_the_process_running(target: Target) -> None:
    def work(inside: Inside) -> None:
        inside.call("close", 4000)
        raise LookupError("in the middle")

    with pytest.raises(LookupError, match="in the middle"):
        run_inside(target.pid, work)
    target.beats_again()
    assert tracer_of(target.pid) is None


@pytest.fixture
def other_tracer(target: Target) -> Iterator[int]:
    code = (
        "import sys; from migrated.kernel.ptrace import TracedThread; "
        "TracedThread(int(sys.argv[1])); print('traces', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.communicate()


def test_another_tracer_is_named(target: Target, other_tracer: int) -> None:
    found = tracer_of(target.pid)
    assert found is not None
    assert found[0] == other_tracer
    with pytest.raises(InjectionError, match=rf"traced by process {other_tracer} .* end that debugger or strace first"):
        start_tracking(target.pid, [])


def test_a_process_that_a_signal_stopped_is_left_stopped_and_named(target: Target) -> None:
    os.kill(target.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, target.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(InjectionError, match=r"is stopped by a signal .*kill -CONT"):
        start_tracking(target.pid, [])
    os.kill(target.pid, signal.SIGCONT)
    target.beats_again()


def test_a_process_that_ended_is_named() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(InjectionError, match=f"process {process.pid} has ended"):
        start_tracking(process.pid, [])


def test_memory_that_is_tracked_already_is_named(target: Target) -> None:
    first = start_tracking(target.pid, [target.span])
    with pytest.raises(TrackingError, match="tracked by another userfaultfd already"):
        start_tracking(target.pid, [target.span])
    first.close()
    start_tracking(target.pid, [target.span]).close()


def test_memory_that_is_not_mapped_is_named(target: Target) -> None:
    with pytest.raises(TrackingError, match=r"is not all mapped|cannot be tracked"):
        start_tracking(target.pid, [(0x10000, 4096)])
    target.beats_again()


def test_a_filter_of_system_calls_is_named(target: Target) -> None:
    """A process whose filter answers EPERM to userfaultfd, as a container's does."""
    code = """
import ctypes, struct, sys, time
program = struct.pack("=" + "HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 323, 6, 0, 0, 0x00050001, 6, 0, 0, 0x7fff0000)
buffer = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_void_p))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(buffer))), 0, 0) == 0
print("filtered", flush=True)
while True:
    time.sleep(0.01)
"""
    if MACHINE != "x86_64":
        pytest.skip("the filter here is written for x86-64")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(TrackingError, match=r"a filter of its system calls \(seccomp\)"):
            start_tracking(process.pid, [])
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
