"""The journal of hand-over decisions, one appended line each; it survives a killed daemon.

    <crc32 of the rest, 8 hex digits> {"at": ..., "migration_id": ..., "epoch": ..., "role": ..., "decision": ...}

A decision is written before the message that tells it leaves; fsync follows in the background, because a guest's
memory dies with its host anyway. A line that was torn, by a crash or a full disk, is recognised by its checksum or the
missing end of line, and ignored: what it would have said was never acted on. The room for all decisions of an attempt
is set aside when it begins, so that a disk which becomes full refuses the next attempt and not this one's COMMIT.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from migrated.kernel.files import make_room
from migrated.record.terms import Role
from protocol.answers import may_close
from protocol.handover import Decision

KEPT_ATTEMPTS: Final = 2000
"""Closed attempts kept when the journal is rewritten; a late COMMIT for an older one is answered as unknown."""
KEPT_UNDECIDED: Final = 100
"""Of those in which nothing was decided but to give up, so many: a peer can make any number of them."""
_KEPT_FACT: Final = "peer_names"
"""The fact of a closed attempt that stays: who may ask for its outcome."""
_NO_FACTS: Final[dict[str, Any]] = {}
_MORE_LINES: Final = 10_000
"""Lines after which the journal is rewritten while the daemon runs, if it has twice as many as it was left with."""
_MODE: Final = 0o640

_ROOM_BYTES: Final = 1 << 16
"""Room that there must be when an attempt begins: some hundred attempts at once can be decided in it."""
_SYNC_DELAY_S: Final = 0.2
_END_OF_TORN: Final = b"#\n"
"""Ends a torn line before the next entry. A line that lacked nothing but its end must not become whole by that."""

log = structlog.get_logger()


class JournalError(Exception):
    """A decision could not be written: nothing that depends on it may happen."""


@dataclass(slots=True)
class Attempt:
    """All that the journal knows of one side of one attempt.

    ``facts`` are what was known at BEGIN: ``peer``, ``place``, ``paused`` and the like.
    """

    migration_id: str
    epoch: int
    guest: str
    role: Role
    began_at: str
    facts: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    closed: bool = False

    @property
    def place(self) -> str:
        """The place of the guest's process on this host."""
        return str(self.facts.get("place", self.guest))

    def without_facts(self) -> Attempt:
        """The same with no more facts than a late question needs: thousands of closed attempts are kept. Whoever holds
        this one, as an attempt that was recovered and is still shown, goes on to have them all."""
        return replace(self, guest=sys.intern(self.guest), facts=_facts_of_closed(self.facts))


@functools.lru_cache(maxsize=256)
def _kept_facts(names: tuple[str, ...]) -> dict[str, Any]:
    return {_KEPT_FACT: list(names)}


def _facts_of_closed(facts: dict[str, Any]) -> dict[str, Any]:
    """What is kept of facts: one object for all attempts of a peer."""
    return _kept_facts(tuple(facts[_KEPT_FACT])) if _KEPT_FACT in facts else _NO_FACTS


class _Snapshot(NamedTuple):
    """An attempt as it was at one moment, to be written by a thread."""

    attempt: Attempt
    decisions: tuple[Decision, ...]
    closed: bool

    def lines(self) -> Iterator[bytes]:
        """The lines of a journal from which a daemon that starts reads this attempt as it was."""
        one = self.attempt
        which = {"migration_id": one.migration_id, "role": one.role}
        begin = {"at": one.began_at, "epoch": one.epoch, "guest": one.guest, "facts": one.facts}
        yield _pack({**which, **begin, "decision": Decision.BEGIN.value})
        for said in (*(decision.value for decision in self.decisions), *(("closed",) if self.closed else ())):
            yield _pack({**which, "decision": said})


