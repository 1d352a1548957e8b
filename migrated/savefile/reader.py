"""Reading a saved guest: what it says of itself, then its frames for the receiver of pages.

Every error names the part of the file and the byte where it begins. A saved guest is no peer that can be told what it
did wrong, but its bytes are trusted as little.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from migrated.base.errors import LinkLostError, RefusedError
from migrated.savefile.errors import SaveFileError
from protocol import messages
from protocol.errors import RemoteProtocolError
from protocol.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, Header, SequenceCheck, check_meta, unpack_header
from protocol.messages import Message
from protocol.savefile import CLOSING_BYTES, GAP_MAGIC, PREAMBLE_BYTES, Closing, Preamble, unpack_gap

_MAX_VECTORS: Final = 1024
_READ_BYTES: Final = 1 << 20
_LET_GO_BYTES: Final = 32 << 20
"""What was read is taken out of the page cache so much at a time."""
_BEHIND_BYTES: Final = 64 << 20
"""What was dealt out so far back has been read."""
_OF_CHANNELS: Final = (messages.Pages, messages.ZeroPages, messages.Barrier, messages.DeviceState)


class FileEndedError(LinkLostError):
    """Every frame of the file was read."""


class SavedFile:
    """A saved guest that was opened, with its preamble, its description and its closing part, all checked.

    Args:
        path: of the file.

    Raises:
        RefusedError: it is no file that can be restored here; the sentence says why.
        SaveFileError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_absolute():
            raise RefusedError(f"the file {str(path)!r} must be given with its whole path, beginning with /")
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise RefusedError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise RefusedError(f"{self.path} is no regular file, so no guest was saved in it")
        self.size_bytes = found.st_size
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        try:
            self.preamble = Preamble.unpack(os.pread(self._fd, PREAMBLE_BYTES, 0))
        except RemoteProtocolError as error:
            raise RefusedError(f"{self.path} cannot be restored: {error} (byte 0)") from error
        begin = max(PREAMBLE_BYTES, self.size_bytes - CLOSING_BYTES)
        try:
            self.closing = Closing.unpack(os.pread(self._fd, CLOSING_BYTES, begin), self.size_bytes)
            if self.closing.save_id != self.preamble.save_id:
                raise RemoteProtocolError("its closing part belongs to another file")
        except RemoteProtocolError as error:
            raise self.damaged("the closing part", begin, error) from error
        head = bytearray(HEADER_BYTES)
        try:
            self.read([memoryview(head)], PREAMBLE_BYTES)
            header = unpack_header(head, self.preamble.version, 0)
            meta = bytearray(header.meta_bytes)
            self.read([memoryview(meta)], PREAMBLE_BYTES + HEADER_BYTES)
            check_meta(meta, header)
            hello = messages.decode(header.type, meta)
            if header.sequence or not isinstance(hello, messages.Hello):
                raise RemoteProtocolError("the first frame does not describe the guest")
        except (RemoteProtocolError, SaveFileError) as error:
            raise self.damaged("the description of the guest", PREAMBLE_BYTES, error) from error
        self.hello = hello
        self.frames_begin = PREAMBLE_BYTES + HEADER_BYTES + header.meta_bytes

    def damaged(self, part: str, offset: int, error: Exception) -> SaveFileError:
        """Return the error that names a damage."""
        return SaveFileError(f"{self.path} is damaged in {part}, which begins at byte {offset}: {error}")

    def read(self, views: list[memoryview], offset: int) -> None:
        """Fill byte views from a place on.

        Raises:
            SaveFileError: the file ends before, or cannot be read.
        """
        pending = [view for view in views if len(view)]
        while pending:
            try:
                got = os.preadv(self._fd, pending[:_MAX_VECTORS], offset)
            except OSError as error:
                raise SaveFileError(f"{self.path} cannot be read at byte {offset}: {error.strerror}") from error
            if not got:
                raise SaveFileError(f"{self.path} ends at byte {offset}, in the middle of what is stored there")
            offset += got
            while pending and got >= len(pending[0]):
                got -= len(pending.pop(0))
            if got:
                pending[0] = pending[0][got:]

    def let_go(self, begin: int, end: int) -> None:
        """Take a part that was read out of the page cache: it is the guest's memory now, and would be there twice."""
        os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileEnd:
    """The content of a file beside pages and device states: guest time, what must be complete at the end, the
    record."""

    def __init__(self) -> None:
        self.time: messages.TimeData | None = None
        self.state_end: messages.StateEnd | None = None
        self.record = b""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame that was dealt out: its head, and where its payload lies. ``message`` is None for a gap."""

    part: str
    begin: int
    header: Header
    message: Message | None
    payload_begin: int


class FileFrames:
    """Deals the frames of a file out to several readers, each of which is to the receiver of pages what a data channel
    is. One frame after the other is taken from the file, and whoever took it reads its payload while others go on.

    Frames of one round may be applied in any order, as those of several data channels are. No frame of the next round
    is dealt out before every reader is done with this one: each comes for the barrier then.

    Args:
        file: opened; whoever opened it closes it.
        hash_of: makes the XXH3-64 of the record.
        readers: how many, each for a thread of its own.

    Attributes:
        end: filled as the file is read.
        readers: in the order of their numbers.
    """

    def __init__(self, file: SavedFile, hash_of: Callable[[bytes], int], readers: int) -> None:
        self.end = FileEnd()
        self.file = file
        self.readers = tuple(FileReader(self, number) for number in range(readers))
        self._hash_of = hash_of
        self._offset = file.frames_begin
        self._let_go = 0
        self._begin, self._part = file.frames_begin, "the first round"
        self._sequence = SequenceCheck(1)
        self._turn = threading.Condition()
        self._barrier: _Frame | None = None
        self._passed: set[int] = set()
        """The readers that have the barrier already and wait for the others."""
        self._damage: str | None = None
        self._interrupted = False

    @property
    def received_bytes(self) -> int:
        """Bytes of all frames that were read so far."""
        return sum(reader.received_bytes for reader in self.readers)

    def deal(self, number: int) -> _Frame:
        """The next frame for a reader, who is done with the one before.

        Raises:
            FileEndedError: there is none.
            SaveFileError: it is damaged, or one that another reader was given was.
            LinkLostError: the restore has ended.
        """
        with self._turn:
            while self._barrier is not None and number in self._passed and not self._interrupted:
                self._turn.wait()
            if self._interrupted:
                raise LinkLostError("the restore has ended")
            if self._damage is not None:
                raise SaveFileError(self._damage)
            if self._barrier is None:
                frame = self._next()
                if not isinstance(frame.message, messages.Barrier):
                    return frame
                self._barrier = frame
            frame = self._barrier
            self._passed.add(number)
            if len(self._passed) == len(self.readers):
                self._barrier = None
                self._passed.clear()
                self._turn.notify_all()
            return frame

    def interrupt(self) -> None:
        """Let no reader have another frame."""
        with self._turn:
            self._interrupted = True
            self._turn.notify_all()

    def _next(self) -> _Frame:
        try:
            while (frame := self._take_frame()) is None:
                pass
        except (RemoteProtocolError, SaveFileError) as error:
            damaged = self.file.damaged(self._part, self._begin, error)
            self._damage = str(damaged)
            raise damaged from error
        return frame

    def _take_frame(self) -> _Frame | None:
        """Take the next frame, all but its payload. None for one that is no reader's, which is kept in ``end``."""
        begin = self._begin = self._offset
        self._part = f"frame {self._sequence.expected}"
        closing = self.file.closing
        if begin == closing.frames_end:
            if self._sequence.expected != closing.frames:
                raise RemoteProtocolError(f"there are not {closing.frames} frames before the closing part")
            raise FileEndedError("the file was read to its end")
        head = self._take(HEADER_BYTES)
        if head[: len(GAP_MAGIC)] == GAP_MAGIC:
            sequence, size_bytes = unpack_gap(head)
            self._part = "a gap"
            header = Header(0, 0, size_bytes - HEADER_BYTES, sequence, 0, 0)
            message = None
        else:
            header = unpack_header(head, self.file.preamble.version, MAX_PAYLOAD_BYTES)
            meta = self._take(header.meta_bytes)
            check_meta(meta, header)
            message = messages.decode(header.type, meta)
            self._part = _name_of(message)
        self._sequence.accept(header.sequence)
        payload_begin = self._offset
        if payload_begin + header.payload_bytes > closing.frames_end:
            raise RemoteProtocolError("a frame reaches beyond the last one")
        if message is None or isinstance(message, _OF_CHANNELS):
            self._offset += header.payload_bytes
            if (end := self._offset - _BEHIND_BYTES) - self._let_go >= _LET_GO_BYTES:
                self.file.let_go(self._let_go, end)
                self._let_go = end
            return _Frame(self._part, begin, header, message, payload_begin)
        self._keep(message, self._take(header.payload_bytes))
        return None

    def _take(self, size_bytes: int) -> bytes:
        if self._offset + size_bytes > self.file.closing.frames_end:
            raise RemoteProtocolError("a frame reaches beyond the last one")
        taken = bytearray(size_bytes)
        self.file.read([memoryview(taken)], self._offset)
        self._offset += size_bytes
        return bytes(taken)

    def _keep(self, message: Message, payload: bytes) -> None:
        match message:
            case messages.TimeData() if not payload:
                self.end.time = message
            case messages.StateEnd() if not payload:
                self.end.state_end = message
            case messages.Record():
                if self._hash_of(payload) != self.file.closing.record_hash:
                    raise RemoteProtocolError("its content does not match its digest")
                self.end.record = payload
            case _:
                raise RemoteProtocolError(f"message {message.TYPE.name} does not belong into a saved guest")


