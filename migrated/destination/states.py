"""Device states as they arrive, in pieces and over several data channels: where each piece goes, and how much memory
all of them may take. What the peer claims is bounded by what our own VMM said of the guest's devices."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import xxhash

from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest import DeviceDescription, DeviceKind
from protocol.messages import MAX_STATES

_SPARE_STATE_BYTES: Final = 16 << 20
"""Size that one state may have beyond twice its usual size."""
_SPARE_BYTES: Final = 64 << 20
"""Size that all waiting states together may have beyond twice their usual size: those of rounds come faster than some
VMMs load them."""
_LEAST_PIECE_BYTES: Final = 4096
_SPARE_PIECES: Final = 16


@dataclass(slots=True)
class ArrivedState:
    """One device state. It is whole when ``missing_bytes`` is 0.

    Attributes:
        data: its content. Memory is used as content comes, not as it is promised.
    """

    meta: messages.DeviceState
    data: memoryview
    missing_bytes: int
    offsets: set[int] = field(default_factory=set)


class ArrivingStates:
    """The device states of one incoming guest, until they are loaded. May be called from any thread.

    Args:
        devices: what our VMM says that the guest has.
    """

    def __init__(self, devices: Iterable[DeviceDescription]) -> None:
        self._limits = {(d.name, d.kind): 2 * d.state_bytes + _SPARE_STATE_BYTES for d in devices}
        self._limit_bytes = sum(self._limits.values(), _SPARE_BYTES - len(self._limits) * _SPARE_STATE_BYTES)
        self._lock = threading.Lock()
        self._arriving: dict[int, ArrivedState] = {}
        self._orders: set[int] = set()
        self._final: set[tuple[str, DeviceKind]] = set()
        self._held_bytes = 0
        self._ended = False

    def place(self, meta: messages.DeviceState, piece_bytes: int) -> tuple[ArrivedState, memoryview]:
        """Return the state that a piece belongs to, and the buffer that its bytes are to be read into.

        Raises:
            RemoteProtocolError: the guest has no such device, the state is larger or comes more often than it may, all
                that wait are too large, or the piece does not fit the others.
        """
        with self._lock:
            state = self._arriving.get(meta.order)
            if state is None:
                state = self._begin(meta)
            same = meta.model_copy(update={"offset": state.meta.offset}) == state.meta
            if not same or meta.offset in state.offsets or meta.offset + piece_bytes > meta.total_bytes:
                raise RemoteProtocolError(f"a piece of the state of device {meta.name} does not fit the others")
            if len(state.offsets) >= _SPARE_PIECES + meta.total_bytes // _LEAST_PIECE_BYTES:
                raise RemoteProtocolError(
                    f"the state of device {meta.name} comes in more than {len(state.offsets)} pieces",
                    ErrorCode.TOO_LARGE,
                )
            state.offsets.add(meta.offset)
            return state, state.data[meta.offset : meta.offset + piece_bytes]

    def _begin(self, meta: messages.DeviceState) -> ArrivedState:
        device = (meta.name, meta.kind)
        limit_bytes = self._limits.get(device)
        if limit_bytes is None:
            raise RemoteProtocolError(f"state of device {meta.name} ({meta.kind}), which the guest lacks")
        if meta.total_bytes > limit_bytes:
            raise RemoteProtocolError(
                f"state of device {meta.name} has {meta.total_bytes} bytes, at most {limit_bytes} were announced",
                ErrorCode.TOO_LARGE,
            )
        if meta.order >= MAX_STATES or meta.order in self._orders:
            raise RemoteProtocolError(
                f"state {meta.order} (device {meta.name}) comes twice, or is beyond the {MAX_STATES} that there may be",
                ErrorCode.UNEXPECTED,
            )
        if meta.final and device in self._final:
            raise RemoteProtocolError(
                f"the final state of device {meta.name} ({meta.kind}) comes twice", ErrorCode.UNEXPECTED
            )
        if self._held_bytes + meta.total_bytes > self._limit_bytes:
            raise RemoteProtocolError(
                f"device states of {self._held_bytes + meta.total_bytes} bytes wait to be loaded, at most "
                f"{self._limit_bytes} may",
                ErrorCode.TOO_LARGE,
            )
        if self._ended:
            raise RemoteProtocolError("device state comes for a migration that is ending", ErrorCode.UNEXPECTED)
        state = ArrivedState(meta, np.zeros(meta.total_bytes, np.uint8).data, meta.total_bytes)
        self._arriving[meta.order] = state
        self._orders.add(meta.order)
        if meta.final:
            self._final.add(device)
        self._held_bytes += meta.total_bytes
        return state

    def piece_done(self, state: ArrivedState, piece_bytes: int) -> bool:
        """A piece is in place. Returns whether the state is whole.

        Raises:
            RemoteProtocolError: it is, and is not what was sent.
        """
        with self._lock:
            state.missing_bytes -= piece_bytes
            if state.missing_bytes != 0 or self._arriving.pop(state.meta.order, None) is None:
                return False
        if xxhash.xxh3_64_intdigest(state.data) != state.meta.digest:
            raise RemoteProtocolError(
                f"the state of device {state.meta.name} arrived damaged: its digest differs", ErrorCode.CORRUPT
            )
        return True

    def loaded(self, state: ArrivedState) -> None:
        """A state is in the guest, and its memory is free."""
        with self._lock:
            self._held_bytes -= state.meta.total_bytes

    def end(self) -> None:
        """Let go of what never became whole; nothing more is taken."""
        with self._lock:
            self._ended = True
            self._arriving.clear()
