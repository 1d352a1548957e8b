"""Writing a saved guest: frames of several threads into one file that has no name of its own until it is complete.

.migrated-ID.part   O_EXCL, mode 0600, in the target's directory
  append            a place and a number for each frame under a lock, its bytes outside of it
  checkpoint        what was written lies on the disk, so that little is left to flush when the guest is stopped
  give_back         batches of which every page came again become gaps
  publish           closing part, fsync, then the name: by a link, which never replaces a file, or by a rename
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from migrated.base.errors import LinkLostError, RefusedError
from migrated.kernel.files import let_go, start_writeback
from migrated.kernel.memory import punch_hole
from migrated.savefile.errors import SaveFileError
from protocol import messages
from protocol.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES
from protocol.messages import Message
from protocol.pages import indices_of, unpack_runs
from protocol.savefile import MAGIC, PREAMBLE_BYTES, Closing, Preamble, pack_gap
from protocol.versions import MAJOR

_WRITEBACK_BYTES: Final = 16 << 20
"""The kernel is asked to begin writing after so much, so that the disk works while memory is read."""
_BEHIND_BYTES: Final = 64 << 20
"""What was written so far back is on its way to the disk for a while."""
_UNSYNCED_BYTES: Final = 64 << 20
"""What may be left to flush after a checkpoint."""
_MAX_VECTORS: Final = 1024
_BLOCK_BYTES: Final = 4096
_NOBODY: Final = -1


def part_of(target: Path, save_id: bytes) -> Path:
    """The unfinished file beside its target."""
    return target.parent / f".migrated-{save_id.hex()}.part"


def check_target(path: Path, *, force: bool) -> None:
    """Check that a guest may be saved at a path.

    Raises:
        RefusedError: the path is not absolute, its directory cannot take a file, or something is there that may not be
            replaced.
    """
    if not path.is_absolute():
        raise RefusedError(f"the file {str(path)!r} must be given with its whole path, beginning with /")
    if not path.parent.is_dir():
        raise RefusedError(f"there is no directory {path.parent} to save a guest in; make it first")
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RefusedError(f"{path} cannot be used: {error.strerror}") from error
    if not force:
        raise RefusedError(f"{path} exists already; choose another file, remove it, or replace it with --force")
    if not stat.S_ISREG(found.st_mode) or not _is_saved_guest(path):
        raise RefusedError(f"{path} is not a saved guest, and only such a file is replaced; choose another name")


def _is_saved_guest(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class SaveWriter:
    """One file that is being written. Everything that touches the disk is for threads, not for the event loop.

    Args:
        target: the name that it gets in the end, checked by ``check_target``.
        save_id: 16 random bytes.
        architecture: for the preamble.
        pages: of the guest.

    Attributes:
        lets_go: what the disk has is taken out of the page cache, so that a large guest does not drive everything else
            out of it. Whoever writes waits for the disk then; False while nobody may wait.

    Raises:
        SaveFileError: the file cannot be made.
    """

    def __init__(self, target: Path, save_id: bytes, architecture: str, pages: int) -> None:
        self.part = part_of(target, save_id)
        self.save_id = save_id
        self.written_bytes = PREAMBLE_BYTES
        self._target = target
        self._pages = pages
        self._lock = threading.Lock()
        self._frames = 0
        self._synced_bytes = 0
        self.lets_go = True
        self._kicked = self._let_go = 0
        self._batches: list[tuple[int, int, int]] = []
        """Of each batch of pages: its offset, its size, and the number of its frame."""
        self._owner: npt.NDArray[np.int32] = np.full(pages, _NOBODY, np.int32)
        """The batch that holds each page's last content, shape (pages,)."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(self.part, flags, 0o600)
        except OSError as error:
            raise SaveFileError(f"no file can be made in {target.parent}: {error.strerror}") from error
        try:
            self._write([memoryview(Preamble(save_id, architecture).pack())], 0)
        except BaseException:
            self.abandon()
            raise

    def append(self, message: Message, payload: Sequence[memoryview] = (), round_number: int = 0) -> int:
        """Write one frame. Returns its size (bytes).

        Raises:
            SaveFileError: the disk is full or broken.
        """
        payload_bytes = sum(len(view) for view in payload)
        with self._lock:
            number, offset = self._frames, self.written_bytes
            head = messages.frame_head(MAJOR, message, number, payload_bytes=payload_bytes, round_number=round_number)
            size_bytes = len(head) + payload_bytes
            self._frames += 1
            self.written_bytes += size_bytes
            self._note(message, offset, size_bytes, number)
            kick = self.written_bytes - self._kicked >= _WRITEBACK_BYTES
            begin, self._kicked = self._kicked, self.written_bytes if kick else self._kicked
            behind = self._let_go
            if kick and self.lets_go:
                self._let_go = max(behind, begin - _BEHIND_BYTES)
            behind_bytes = self._let_go - behind
        self._write([memoryview(head), *payload], offset)
        if kick:
            start_writeback(self._fd, begin, offset - begin)
        if behind_bytes:
            with self._named():
                let_go(self._fd, behind, behind_bytes)
        return size_bytes

    def _note(self, message: Message, offset: int, size_bytes: int, number: int) -> None:
        """Keep which frame has the last content of which pages."""
        if isinstance(message, messages.Pages):
            self._owner[indices_of(unpack_runs(message.runs, self._pages))] = len(self._batches)
            self._batches.append((offset, size_bytes, number))
        elif isinstance(message, messages.ZeroPages):
            for start, count in unpack_runs(message.runs, self._pages).tolist():
                self._owner[start : start + count] = _NOBODY

    def checkpoint(self) -> None:
        """Wait until all but little of what was written lies on the disk.

        Raises:
            SaveFileError: the disk is full or broken.
        """
        written_bytes = self.written_bytes
        if written_bytes - self._synced_bytes < _UNSYNCED_BYTES:
            return
        with self._named():
            os.fdatasync(self._fd)
        self._synced_bytes = written_bytes

    def give_back(self) -> int:
        """Turn each batch that later ones have overtaken into a gap. Returns the bytes given back, 0 where the file
        system cannot take any: such batches stay, and are read and overwritten at a restore."""
        held = np.zeros(len(self._batches), np.bool_)
        held[self._owner[self._owner != _NOBODY]] = True
        freed_bytes = 0
        for batch in np.flatnonzero(~held).tolist():
            offset, size_bytes, number = self._batches[batch]
            begin, end = offset + HEADER_BYTES, offset + size_bytes
            first, last = -(-begin // _BLOCK_BYTES) * _BLOCK_BYTES, end // _BLOCK_BYTES * _BLOCK_BYTES
            if first >= last:
                continue  # it lies in one block, or two: nothing to gain
            try:
                punch_hole(self._fd, first, last - first)
            except OSError:
                return freed_bytes
            self._write([memoryview(bytes(first - begin))], begin)
            self._write([memoryview(bytes(end - last))], last)
            self._write([memoryview(pack_gap(number, size_bytes))], offset)
            freed_bytes += last - first
        return freed_bytes

    def publish(self, closing: Callable[[int, int], Closing], *, force: bool) -> None:
        """Complete the file and give it its name, once all of it is safe.

        Args:
            closing: called for the closing part, with the end and the number of the frames.
            force: whether a file of that name may be replaced.

        Raises:
            SaveFileError: the disk is full or broken, or another file took the name meanwhile.
            RefusedError: what has the name now may not be replaced.
        """
        self._write([memoryview(closing(self.written_bytes, self._frames).pack())], self.written_bytes)
        with self._named():
            os.fsync(self._fd)
            if force:
                check_target(self._target, force=True)  # as when this began, which may be long ago
                self.part.replace(self._target)
            else:
                try:
                    os.link(self.part, self._target, follow_symlinks=False)
                except FileExistsError as error:
                    raise SaveFileError(f"{self._target} has come into being meanwhile and is left alone") from error
                self.part.unlink()
            sync_directory(self._target.parent)
        self.close()

    def abandon(self) -> None:
        """Remove the file, if it is not published. A second call does nothing."""
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                self.part.unlink()
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, views: Sequence[memoryview], offset: int) -> None:
        pending = [view for view in views if len(view)]
        with self._named():
            while pending:
                written = os.pwritev(self._fd, pending[:_MAX_VECTORS], offset)
                offset += written
                while pending and written >= len(pending[0]):
                    written -= len(pending.pop(0))
                if written:
                    pending[0] = pending[0][written:]

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn an error of the disk into a sentence that names the file."""
        try:
            yield
        except OSError as error:
            raise SaveFileError(f"the guest cannot be saved in {self._target}: {error.strerror}") from error


def sync_directory(directory: Path) -> None:
    """Make names of a directory survive a crash of the host.

    Raises:
        OSError: it cannot be done.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FileSink:
    """A file that one thread of the page sender writes to in place of a data channel (``link.data.FrameSink``).

    Barriers are left out: the file has one for each round, written when all threads are done with it.
    """

    max_payload_bytes = MAX_PAYLOAD_BYTES

    def __init__(self, writer: SaveWriter, number: int) -> None:
        self.number = number
        self._writer = writer
        self._ended = threading.Event()
        self._bytes_per_s = 0
        self._free_ns = 0
        """When the next frame may be written, under a cap (monotonic)."""

    def pace(self, bytes_per_s: int) -> None:
        """Cap the rate; 0 lifts the cap."""
        self._bytes_per_s = bytes_per_s

    def send(self, message: Message, payload: Sequence[memoryview] = (), round_number: int = 0) -> int:
        """Write one frame. Returns its size (bytes).

        Raises:
            SaveFileError: the disk is full or broken.
            LinkLostError: the save has ended.
        """
        if self._ended.is_set():
            raise LinkLostError("the save has ended")
        if isinstance(message, messages.Barrier):
            return 0
        size_bytes = self._writer.append(message, payload, round_number)
        if rate := self._bytes_per_s:
            now_ns = time.monotonic_ns()
            self._free_ns = max(self._free_ns, now_ns) + size_bytes * 1_000_000_000 // rate
            self._ended.wait((self._free_ns - now_ns) / 1e9)
        return size_bytes

    def room_bytes(self) -> int:
        """0: a disk may be busy whenever it is written to."""
        return 0

    def interrupt(self) -> None:
        """End the wait of a capped write, and refuse all further ones."""
        self._ended.set()

    def close(self) -> None:
        """Do nothing: the writer owns the file."""
