"""Devices whose state travels: seeded bytes of a configured size, the platform's timers, and the vCPU.

Every piece of state goes in an envelope that says whose it is and which piece, with a checksum over all of it, so
that a damaged, lost or foreign piece is a named error where it is loaded:

    magic 4 | flags 2 | 0 2 | device 8 (hash of name and kind) | sequence 4 | 0 4 | length 8 | xxh3 8 | body
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgpack
import xxhash

from vmm_sim.config import DeviceConfig
from vmm_sim.content import PAGE_SIZE, fill_bytes
from vmm_sim.errors import VmmError
from vmm_sim.platform import PlatformDevice, State

_HEADER: Final = struct.Struct("<4sHHQIIQQ")
_MAGIC: Final = b"VSDS"
_FINAL: Final = 1
_CHUNK_BYTES: Final = 4 << 20
ENVELOPE_BYTES: Final = _HEADER.size
_NUMBER_BYTES: Final = 9
"""A number takes 1 to 9 bytes in a state, by its size."""
_LISTS_BYTES: Final = 16 << 10
"""More than the timers and gaps of a guest that has run take; one that has not has none."""


class Body(Protocol):
    """The source of a device's saved state and the place of its loaded state."""

    def expected_bytes(self) -> int:
        """Usual size of the final state (bytes)."""
        ...

    def largest_bytes(self) -> int:
        """Size that no piece exceeds (bytes)."""
        ...

    def save(self, pieces: int, final: bool, interrupt: threading.Event) -> bytearray:
        """The next piece, behind room for an envelope; ``pieces`` were saved before in this attempt."""
        ...

    def load(self, body: memoryview, final: bool) -> None:
        """Take over one piece."""
        ...


