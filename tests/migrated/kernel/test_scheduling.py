"""Threads that go before others for a while: which ones, until when, and what a killed daemon leaves."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator

import pytest

from migrated.kernel.scheduling import Precedence, give_back_all, may_take_precedence, threads_of

FIRST = os.SCHED_RR | os.SCHED_RESET_ON_FORK
USUAL = os.SCHED_OTHER

pytestmark = pytest.mark.skipif(not may_take_precedence(), reason="giving threads a policy takes CAP_SYS_NICE")


@pytest.fixture
def other() -> Iterator[int]:
    """A process that waits."""
    with subprocess.Popen(["sleep", "600"], preexec_fn=lambda: os.nice(3)) as process:
        yield process.pid
        process.kill()


def test_all_threads_of_the_processes_go_first_and_are_given_back(other: int) -> None:
    over = threading.Event()
    waiting = threading.Thread(target=over.wait, daemon=True)
    waiting.start()
    threads = threads_of(os.getpid(), other)
    niceness = os.getpriority(os.PRIO_PROCESS, other)
    assert {waiting.native_id, threading.get_native_id(), other} <= set(threads)
    with Precedence(threads):
        assert {os.sched_getscheduler(thread) for thread in threads} == {FIRST}
    assert {os.sched_getscheduler(thread) for thread in threads} == {USUAL}
    assert os.getpriority(os.PRIO_PROCESS, other) == niceness
    over.set()
    waiting.join()


def test_a_thread_is_held_until_the_last_one_lets_go(other: int) -> None:
    with Precedence([other]):
        with Precedence([other]):
            pass
        assert os.sched_getscheduler(other) == FIRST
    assert os.sched_getscheduler(other) == USUAL


@pytest.mark.parametrize("policy", [os.SCHED_FIFO, os.SCHED_BATCH])
def test_a_policy_that_somebody_else_gave_stays(other: int, policy: int) -> None:
    os.sched_setscheduler(other, policy, os.sched_param(1 if policy == os.SCHED_FIFO else 0))
    with Precedence([other]):
        assert os.sched_getscheduler(other) == policy
    give_back_all(other)
    assert os.sched_getscheduler(other) == policy


def test_what_is_started_meanwhile_has_the_usual_policy() -> None:
    seen: list[int] = []
    with Precedence([threading.get_native_id()]):
        begun = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
        begun.start()
        begun.join()
    assert seen == [USUAL]


def test_what_a_killed_daemon_could_not_give_back_is_given_back(other: int) -> None:
    os.sched_setscheduler(other, FIRST, os.sched_param(1))
    give_back_all(other)
    assert os.sched_getscheduler(other) == USUAL


def test_a_process_that_has_ended_is_left_out(other: int) -> None:
    with Precedence([other]):
        os.kill(other, 9)
        os.waitpid(other, 0)
    assert threads_of(other) == []
    with Precedence([other]):
        pass