class Journal:
    """The journal of one daemon.

    Args:
        directory: the state directory, created if missing.

    Raises:
        JournalError: it cannot be opened for writing.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "journal"
        self._attempts: dict[tuple[str, Role], Attempt] = {}
        self._epochs: dict[str, int] = {}
        self._syncs: set[asyncio.Future[None]] = set()
        self._sync_timer: asyncio.TimerHandle | None = None
        self._ends_torn = False
        self._lines = 0
        self._left_with = 0
        """Lines of the file after it was last rewritten."""
        self._behind: list[bytes] | None = None
        """While the journal is rewritten: what was written to the old file meanwhile."""
        self.torn_lines = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(directory / "journal.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in self._read():
                self._apply(entry)
            self._rewrite()
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except BlockingIOError as error:
            os.close(self._lock_fd)
            raise JournalError(
                f"another daemon uses the state directory {directory}; stop it, or give each daemon its own"
            ) from error
        except OSError as error:
            raise JournalError(f"the journal {self._path} cannot be opened: {error.strerror}") from error

    def begin(self, migration_id: str, epoch: int, guest: str, role: Role, facts: dict[str, Any]) -> None:
        """Open an attempt. Before the guest can be stopped, or an incoming guest loaded.

        Raises:
            JournalError: it could not be written, or there is no room for what will be decided.
        """
        try:
            make_room(self._fd, _ROOM_BYTES)
        except OSError as error:
            raise JournalError(
                f"the journal {self._path} has no room for another attempt: {error.strerror}; free some on its disk"
            ) from error
        self._append(
            {
                "at": datetime.now(UTC).isoformat(),
                "migration_id": migration_id,
                "epoch": epoch,
                "guest": guest,
                "role": role,
                "decision": Decision.BEGIN.value,
                "facts": facts,
            }
        )

    def decide(self, migration_id: str, role: Role, decision: Decision) -> None:
        """Write a decision. When this returns it survives a kill of the daemon.

        Raises:
            JournalError: it could not be written (full disk); the caller must not act on it.
        """
        self._append({"migration_id": migration_id, "role": role, "decision": decision.value})

    def close_attempt(self, migration_id: str, role: Role, *, overtaken: bool = False) -> None:
        """Say that nothing of the attempt is left to do after a restart.

        Without effect for an incoming attempt whose end could not be journaled: a restarted daemon takes it up again,
        or the source would never hear how it ended.

        Args:
            overtaken: a later epoch of the guest stands for it.
        """
        attempt = self._attempts.get((migration_id, role))
        if role == "destination" and not overtaken and attempt is not None and not may_close(attempt.decisions):
            return
        with contextlib.suppress(JournalError):
            self._append({"migration_id": migration_id, "role": role, "decision": "closed"})
        if self._lines > max(_MORE_LINES, 2 * self._left_with) and self._behind is None:
            self._rewrite_later()

    def attempt(self, migration_id: str, role: Role) -> Attempt | None:
        """One attempt, None when it is unknown here."""
        return self._attempts.get((migration_id, role))

    def open_attempts(self) -> tuple[list[Attempt], list[Attempt]]:
        """Return the open attempts that a restarted daemon must finish or undo, and the open attempts that a later
        epoch of the same guest has overtaken, in either role, which must not touch it any more. Both oldest first."""
        newest: dict[str, int] = {}
        for attempt in self._attempts.values():
            newest[attempt.guest] = max(newest.get(attempt.guest, 0), attempt.epoch)
        found = [attempt for attempt in self._attempts.values() if not attempt.closed]
        current = [attempt for attempt in found if attempt.epoch == newest[attempt.guest]]
        return current, [attempt for attempt in found if attempt.epoch != newest[attempt.guest]]

    def next_epoch(self, guest: str, known: int) -> int:
        """The number of the guest's next hand-over: above everything journaled here and above ``known``."""
        return max(self._epochs.get(guest, 0), known) + 1

    def close(self) -> None:
        """Flush to the disk and close."""
        if self._sync_timer is not None:
            self._sync_timer.cancel()
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fdatasync(self._fd)
            os.close(self._fd)
            os.close(self._lock_fd)
            self._fd = -1

    def _append(self, entry: dict[str, Any]) -> None:
        line = (_END_OF_TORN if self._ends_torn else b"") + _pack(entry)
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise JournalError(f"the journal {self._path} cannot be written: {error.strerror}") from error
        self._ends_torn = written != len(line)
        if self._ends_torn:
            raise JournalError(f"the journal {self._path} took only {written} of {len(line)} bytes: the disk is full")
        self._apply(entry)
        self._lines += 1
        if self._behind is not None:
            self._behind.append(_pack(entry))
        self._sync_later()

    def _sync_later(self) -> None:
        """Flush to the disk in a while: outside the downtime window, and once for decisions that come together."""
        if self._sync_timer is None:
            with contextlib.suppress(RuntimeError):  # no loop: a tool reads the journal
                self._sync_timer = asyncio.get_running_loop().call_later(_SYNC_DELAY_S, self._sync_now)

    def _sync_now(self) -> None:
        self._sync_timer = None
        if self._fd >= 0:
            future = asyncio.get_running_loop().run_in_executor(None, _sync, self._fd)
            self._syncs.add(future)
            future.add_done_callback(self._syncs.discard)

    def _apply(self, entry: dict[str, Any]) -> None:
        key = (entry["migration_id"], entry["role"])
        decision = entry["decision"]
        if decision == Decision.BEGIN:
            self._attempts[key] = Attempt(
                entry["migration_id"], entry["epoch"], entry["guest"], entry["role"], entry["at"], entry["facts"]
            )
            self._epochs[entry["guest"]] = max(self._epochs.get(entry["guest"], 0), entry["epoch"])
        elif (attempt := self._attempts.get(key)) is not None:
            if decision == "closed":
                attempt.closed = True
                self._attempts[key] = attempt.without_facts()
            else:
                attempt.decisions.append(Decision(decision))

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        for line in data.splitlines(keepends=True):
            entry = _unpack(line)
            if entry is None:
                self.torn_lines += 1
                log.warning("a line of the journal is torn and is ignored", journal=str(self._path))
            else:
                yield entry

    def _rewrite(self) -> None:
        """Drop what is no longer needed. Atomic."""
        self._drop_old()
        _write_whole(self._new_path, self._snapshots())
        self._new_path.replace(self._path)

    @property
    def _new_path(self) -> Path:
        return self._path.with_suffix(".new")

    def _drop_old(self) -> None:
        """Forget old closed attempts, sooner where nothing was decided: a peer must not push out what was."""
        closed = [(key, attempt) for key, attempt in self._attempts.items() if attempt.closed]
        decided = [key for key, attempt in closed if _was_decided(attempt)]
        undecided = [key for key, attempt in closed if not _was_decided(attempt)]
        for keys, kept in ((decided, KEPT_ATTEMPTS), (undecided, KEPT_UNDECIDED)):
            for key in keys[: max(0, len(keys) - kept)]:
                del self._attempts[key]
        self._epochs.clear()
        for attempt in self._attempts.values():
            self._epochs[attempt.guest] = max(self._epochs.get(attempt.guest, 0), attempt.epoch)

    def _snapshots(self) -> list[_Snapshot]:
        """All that is to be written. Little work: a thread makes lines of it while guests are moved."""
        found = [_Snapshot(one, tuple(one.decisions), one.closed) for one in self._attempts.values()]
        self._lines = self._left_with = sum(1 + len(one.decisions) + one.closed for one in found)
        return found

    def _rewrite_later(self) -> None:
        """Rewrite the journal while decisions go on to be written: the old file counts until the new one is whole."""
        with contextlib.suppress(RuntimeError):  # no loop: a tool reads the journal
            loop = asyncio.get_running_loop()
            self._drop_old()
            self._behind = []
            future = loop.run_in_executor(None, _write_whole, self._new_path, self._snapshots())
            self._syncs.add(future)
            future.add_done_callback(self._rewritten)

    def _rewritten(self, future: asyncio.Future[None]) -> None:
        """The new file is on the disk but for what was written since: add that, and go on with it."""
        self._syncs.discard(future)
        behind, self._behind = self._behind or [], None
        if self._fd < 0 or future.cancelled():
            return
        try:
            if (error := future.exception()) is not None:
                raise error
            fd = os.open(self._new_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                if os.write(fd, rest := b"".join(behind)) != len(rest):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                make_room(fd, _ROOM_BYTES)  # for the attempts under way
                self._new_path.replace(self._path)
            except OSError:
                os.close(fd)
                raise
        except OSError as problem:
            log.error("the journal could not be rewritten: it goes on to grow", reason=problem.strerror)
            return
        os.close(self._fd)
        self._fd, self._ends_torn = fd, False
        self._sync_later()


def _was_decided(attempt: Attempt) -> bool:
    return not {Decision.READY, Decision.COMMIT, Decision.RUNNING, Decision.RETIRED}.isdisjoint(attempt.decisions)


def _write_whole(path: Path, snapshots: list[_Snapshot]) -> None:
    path.unlink(missing_ok=True)  # what a killed daemon left has its mode
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE), "wb") as file:
        for snapshot in snapshots:
            file.writelines(snapshot.lines())
        file.flush()
        os.fsync(file.fileno())


def _pack(entry: dict[str, Any]) -> bytes:
    body = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _unpack(line: bytes) -> dict[str, Any] | None:
    checksum, _, body = line.partition(b" ")
    try:
        if not body.endswith(b"\n") or int(checksum, 16) != zlib.crc32(body[:-1]):
            return None
        entry: dict[str, Any] = json.loads(body)
    except ValueError:
        return None
    return entry


def _sync(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.fdatasync(fd)
