"""The journal: what was decided is there after a kill, what could not be written was not decided."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from migrated.state.history import History
from migrated.state.journal import KEPT_ATTEMPTS, Journal, JournalError
from migrated.state.learned import keep_resume_costs
from migrated.state.run_marks import RunMarks
from protocol.handover import Decision
from scripts.basics import ROOT
from scripts.rig.disk import full
from scripts.rig.waiting import until

LINE_BYTES = len(b'0badcafe {"migration_id":"m1","role":"source","decision":"commit"}\n')
FACTS = {"peer": "127.0.0.1:4460", "paused": False}


@contextmanager
def opened(directory: Path) -> Iterator[Journal]:
    with closing(Journal(directory)) as journal:
        yield journal


def begin(journal: Journal, migration_id: str = "m1", epoch: int = 1, guest: str = "g1") -> None:
    journal.begin(migration_id, epoch, guest, "source", FACTS)


def decisions_of(journal: Journal, migration_id: str = "m1") -> list[Decision]:
    attempt = journal.attempt(migration_id, "source")
    assert attempt is not None
    return attempt.decisions


@contextmanager
def no_file_longer_than(size_bytes: int) -> Iterator[None]:
    """A disk that is full: the kernel writes up to this size and then not at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_decisions_are_read_again_with_all_that_was_known_at_the_begin(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        begin(journal, epoch=7)
        journal.decide("m1", "source", Decision.COMMIT)
    with opened(tmp_path) as journal:
        attempt = journal.attempt("m1", "source")
        assert attempt is not None
        assert (attempt.epoch, attempt.guest, attempt.facts, attempt.decisions) == (7, "g1", FACTS, [Decision.COMMIT])
        assert journal.open_attempts() == ([attempt], [])
        assert journal.attempt("m1", "destination") is None
        assert journal.next_epoch("g1", known=0) == 8
        assert journal.next_epoch("g1", known=20) == 21
        assert journal.next_epoch("another", known=0) == 1


def test_a_decision_is_in_the_file_when_decide_returns(tmp_path: Path) -> None:
    """As a kill leaves it: nothing is closed or flushed."""
    with opened(tmp_path) as journal:
        begin(journal)
        journal.decide("m1", "source", Decision.COMMIT)
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "journal").write_bytes((tmp_path / "journal").read_bytes())
        with opened(tmp_path / "copy") as killed:
            assert decisions_of(killed) == [Decision.COMMIT]


@pytest.mark.parametrize("kept", [1, 8, 9, 20, 60, LINE_BYTES - 1])
def test_a_torn_last_line_is_ignored_wherever_it_was_torn(tmp_path: Path, kept: int) -> None:
    with opened(tmp_path) as journal:
        begin(journal)
        before = (tmp_path / "journal").stat().st_size
        journal.decide("m1", "source", Decision.COMMIT)
    os.truncate(tmp_path / "journal", before + kept)
    with opened(tmp_path) as journal:
        assert decisions_of(journal) == []
        assert journal.torn_lines == 1
    with opened(tmp_path) as journal:
        assert journal.torn_lines == 0, "it was rewritten without the torn line"