class FileReader:
    """The frames that one thread of the receiver of pages is dealt, in place of a data channel
    (``link.data.FrameSource``).

    Args:
        frames: deals the frames out.
        number: of this reader.
    """

    def __init__(self, frames: FileFrames, number: int) -> None:
        self.number = number
        self.received_bytes = 0
        self._frames = frames
        self._frame: _Frame | None = None
        self._offset = 0

    def where(self, error: Exception) -> Exception:
        """Return the error to raise for one that was met in this reader's frame: where the frame's content caused it,
        one that names the place in the file."""
        if isinstance(error, RemoteProtocolError) and (frame := self._frame) is not None:
            return self._frames.file.damaged(frame.part, frame.begin, error)
        return error

    def read_header(self) -> tuple[Header, Message]:
        """Read the next frame up to its payload.

        Raises:
            FileEndedError: there is none.
            SaveFileError, RemoteProtocolError: it is damaged.
            LinkLostError: the restore has ended.
        """
        while True:
            frame = self._frame = self._frames.deal(self.number)
            self._offset = frame.payload_begin
            self.received_bytes += frame.payload_begin - frame.begin
            if frame.message is not None:
                return frame.header, frame.message
            self._check_gap(frame.header.payload_bytes)

    def read_into(self, views: list[memoryview]) -> None:
        """Fill byte views with the payload, in order.

        Raises:
            SaveFileError: the file cannot be read.
        """
        size_bytes = sum(len(view) for view in views)
        self._frames.file.read(views, self._offset)
        self._offset += size_bytes
        self.received_bytes += size_bytes

    def interrupt(self) -> None:
        """Let no reader of this file have another frame."""
        self._frames.interrupt()

    def close(self) -> None:
        """Do nothing: the file belongs to whoever opened it."""

    def _check_gap(self, size_bytes: int) -> None:
        """Read a gap. It must be empty: what is not looked at could hide that the file was changed."""
        piece = np.empty(_READ_BYTES, np.uint8)
        left = size_bytes
        while left:
            some = piece[: min(left, _READ_BYTES)]
            self.read_into([some.data])
            if some.any():
                raise RemoteProtocolError("it is not empty")
            left -= len(some)


def _name_of(message: Message) -> str:
    match message:
        case messages.Pages():
            return "a batch of pages"
        case messages.ZeroPages():
            return "a table of zero pages"
        case messages.DeviceState(name=name):
            return f"the state of device {name}"
        case messages.TimeData():
            return "the guest's time"
        case messages.Record():
            return "the record"
        case _:
            return f"message {message.TYPE.name}"
