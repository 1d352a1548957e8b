"""The layout of a saved guest: frames as on a data channel, between a preamble and a closing part.

    preamble | HELLO | PAGES, ZERO_PAGES, DEVICE_STATE, BARRIER of each round | TIME_DATA, STATE_END, RECORD | closing

Frames are those of the wire (``protocol.frames``, ``protocol.messages``), in the order in which they must be applied:
header, meta, pages, device states and the digest of all memory are checked as those of a migration are. In place of a
batch of which every page came again in a later round stands a *gap* of the same size, which holds nothing but zeros.
The closing part is written last: a file without it was never completed.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.frames import HEADER_BYTES
from protocol.versions import MAJOR, OLDEST_MAJOR

MAGIC: Final = b"MGRDSAVE"
FORMAT: Final = 1
"""Of preamble, gaps and closing part; frames have the version of the protocol."""

_PREAMBLE: Final = struct.Struct("!8sHHI16s16s")
_CLOSING: Final = struct.Struct("!8s16sQQQ16sqq")
_GAP: Final = struct.Struct("!4sQQ12x")
_CRC_BYTES: Final = 4
PREAMBLE_BYTES: Final = _PREAMBLE.size + _CRC_BYTES
CLOSING_BYTES: Final = _CLOSING.size + _CRC_BYTES
_CLOSING_MAGIC: Final = b"MGRDDONE"
GAP_MAGIC: Final = b"MGRG"


@dataclass(frozen=True, slots=True)
class Preamble:
    """The first bytes of a file.

    Attributes:
        save_id: 16 random bytes that name this file and no other.
        version: major version of the protocol that its frames are of.
        architecture: of the host's processors, as the kernel names it.
    """

    save_id: bytes
    architecture: str
    version: int = MAJOR

    def pack(self) -> bytes:
        """The bytes of it."""
        name = self.architecture.encode("ascii", "replace")[:16]
        return _sealed(_PREAMBLE.pack(MAGIC, FORMAT, self.version, 0, self.save_id, name))

    @classmethod
    def unpack(cls, data: bytes) -> Preamble:
        """Decode and check a preamble.

        Raises:
            RemoteProtocolError: this is no saved guest, one of a version that cannot be read here, or a damaged one.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise RemoteProtocolError("it does not begin as a saved guest does")
        if len(data) >= len(MAGIC) + 4:
            written, version = struct.unpack_from("!HH", data, len(MAGIC))
            # The checksum covers the versions too: only a sound preamble may speak of another version.
            if len(data) == PREAMBLE_BYTES and _is_sound(data):
                if written != FORMAT:
                    raise RemoteProtocolError(
                        f"it has format {written} and this version of migrated reads format {FORMAT}: restore it with "
                        "the version that wrote it",
                        ErrorCode.VERSION,
                    )
                if not OLDEST_MAJOR <= version <= MAJOR:
                    raise RemoteProtocolError(
                        f"its frames are of protocol version {version} and this version of migrated reads "
                        f"{OLDEST_MAJOR} to {MAJOR}: restore it with the version that wrote it",
                        ErrorCode.VERSION,
                    )
                *_, save_id, name = _PREAMBLE.unpack_from(data)
                return cls(save_id, name.rstrip(b"\0").decode("ascii", "replace"), version)
        raise RemoteProtocolError("its preamble does not match its checksum", ErrorCode.CORRUPT)


@dataclass(frozen=True, slots=True)
class Closing:
    """The last bytes of a file, which say that everything before them is there.

    Attributes:
        save_id: of the preamble.
        frames_end: offset behind the last frame, where the closing part begins.
        frames: how many frames there are, gaps counted.
        record_hash: XXH3-64 of the RECORD's payload, which no frame covers.
        boot_id: of the kernel that ran then, to know whether its clocks still run.
        exported_after_ns, exported_before_ns: the boot-time clock just before and just after guest time was read.
    """

    save_id: bytes
    frames_end: int
    frames: int
    record_hash: int
    boot_id: bytes
    exported_after_ns: int
    exported_before_ns: int

    def pack(self) -> bytes:
        """The bytes of it."""
        return _sealed(
            _CLOSING.pack(
                _CLOSING_MAGIC,
                self.save_id,
                self.frames_end,
                self.frames,
                self.record_hash,
                self.boot_id,
                self.exported_after_ns,
                self.exported_before_ns,
            )
        )

    @classmethod
    def unpack(cls, data: bytes, file_bytes: int) -> Closing:
        """Decode and check the last CLOSING_BYTES of a file of ``file_bytes``.

        Raises:
            RemoteProtocolError: the file is cut short, has more behind its end, or is damaged there.
        """
        if len(data) != CLOSING_BYTES or data[: len(_CLOSING_MAGIC)] != _CLOSING_MAGIC or not _is_sound(data):
            raise RemoteProtocolError(
                "its closing part is damaged, or the file was cut short or added to", ErrorCode.CORRUPT
            )
        _, save_id, frames_end, *rest = _CLOSING.unpack_from(data)
        if frames_end + CLOSING_BYTES != file_bytes:
            raise RemoteProtocolError(
                f"it has {file_bytes} bytes and should have {frames_end + CLOSING_BYTES}", ErrorCode.CORRUPT
            )
        return cls(save_id, frames_end, *rest)


def pack_gap(sequence: int, size_bytes: int) -> bytes:
    """The HEADER_BYTES at the begin of a gap of ``size_bytes``, which counts as the frame ``sequence``."""
    return _sealed(_GAP.pack(GAP_MAGIC, sequence, size_bytes)[: HEADER_BYTES - _CRC_BYTES])


def unpack_gap(head: bytes) -> tuple[int, int]:
    """Decode the begin of a gap: (sequence, size in bytes).

    Raises:
        RemoteProtocolError: it is damaged.
    """
    if not _is_sound(head):
        raise RemoteProtocolError("the head of a gap does not match its checksum", ErrorCode.CORRUPT)
    _, sequence, size_bytes = _GAP.unpack(head[:-_CRC_BYTES])
    if size_bytes < HEADER_BYTES:
        raise RemoteProtocolError(f"a gap claims {size_bytes} bytes, which is less than its head")
    return sequence, size_bytes


def _sealed(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(_CRC_BYTES, "big")


def _is_sound(data: bytes) -> bool:
    return zlib.crc32(data[:-_CRC_BYTES]).to_bytes(_CRC_BYTES, "big") == data[-_CRC_BYTES:]