def test_a_line_that_is_not_what_was_written_is_no_decision(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        begin(journal)
        journal.decide("m1", "source", Decision.ABORT)
    path = tmp_path / "journal"
    path.write_bytes(path.read_bytes().replace(b'"abort"', b'"commit"'))
    with opened(tmp_path) as journal:
        assert decisions_of(journal) == []
        assert journal.torn_lines == 1


def test_a_full_disk_refuses_the_decision_and_keeps_those_before_it(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        begin(journal)
        full = (tmp_path / "journal").stat().st_size
        with no_file_longer_than(full), pytest.raises(JournalError, match="cannot be written: File too large"):
            journal.decide("m1", "source", Decision.COMMIT)
        assert decisions_of(journal) == []
    with opened(tmp_path) as journal:
        assert decisions_of(journal) == []


@pytest.mark.parametrize("room", [1, 20, 60, LINE_BYTES - 1])
def test_what_is_decided_after_a_disk_was_full_in_the_middle_of_a_line_is_kept(tmp_path: Path, room: int) -> None:
    """The torn piece stays in the file; the next entry must not be joined to it."""
    with opened(tmp_path) as journal:
        begin(journal)
        full = (tmp_path / "journal").stat().st_size + room
        with no_file_longer_than(full), pytest.raises(JournalError, match=rf"took only {room} of \d+ bytes"):
            journal.decide("m1", "source", Decision.COMMIT)
        assert decisions_of(journal) == []
        journal.decide("m1", "source", Decision.ABORT)
        begin(journal, "m2", 2, "g2")
    with opened(tmp_path) as journal:
        assert decisions_of(journal) == [Decision.ABORT]
        assert journal.attempt("m2", "source") is not None
        assert journal.torn_lines == 1


def test_an_attempt_that_began_is_decided_on_a_disk_that_is_full_meanwhile(small_disk: Path) -> None:
    """With its guest stopped on both hosts; the next attempt is refused, while nothing has happened yet."""
    with opened(small_disk) as journal:
        begin(journal)
        with full(small_disk):
            for number in range(100):
                journal.decide("m1", "source", (Decision.COMMIT, Decision.ABORT)[number % 2])
            with pytest.raises(JournalError, match="no room for another attempt: No space left on device"):
                begin(journal, "m2", 2)
        begin(journal, "m3", 3)
        assert len(decisions_of(journal)) == 100
        assert journal.attempt("m2", "source") is None


def test_closing_an_attempt_on_a_full_disk_is_no_error_and_it_is_open_again_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        begin(journal)
        with no_file_longer_than((tmp_path / "journal").stat().st_size):
            journal.close_attempt("m1", "source")
    with opened(tmp_path) as journal:
        assert [attempt.migration_id for attempt in journal.open_attempts()[0]] == ["m1"]


def test_a_later_epoch_of_the_guest_overtakes_what_is_open(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        begin(journal, "old", 3)
        journal.begin("new", 4, "g1", "destination", FACTS)
        begin(journal, "other", 1, "g2")
        journal.decide("new", "destination", Decision.DISCARD)
        journal.close_attempt("new", "destination")
        current, overtaken = journal.open_attempts()
        assert [attempt.migration_id for attempt in current] == ["other"]
        assert [attempt.migration_id for attempt in overtaken] == ["old"]


def test_an_incoming_attempt_whose_end_is_not_journaled_is_not_closed(tmp_path: Path) -> None:
    """A restarted daemon must take it up again, or the source would hear for ever that it is open."""
    with opened(tmp_path) as journal:
        journal.begin("m1", 1, "g1", "destination", FACTS)
        journal.decide("m1", "destination", Decision.READY)
        journal.close_attempt("m1", "destination")
        assert [attempt.migration_id for attempt in journal.open_attempts()[0]] == ["m1"]
        journal.close_attempt("m1", "destination", overtaken=True)
        assert journal.open_attempts() == ([], [])


def test_the_rewrite_drops_only_the_oldest_closed_attempts(tmp_path: Path) -> None:
    count = KEPT_ATTEMPTS + 3
    with opened(tmp_path) as journal:
        begin(journal, "open", 1, "still-open")
        for number in range(count):
            begin(journal, f"m{number}", number + 1)
            journal.decide(f"m{number}", "source", Decision.COMMIT)
            journal.close_attempt(f"m{number}", "source")
        size = (tmp_path / "journal").stat().st_size
    with opened(tmp_path) as journal:
        assert (tmp_path / "journal").stat().st_size < size
        known = [number for number in range(count) if journal.attempt(f"m{number}", "source") is not None]
        assert known == list(range(3, count))
        assert decisions_of(journal, f"m{count - 1}") == [Decision.COMMIT]
        assert [attempt.migration_id for attempt in journal.open_attempts()[0]] == ["open"]
        assert journal.next_epoch("g1", known=0) == count + 1


async def test_a_journal_that_keeps_as_much_as_it_may_is_not_rewritten_with_every_attempt(tmp_path: Path) -> None:
    """2000 incoming attempts are 10,000 lines by themselves: each further one rewrote them all."""

    def take_in(number: int) -> None:
        journal.begin(f"m{number}", number + 1, "g1", "destination", FACTS)
        for decision in (Decision.READY, Decision.COMMIT, Decision.RUNNING):
            journal.decide(f"m{number}", "destination", decision)
        journal.close_attempt(f"m{number}", "destination")

    async def rewritten() -> bool:
        return (tmp_path / "journal").stat().st_ino != first

    with opened(tmp_path) as journal:
        first = (tmp_path / "journal").stat().st_ino
        for number in range(KEPT_ATTEMPTS + 20):
            take_in(number)
        await until("the journal rewritten", rewritten)
        inode = (tmp_path / "journal").stat().st_ino
        for number in range(KEPT_ATTEMPTS + 20, KEPT_ATTEMPTS + 40):
            take_in(number)
        await asyncio.sleep(0.3)  # a rewriting that began by mistake would be over by then
        assert (tmp_path / "journal").stat().st_ino == inode
    with opened(tmp_path) as journal:
        attempt = journal.attempt(f"m{KEPT_ATTEMPTS + 39}", "destination")
        assert attempt is not None
        assert attempt.closed
        assert attempt.decisions == [Decision.READY, Decision.COMMIT, Decision.RUNNING]


def test_what_the_daemon_keeps_is_for_its_user_and_group(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for _ in range(2):  # anew, and after a restart
            with opened(tmp_path), closing(History(tmp_path)), closing(RunMarks(tmp_path)):
                keep_resume_costs(tmp_path, {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) >= 5
    assert set(modes.values()) == {0o640}, modes


def test_a_rewrite_that_was_killed_half_way_costs_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        begin(journal)
    (tmp_path / "journal.new").write_bytes(b"half a jour")
    with opened(tmp_path) as journal:
        assert journal.attempt("m1", "source") is not None
        assert not (tmp_path / "journal.new").exists()


def test_a_second_daemon_is_kept_away_until_the_first_has_ended(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(JournalError, match="another daemon uses the state directory"):
        Journal(tmp_path)
    with opened(tmp_path) as journal:
        begin(journal)


def test_a_directory_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"the journal .*/file/journal cannot be opened: "):
        Journal(tmp_path / "file")


async def test_decisions_that_come_together_are_flushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = asyncio.Event()
    loop, count = asyncio.get_running_loop(), 0
    fdatasync = os.fdatasync

    def sync(fd: int) -> None:
        nonlocal count
        count += 1
        fdatasync(fd)
        loop.call_soon_threadsafe(flushed.set)

    monkeypatch.setattr(os, "fdatasync", sync)
    with opened(tmp_path) as journal:
        begin(journal)
        journal.decide("m1", "source", Decision.COMMIT)
        assert count == 0, "a decision does not wait for the disk"
        async with asyncio.timeout(20):
            await flushed.wait()
        assert count == 1


def test_no_decision_is_lost_by_a_kill_at_any_call_while_the_journal_is_rewritten() -> None:
    """In processes of its own, which fork without threads."""
    command = [sys.executable, "-m", "scripts.journal_kills", "--attempts", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert counts["kills"] > 30
    assert counts["rewrites"] > 1, "the first is that of its opening"
