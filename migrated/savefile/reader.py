"""Reading a saved guest: what it says of itself, then its frames for the receiver of pages.

Every error names the part of the file and the byte where it begins. A saved guest is no peer that can be told what it
did wrong, but its bytes are trusted as little.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
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


class FileFrames:
    """The frames of a file, which the receiver of pages reads in place of a data channel (``link.data.FrameSource``).
    One thread uses it.

    Args:
        file: opened; whoever opened it closes it.
        hash_of: makes the XXH3-64 of the record.

    Attributes:
        end: filled as the file is read.
    """

    number = 0

    def __init__(self, file: SavedFile, hash_of: Callable[[bytes], int]) -> None:
        self.received_bytes = 0
        self.end = FileEnd()
        self._file = file
        self._hash_of = hash_of
        self._offset = file.frames_begin
        self._begin, self._part = file.frames_begin, "the first round"
        self._sequence = SequenceCheck(1)
        self._ended = threading.Event()

    def where(self, error: Exception) -> Exception:
        """The error with its place in the file, for one that the file is to blame for."""
        if isinstance(error, RemoteProtocolError | SaveFileError):
            return self._file.damaged(self._part, self._begin, error)
        return error

    def read_header(self) -> tuple[Header, Message]:
        """Read the next frame up to its payload; what is no channel's is kept in ``end``.

        Raises:
            FileEndedError: there is none.
            SaveFileError, RemoteProtocolError: it is damaged.
            LinkLostError: the restore has ended.
        """
        while True:
            if self._ended.is_set():
                raise LinkLostError("the restore has ended")
            self._begin, self._part = self._offset, f"frame {self._sequence.expected}"
            closing = self._file.closing
            if self._offset == closing.frames_end:
                if self._sequence.expected != closing.frames:
                    raise RemoteProtocolError(f"there are not {closing.frames} frames before the closing part")
                raise FileEndedError("the file was read to its end")
            head = bytearray(HEADER_BYTES)
            self._take([memoryview(head)])
            if head[: len(GAP_MAGIC)] == GAP_MAGIC:
                self._skip_gap(bytes(head))
                continue
            header = unpack_header(head, self._file.preamble.version, MAX_PAYLOAD_BYTES)
            meta = bytearray(header.meta_bytes)
            self._take([memoryview(meta)])
            check_meta(meta, header)
            self._sequence.accept(header.sequence)
            if self._offset + header.payload_bytes > closing.frames_end:
                raise RemoteProtocolError("a frame reaches beyond the last one")
            message = messages.decode(header.type, meta)
            self._part = _name_of(message)
            if isinstance(message, _OF_CHANNELS):
                return header, message
            payload = bytearray(header.payload_bytes)
            self._take([memoryview(payload)])
            self._keep(message, bytes(payload))

    def read_into(self, views: list[memoryview]) -> None:
        """Fill byte views with the payload, in order.

        Raises:
            SaveFileError: the file cannot be read.
        """
        self._take(views)

    def interrupt(self) -> None:
        """Let the next frame be the last."""
        self._ended.set()

    def close(self) -> None:
        """Do nothing: the file belongs to whoever opened it."""

    def _take(self, views: list[memoryview]) -> None:
        size_bytes = sum(len(view) for view in views)
        if self._offset + size_bytes > self._file.closing.frames_end:
            raise RemoteProtocolError("a frame reaches beyond the last one")
        self._file.read(views, self._offset)
        self._offset += size_bytes
        self.received_bytes += size_bytes

    def _skip_gap(self, head: bytes) -> None:
        """Pass over a gap. It must be empty: what is not looked at could hide that the file was changed."""
        self._part = "a gap"
        sequence, size_bytes = unpack_gap(head)
        self._sequence.accept(sequence)
        piece = np.empty(_READ_BYTES, np.uint8)
        left = size_bytes - HEADER_BYTES
        while left:
            some = piece[: min(left, _READ_BYTES)]
            self._take([some.data])
            if some.any():
                raise RemoteProtocolError("it is not empty")
            left -= len(some)

    def _keep(self, message: Message, payload: bytes) -> None:
        match message:
            case messages.TimeData() if not payload:
                self.end.time = message
            case messages.StateEnd() if not payload:
                self.end.state_end = message
            case messages.Record():
                if self._hash_of(payload) != self._file.closing.record_hash:
                    raise RemoteProtocolError("its content does not match its digest")
                self.end.record = payload
            case _:
                raise RemoteProtocolError(f"message {message.TYPE.name} does not belong into a saved guest")


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
