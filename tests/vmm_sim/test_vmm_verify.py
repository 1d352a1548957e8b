"""Verification catches every kind of damage, names it, and leaves holes holes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from vmm_sim.content import PAGE_SIZE, WORDS
from vmm_sim.errors import VmmError
from vmm_sim.vmm import Vmm

STEPS = 4000


@pytest.fixture
def guest(make_vmm: Callable[..., Vmm]) -> Vmm:
    """A guest that has run for a while (its steps executed here, so that the count is known)."""
    vmm = make_vmm(workload="hot-cold", memory="8MiB")
    for step in range(0, STEPS, 50):
        vmm.workload.execute(vmm.memory, step, 50)
    vmm.vcpu.step = STEPS
    return vmm


def page_with(vmm: Vmm, *, generation_above: int) -> int:
    """A page that was written more often than that and is not zero."""
    expected = vmm.workload.expected(vmm.vcpu.step, 0, 1, vmm.workload.touched_pages)
    fits = (expected.generations > generation_above) & (expected.keys() != 0)
    return int(np.flatnonzero(fits)[0]) + 1


def content(vmm: Vmm, page: int, generation: int) -> npt.NDArray[np.uint64]:
    expected = vmm.workload.expected(vmm.vcpu.step, 0, page, page + 1)
    expected.generations[0] = generation
    out = np.empty((1, WORDS), dtype=np.uint64)
    expected.render(out)
    page_content: npt.NDArray[np.uint64] = out[0]
    return page_content


def test_an_intact_guest_verifies(guest: Vmm) -> None:
    verdict = guest.verify()
    assert verdict["ok"]
    assert verdict["bad_pages"] == 0
    assert verdict["pages"] == 2048
    assert f"step {STEPS}" in verdict["message"]


@pytest.mark.parametrize("at", [0, 1, 2047, 4095])
def test_one_flipped_bit_is_caught_and_named(guest: Vmm, at: int) -> None:
    page = page_with(guest, generation_above=0)
    guest.memory.words[page].view(np.uint8)[at] ^= 0x10
    verdict = guest.verify()
    assert (verdict["ok"], verdict["bad_pages"], verdict["first_bad"]) == (False, 1, [page])
    assert f"page {page} (hot) differs in 1 bytes" in verdict["message"]
    assert f"at byte {at}" in verdict["message"]


def test_a_stale_page_is_caught_and_named(guest: Vmm) -> None:
    page = page_with(guest, generation_above=3)
    now = guest.workload.expected(STEPS, 0, page, page + 1).generations[0]
    guest.memory.words[page] = content(guest, page, int(now) - 1)
    verdict = guest.verify()
    assert verdict["first_bad"] == [page]
    assert f"is stale: generation {now - 1}, expected {now}" in verdict["message"]


def test_a_torn_page_is_caught_and_named(guest: Vmm) -> None:
    page = page_with(guest, generation_above=3)
    now = guest.workload.expected(STEPS, 0, page, page + 1).generations[0]
    guest.memory.words[page, 200:] = content(guest, page, int(now) - 1)[200:]
    verdict = guest.verify()
    assert verdict["first_bad"] == [page]
    assert "is torn" in verdict["message"]


def test_a_zeroed_page_and_a_hole_are_caught_and_named(guest: Vmm) -> None:
    zeroed, hole = page_with(guest, generation_above=0), guest.workload.touched_pages - 1
    guest.memory.words[zeroed] = 0
    verdict = guest.verify()
    assert verdict["first_bad"] == [zeroed]
    assert "is all zero" in verdict["message"]
    guest.memory.words[zeroed] = content(
        guest, zeroed, int(guest.workload.expected(STEPS, 0, zeroed, zeroed + 1).generations[0])
    )
    punch_hole(guest, hole)
    verdict = guest.verify()
    assert verdict["first_bad"] == [hole]
    assert f"page {hole} (static) is missing" in verdict["message"]


def punch_hole(vmm: Vmm, page: int) -> None:
    import ctypes

    keep_size_and_punch = 3
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (vmm.memory.fd, keep_size_and_punch, ctypes.c_long(page * PAGE_SIZE), ctypes.c_long(PAGE_SIZE))
    assert libc.fallocate(*arguments) == 0


def test_a_zero_page_may_be_a_hole_but_no_hole_is_populated(guest: Vmm) -> None:
    expected = guest.workload.expected(STEPS, 0, 1, guest.workload.touched_pages)
    zero = int(np.flatnonzero(expected.keys() == 0)[0]) + 1
    punch_hole(guest, zero)
    blocks = os.fstat(guest.memory.fd).st_blocks
    assert guest.verify()["ok"]
    assert os.fstat(guest.memory.fd).st_blocks == blocks


def test_data_in_never_touched_memory_is_caught(guest: Vmm) -> None:
    page = guest.memory.pages - 3
    guest.memory.words[page, 17] = 1
    verdict = guest.verify()
    assert verdict["first_bad"] == [page]
    assert "untouched" in verdict["message"]
    guest.memory.words[page, 17] = 0
    assert guest.verify()["ok"]


def test_a_forged_heartbeat_page_is_caught(guest: Vmm) -> None:
    guest.resume()
    guest.pause()
    assert guest.verify()["ok"]
    guest.memory.words[0, 100] ^= np.uint64(1)
    assert guest.verify()["first_bad"] == [0]


def test_many_bad_pages_are_counted_and_the_first_eight_listed(guest: Vmm) -> None:
    guest.memory.words[100:1000] ^= np.uint64(1)
    verdict = guest.verify()
    assert verdict["bad_pages"] == 900
    assert verdict["first_bad"] == list(range(100, 108))


def test_a_wrong_step_count_does_not_verify(guest: Vmm) -> None:
    guest.vcpu.step += 1
    verdict = guest.verify()
    assert verdict["bad_pages"] == 1
    assert not verdict["ok"]


def test_a_wrong_clock_does_not_verify(guest: Vmm) -> None:
    guest.clock.boot_hrtime -= 1_000_000
    verdict = guest.verify()
    assert (verdict["ok"], verdict["bad_pages"], verdict["clock_ok"]) == (False, 0, False)
    assert "TSC" in verdict["message"]


def test_verify_of_a_running_guest_stops_it_exactly_and_lets_it_run_on(make_vmm: Callable[..., Vmm]) -> None:
    vmm = make_vmm(workload="fill", memory="8MiB")
    vmm.resume()
    before = vmm.vcpu.step
    assert vmm.verify()["ok"]
    assert vmm.state == "running"
    while vmm.vcpu.step <= before:
        threading.Event().wait(0.001)
    assert vmm.verify()["ok"]


def test_pause_interrupts_a_verification(make_vmm: Callable[..., Vmm]) -> None:
    vmm = make_vmm(workload="fill", memory="256MiB")
    outcome: list[object] = []

    def verify() -> None:
        try:
            outcome.append(vmm.verify()["ok"])
        except VmmError as error:
            outcome.append(error.name)

    while "Interrupted" not in outcome:  # it may be faster than the pause once, but not every time
        assert len(outcome) < 20, outcome
        vmm.resume()
        thread = threading.Thread(target=verify)
        thread.start()
        while vmm.vcpu.running and thread.is_alive():
            threading.Event().wait(0.0005)
        vmm.pause()
        thread.join()
        assert vmm.state == "paused"
    assert set(outcome) <= {True, "Interrupted"}
    assert vmm.verify()["ok"]