class SyntheticBody:
    """Seeded content. An iterable device has less left from round to round, as in VFIO pre-copy."""

    def __init__(self, config: DeviceConfig, seed: int) -> None:
        self._config = config
        self._key = xxhash.xxh3_64_intdigest(f"{config.name}/{config.kind}".encode(), seed)

    def expected_bytes(self) -> int:
        return max(self._config.state, self._config.shrink_to)

    def largest_bytes(self) -> int:
        return max(self._config.state, self._config.initial_state)

    def size_of(self, pieces: int, final: bool) -> int:
        """Bytes of the piece after ``pieces`` others."""
        config = self._config
        left = config.shrink_to + ((config.initial_state - config.shrink_to) >> min(pieces, 63))
        return max(config.state, left) if final else left

    def save(self, pieces: int, final: bool, interrupt: threading.Event) -> bytearray:
        size = self.size_of(pieces, final)
        padded = -(-size // 8) * 8
        piece = bytearray(ENVELOPE_BYTES + padded)
        with memoryview(piece) as view:
            for start in range(0, padded, _CHUNK_BYTES):
                if interrupt.is_set():
                    raise VmmError("Interrupted", f"Saving device {self._config.name} was interrupted.")
                chunk = view[ENVELOPE_BYTES + start : ENVELOPE_BYTES + min(start + _CHUNK_BYTES, padded)]
                fill_bytes(self._key + pieces, chunk, start // PAGE_SIZE)
                chunk.release()
        del piece[ENVELOPE_BYTES + size :]
        return piece

    def load(self, body: memoryview, final: bool) -> None:
        """The envelope's checksum has vouched for the content; there is nothing else to it."""


class StateBody:
    """A small map of numbers: the platform's devices and the vCPU."""

    def __init__(self, save: Callable[[], State], load: Callable[[State], None], name: str) -> None:
        self._save, self._load, self._name = save, load, name

    @classmethod
    def of(cls, device: PlatformDevice) -> StateBody:
        """The body of a platform device."""
        return cls(device.save, device.load, device.name)

    def expected_bytes(self) -> int:
        # Rounded up: the encoding of the same state grows with its numbers.
        return -(-len(msgpack.packb(self._save())) // 512) * 512

    def largest_bytes(self) -> int:
        return _NUMBER_BYTES * self.expected_bytes() + _LISTS_BYTES

    def save(self, pieces: int, final: bool, interrupt: threading.Event) -> bytearray:
        packed: bytes = msgpack.packb(self._save())
        return bytearray(ENVELOPE_BYTES) + packed

    def load(self, body: memoryview, final: bool) -> None:
        try:
            state = msgpack.unpackb(body, strict_map_key=True)
        except (ValueError, TypeError, msgpack.exceptions.StackError) as error:
            raise VmmError("DeviceStateInvalid", f"The state of device {self._name} does not decode.") from error
        if not isinstance(state, dict):
            raise VmmError("DeviceStateInvalid", f"The state of device {self._name} is not a map.")
        self._load(state)


class Device:
    """One device: its costs, its body, and how far its state has been saved or loaded in this attempt."""

    def __init__(self, config: DeviceConfig, body: Body) -> None:
        self.config = config
        self.body = body
        self.loaded = False
        self._pieces = 0
        self._loaded_pieces = 0
        self._identity = xxhash.xxh3_64_intdigest(f"{config.name}/{config.kind}".encode())

    @property
    def key(self) -> tuple[str, str]:
        """Name and kind."""
        return self.config.name, self.config.kind

    def begin_attempt(self) -> None:
        """Forget the pieces saved so far: a new migration attempt starts from nothing."""
        self._pieces = 0

    def save(self, round_number: int | None, interrupt: threading.Event) -> bytearray:
        """The piece of a pre-copy round, or the final one (``None``). Round 0 starts a new attempt.

        Raises VmmError RoundOutOfOrder, Interrupted.
        """
        if round_number == 0:
            self.begin_attempt()
        if round_number is not None and round_number != self._pieces:
            raise VmmError(
                "RoundOutOfOrder",
                f"Device {self.config.name} was asked for round {round_number} but has saved {self._pieces} rounds:"
                " ask for every round, starting with 0.",
            )
        final = round_number is None
        piece = self.body.save(self._pieces, final, interrupt)
        body_bytes = len(piece) - ENVELOPE_BYTES
        flags = _FINAL if final else 0
        fields = (_MAGIC, flags, 0, self._identity, self._pieces, 0, body_bytes)
        _HEADER.pack_into(piece, 0, *fields, 0)
        _HEADER.pack_into(piece, 0, *fields, xxhash.xxh3_64_intdigest(piece))
        if not final:
            self._pieces += 1
        return piece

    def check(self, piece: memoryview, final: bool) -> memoryview:
        """The body of a piece that is whole, ours and the next in order. Raises VmmError DeviceStateCorrupt,
        DeviceStateMissing."""
        name = self.config.name
        if len(piece) < ENVELOPE_BYTES:
            raise VmmError("DeviceStateCorrupt", f"The state of device {name} is only {len(piece)} bytes.")
        magic, flags, _, identity, sequence, _, body_bytes, checksum = _HEADER.unpack_from(piece)
        body = piece[ENVELOPE_BYTES:]
        digest = xxhash.xxh3_64(bytes(piece[: ENVELOPE_BYTES - 8]) + bytes(8))
        digest.update(body)
        if magic != _MAGIC or body_bytes != len(body) or digest.intdigest() != checksum:
            raise VmmError("DeviceStateCorrupt", f"The state of device {name} does not match its checksum.")
        if identity != self._identity or bool(flags & _FINAL) != final:
            raise VmmError(
                "DeviceStateCorrupt",
                f"The state that was given for device {name} ({self.config.kind}, {'final' if final else 'not final'})"
                " is that of another device or stage.",
            )
        if sequence == 0 and not final:
            self._loaded_pieces = 0
        if sequence != self._loaded_pieces:
            raise VmmError(
                "DeviceStateMissing",
                f"Device {name} got state piece {sequence} after {self._loaded_pieces} pieces: load all, in order.",
            )
        return body

    def load(self, body: memoryview, final: bool) -> None:
        """Take over the body of a checked piece. Raises VmmError DeviceStateInvalid."""
        self.body.load(body, final)
        if final:
            self.loaded = True
        else:
            self._loaded_pieces += 1

    @property
    def largest_bytes(self) -> int:
        """Size that none of its pieces exceeds, in a round or at last (bytes)."""
        return self.body.largest_bytes() + ENVELOPE_BYTES

    def describe(self) -> dict[str, Any]:
        """The device's entry in the guest's description."""
        return {
            "name": self.config.name,
            "kind": self.config.kind,
            "state_bytes": self.body.expected_bytes() + ENVELOPE_BYTES,
            "expected_save_ns": self.config.save_us * 1000,
            "expected_load_ns": self.config.load_us * 1000,
        }
