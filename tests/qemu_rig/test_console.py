"""Beats and lines with their time of arrival, and the silences between beats.

beats    0 1 2 3         4 5 6        a gap between 3 and 4
QEMU a   0 1 2 |                      numbers go on, so one guest; numbers twice, so two
QEMU b         |  3 4 5
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.qemu_rig.console import Beat, Console
from scripts.qemu_rig.gaps import Gap, clock_stood_ns, handover_gap, largest_gap, merged, said_twice
from scripts.rig.waiting import RigError

MS = 1_000_000
WAIT_S = 30.0


class Guest:
    """The guest's end of two serial ports."""

    def __init__(self, directory: Path) -> None:
        self.paths = directory / "console", directory / "beats"
        self._listeners = [socket.socket(socket.AF_UNIX) for _ in self.paths]
        for listener, path in zip(self._listeners, self.paths, strict=True):
            listener.bind(str(path))
            listener.listen()

    def accept(self) -> None:
        """Take the reader's connections."""
        self.console, self.beats = (listener.accept()[0] for listener in self._listeners)

    def close(self) -> None:
        """End as a QEMU that is killed."""
        for connection in (self.console, self.beats, *self._listeners):
            connection.close()


@pytest.fixture
def guest(directory: Path) -> Iterator[Guest]:
    """Both ports, connected."""
    guest = Guest(directory)
    yield guest
    guest.close()


@pytest.fixture
def console(guest: Guest) -> Iterator[Console]:
    """Their reader."""
    with Console(*guest.paths) as console:
        guest.accept()
        yield console


def test_beats_and_lines_are_told_apart(guest: Guest, console: Console) -> None:
    """Also when a line comes in pieces, and whichever port it comes on."""
    guest.beats.sendall(b"b 7 1000\nb 8 2")
    guest.console.sendall(b"READY pages 5\r\n")
    console.wait_for("READY", WAIT_S)
    guest.beats.sendall(b"000\n")
    guest.console.sendall(b"b 9 3000\nBAD page 3 stale\n")
    console.wait_for("BAD", WAIT_S)
    guest.close()
    with pytest.raises(RigError, match="QEMU ended"):
        console.wait_for("never", WAIT_S)
    assert sorted((beat.sequence, beat.guest_ns) for beat in console.beats()) == [(7, 1000), (8, 2000), (9, 3000)]
    assert [line.text for line in console.lines()] == ["READY pages 5", "BAD page 3 stale"]
    assert console.complaints() == ["BAD page 3 stale"]


def test_a_line_has_the_time_of_its_arrival(guest: Guest, console: Console) -> None:
    """Not earlier than it was sent, not later than it was seen."""
    before_ns = time.monotonic_ns()
    guest.console.sendall(b"READY\n")
    console.wait_for("READY", WAIT_S)
    assert before_ns <= console.lines()[0].arrival_ns <= time.monotonic_ns()


def test_an_answer_is_one_that_came_after_the_question(guest: Guest, console: Console) -> None:
    """The answer to an earlier question is not taken for it."""
    guest.console.sendall(b"CHECKED pages 5 bad 1\n")
    console.wait_for("CHECKED", WAIT_S)

    def answer() -> None:
        assert guest.console.recv(100) == b"check\n"
        guest.console.sendall(b"CHECKED pages 5 bad 0\n")

    answering = threading.Thread(target=answer)
    answering.start()
    assert console.check() == 0
    answering.join()


def test_what_had_arrived_is_read_before_the_end(guest: Guest) -> None:
    """A reader that is closed has everything that was sent before."""
    console = Console(*guest.paths)
    guest.accept()
    guest.beats.sendall(b"".join(b"b %d 0\n" % number for number in range(5000)))
    console.close()
    assert len(console.beats()) == 5000


def test_a_silent_guest_is_said_to_be_silent(guest: Guest, console: Console) -> None:
    """With what it said last, for whoever has to find out why."""
    guest.console.sendall(b"FAILED allocating memory: none\n")
    console.wait_for("FAILED", WAIT_S)
    with pytest.raises(RigError, match=r"did not come in time.*allocating memory"):
        console.wait_for("READY", timeout_s=0.01)


def beats(*arrivals_ms: int, first: int = 0) -> list[Beat]:
    """Beats with these times of arrival. The guest's clock goes on by 1 ms for each."""
    return [Beat(first + i, (first + i) * MS, arrival * MS) for i, arrival in enumerate(arrivals_ms)]


def test_how_long_the_clock_stood_is_told_by_the_beats_that_were_heard_soonest() -> None:
    """The first beat here was said 9 ms late, the second at once; the silence is longer than the stop."""
    before = [Beat(0, 0, 102 * MS), Beat(1, 1 * MS, 101 * MS)]
    after = [Beat(2, 3 * MS, 132 * MS), Beat(3, 25 * MS, 145 * MS)]
    assert clock_stood_ns(before, after) == 20 * MS
    with pytest.raises(RigError, match="cannot be told"):
        clock_stood_ns(before, [])


def test_the_largest_gap_around_a_moment() -> None:
    """A longer one elsewhere does not count; one that the span only touches does."""
    heard = beats(0, 100, 101, 102, 140, 141)
    assert largest_gap(heard, 110 * MS, 120 * MS) == Gap(102 * MS, 140 * MS, 1 * MS)
    assert largest_gap(heard, 100 * MS, 101 * MS).ns == 1 * MS
    assert largest_gap(heard, 0, 141 * MS).ns == 100 * MS
    with pytest.raises(RigError, match="no beats around"):
        largest_gap(heard, 200 * MS, 300 * MS)


def test_the_gap_of_a_move_is_between_the_two_qemus() -> None:
    """From the last beat there to the first beat here."""
    before, after = beats(0, 1, 2), beats(45, 46, first=3)
    assert handover_gap(before, after) == Gap(2 * MS, 45 * MS, 1 * MS)
    assert [beat.sequence for beat in merged(after, before)] == [0, 1, 2, 3, 4]
    assert said_twice(before, after) == []


def test_two_copies_that_ran_are_found() -> None:
    """By the time of their beats, and by their numbers alone when they are far apart."""
    with pytest.raises(RigError, match="both ran at once"):
        handover_gap(beats(0, 1, 9), beats(5, first=3))
    assert said_twice(beats(0, 1, 2, 3), beats(50, 51, first=3)) == [3]
    with pytest.raises(RigError, match="did not beat on both sides"):
        handover_gap([], beats(1))
