"""Comparison of guest memory with the content that follows from seed and step count, chunk by chunk and without
populating a hole."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vmm_sim.clock import TSC_TOLERANCE_PPM, GuestClock
from vmm_sim.content import PAGE_SIZE, WORDS, Words
from vmm_sim.errors import VmmError
from vmm_sim.heartbeat import Heartbeat
from vmm_sim.host_clock import NS_PER_SEC
from vmm_sim.memory import GuestMemory
from vmm_sim.workload import HEARTBEAT_PAGE, Workload

CHUNK_PAGES: Final = 512
REPORTED_PAGES: Final = 8
STALE_GENERATIONS: Final = 64
"""How far back a page's content is searched for when it is wrong."""


@dataclass(slots=True)
class Verdict:
    """The result of a comparison: number of bad pages, the first of them, and a description of its damage."""

    bad_pages: int = 0
    first_bad: list[int] = field(default_factory=list)
    diagnosis: str = ""


class Verifier:
    """Compares the memory of a stopped guest with its state."""

    def __init__(
        self, memory: GuestMemory, workload: Workload, step: int, device_writes: int, heartbeat: Heartbeat
    ) -> None:
        self._memory = memory
        self._workload = workload
        self._step = step
        self._device_writes = device_writes
        self._heartbeat = heartbeat
        self._verdict = Verdict()
        self._expected: Words = np.empty((CHUNK_PAGES, WORDS), dtype=np.uint64)
        self._actual: Words = np.empty((CHUNK_PAGES, WORDS), dtype=np.uint64)

    def run(self, interrupt: threading.Event) -> Verdict:
        """The verdict over all pages. Raises VmmError Interrupted."""
        self._check_heartbeat()
        touched = self._workload.touched_pages
        present = np.zeros(touched, dtype=np.bool_)
        for first, last in self._memory.data_runs(0, touched):
            present[first:last] = True
        for first in range(HEARTBEAT_PAGE + 1, touched, CHUNK_PAGES):
            _check(interrupt)
            self._check_touched(first, present[first : min(first + CHUNK_PAGES, touched)])
        for first, last in self._memory.data_runs(touched):
            for start in range(first, last, CHUNK_PAGES):
                _check(interrupt)
                used = np.bitwise_or.reduce(self._memory.words[start : min(start + CHUNK_PAGES, last)], axis=1)
                for page in self._bad(np.flatnonzero(used) + start):
                    self._diagnose(page, "holds data although the guest never touched it")
        return self._verdict

    def _bad(self, pages: np.typing.NDArray[np.int64]) -> list[int]:
        """Count bad pages; returns the first if it is the first of all."""
        verdict = self._verdict
        news = [int(page) for page in pages[:REPORTED_PAGES]]
        first = news[:1] if not verdict.bad_pages else []
        verdict.bad_pages += len(pages)
        verdict.first_bad += news[: REPORTED_PAGES - len(verdict.first_bad)]
        return first

    def _diagnose(self, page: int, what: str) -> None:
        self._verdict.diagnosis = f"page {page} ({self._workload.stream_of(page)}) {what}"

    def _check_heartbeat(self) -> None:
        expected = self._heartbeat.page()
        populated = any(True for _ in self._memory.data_runs(HEARTBEAT_PAGE, HEARTBEAT_PAGE + 1))
        actual = self._memory.read_bytes(0, PAGE_SIZE) if populated else bytes(PAGE_SIZE)
        if actual != expected:
            self._bad(np.array([HEARTBEAT_PAGE], dtype=np.int64))
            what = "is all zero" if not any(actual) else "does not match the heartbeat in the vCPU state"
            self._diagnose(HEARTBEAT_PAGE, what)

    def _check_touched(self, first: int, present: np.typing.NDArray[np.bool_]) -> None:
        count = len(present)
        expected = self._workload.expected(self._step, self._device_writes, first, first + count)
        if present.all():
            index = np.arange(count, dtype=np.int64)
            actual = self._memory.words[first : first + count]
        else:
            lost = np.flatnonzero(~present & (expected.keys() != 0))
            for page in self._bad(lost + first):
                self._diagnose(page, "is missing: the page was never populated")
            index = np.flatnonzero(present)
            # "clip" writes straight into the buffer; the indices are in bounds.
            actual = np.take(
                self._memory.words[first : first + count],
                index,
                axis=0,
                out=self._actual[: len(index)],
                mode="clip",
            )
            expected = expected.select(index)
        wanted = self._expected[: len(index)]
        expected.render(wanted)
        wrong = np.flatnonzero((actual != wanted).any(axis=1))
        for page in self._bad(index[wrong] + first):
            position = int(wrong[0])
            self._explain(page, actual[position].copy(), wanted[position].copy(), int(expected.generations[position]))

    def _explain(self, page: int, actual: Words, wanted: Words, generation: int) -> None:
        """Name the damage of one page: zeroed, stale, torn or altered."""
        different = actual.view(np.uint8) != wanted.view(np.uint8)
        if not actual.any():
            self._diagnose(page, f"is all zero, expected generation {generation}")
            return
        words_wrong = actual != wanted
        for older in range(max(generation - STALE_GENERATIONS, 0), generation):
            previous = self._workload.expected(self._step, self._device_writes, page, page + 1)
            previous.generations[0] = older
            content: Words = np.empty((1, WORDS), dtype=np.uint64)
            previous.render(content)
            if (actual == content[0]).all():
                self._diagnose(page, f"is stale: generation {older}, expected {generation}")
                return
            if (actual[words_wrong] == content[0][words_wrong]).all() and words_wrong.sum() > 1:
                self._diagnose(page, f"is torn: part generation {older}, part {generation}")
                return
        at = int(np.flatnonzero(different)[0])
        self._diagnose(
            page, f"differs in {int(different.sum())} bytes from generation {generation}, first at byte {at}"
        )


def find_clock_fault(clock: GuestClock, heartbeat: Heartbeat, boot_tsc: int, *, ran_unscaled: bool) -> str:
    """Return a sentence on a fault of the guest's clock, empty when there is none: the guest must never have seen its
    TSC run backwards, and TSC and uptime must have grown by the same time since boot.

    ``ran_unscaled``: some host ran the TSC at its own frequency, within the tolerance."""
    if heartbeat.backwards:
        return f"The guest saw its TSC run backwards {heartbeat.backwards} times."
    reading = clock.read()
    uptime_ns = clock.uptime_at(reading.hrtime)
    expected = uptime_ns * clock.guest_freq // NS_PER_SEC
    # Two ticks of rounding per hop, and either 10 ppb for the multiplier's fraction bits or the unscaled tolerance.
    share = 1_000_000 // TSC_TOLERANCE_PPM if ran_unscaled else 100_000_000
    tolerance = 4 + 2 * clock.hops + abs(expected) // share
    error = (reading.guest_tsc - boot_tsc - expected + (1 << 63)) % (1 << 64) - (1 << 63)
    if uptime_ns < 0 or abs(error) > tolerance:
        return (
            f"The guest's TSC is {error} ticks off its uptime of {uptime_ns} ns, more than {tolerance} allowed:"
            " TSC and boot time were not moved by the same time."
        )
    return ""


def _check(interrupt: threading.Event) -> None:
    if interrupt.is_set():
        raise VmmError("Interrupted", "The verification was interrupted.")
