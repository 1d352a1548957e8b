"""Device states as they arrive, in pieces and over several data channels: where each piece goes, and how much memory
all of them may take. What the peer claims is bounded by what our own VMM knows of the guest's devices.

    final state      each device's once, so all that wait fit into what the VMM allows for them
    state in rounds  loaded as it comes; while two of the largest wait to be loaded, the channel that brings more waits
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import xxhash

from migrated.vmm.seam import StateBounds
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.guest import DeviceKind
from protocol.messages import MAX_STATES

_WAITING_STATES: Final = 2
"""States of rounds, each as large as may be, that may wait to be loaded: one arrives while another is loaded."""
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
    """The device states of one incoming guest, until they are loaded, in the order of their numbers. May be called from
    any thread.

    Args:
        bounds: what our VMM says that they may take.
    """

    def __init__(self, bounds: StateBounds) -> None:
        self._bounds = bounds
        largest_bytes = max((size for (_, kind), size in bounds.states.items() if kind == "iterable"), default=0)
        self._round_limit_bytes = _WAITING_STATES * largest_bytes
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._arriving: dict[int, ArrivedState] = {}
        self._orders: set[int] = set()
        self._final: set[tuple[str, DeviceKind]] = set()
        self._final_bytes = 0
        """Of final states that wait to be loaded."""
        self._round_bytes = 0
        """The same of states of rounds."""
        self._loaded = 0
        self._ended = False

    def place(self, meta: messages.DeviceState, piece_bytes: int) -> tuple[ArrivedState, memoryview]:
        """Return the state that a piece belongs to, and the buffer that its bytes are to be read into. Where a state of
        a round begins and too many of those wait, this waits until one is loaded; a final state never waits.

        Raises:
            RemoteProtocolError: the guest has no such device, the state is larger or comes more often than it may, the
                piece does not fit the others, or the migration is ending.
        """
        with self._lock:
            while (state := self._arriving.get(meta.order)) is None:
                self._check_new(meta)
                if meta.final or self._has_room(meta):
                    state = self._begin(meta)
                    break
                self._changed.wait()
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

    def _check_new(self, meta: messages.DeviceState) -> None:
        """Check that a state may come.

        Raises:
            RemoteProtocolError: it may not.
        """
        if self._ended:
            raise RemoteProtocolError("device state comes for a migration that is ending", ErrorCode.UNEXPECTED)
        device = (meta.name, meta.kind)
        limit_bytes = self._bounds.states.get(device)
        if limit_bytes is None:
            raise RemoteProtocolError(f"state of device {meta.name} ({meta.kind}), which the guest lacks")
        if not meta.final and meta.kind != "iterable":
            raise RemoteProtocolError(
                f"state of device {meta.name} ({meta.kind}) comes in a round, which only iterable devices have",
                ErrorCode.UNEXPECTED,
            )
        if meta.total_bytes > limit_bytes:
            raise RemoteProtocolError(
                f"state of device {meta.name} has {meta.total_bytes} bytes, our VMM takes at most {limit_bytes}",
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
        final_bytes = self._final_bytes + meta.total_bytes
        if meta.final and final_bytes > self._bounds.final_bytes:
            raise RemoteProtocolError(
                f"final states of {final_bytes} bytes wait to be loaded, our VMM takes at most "
                f"{self._bounds.final_bytes}",
                ErrorCode.TOO_LARGE,
            )

    def _has_room(self, meta: messages.DeviceState) -> bool:
        """Whether a state of a round may begin. The one that is to be loaded next always may, since nothing is loaded
        before it. A source sends the pieces of states in their order on every channel, so what waits here is in the way
        of no piece of an earlier state."""
        return meta.order == self._loaded or self._round_bytes + meta.total_bytes <= self._round_limit_bytes

    def _begin(self, meta: messages.DeviceState) -> ArrivedState:
        state = ArrivedState(meta, np.zeros(meta.total_bytes, np.uint8).data, meta.total_bytes)
        self._arriving[meta.order] = state
        self._orders.add(meta.order)
        if meta.final:
            self._final.add((meta.name, meta.kind))
            self._final_bytes += meta.total_bytes
        else:
            self._round_bytes += meta.total_bytes
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
        """The next state in order is in the guest, and its memory is free."""
        with self._lock:
            self._loaded += 1
            if state.meta.final:
                self._final_bytes -= state.meta.total_bytes
            else:
                self._round_bytes -= state.meta.total_bytes
            self._changed.notify_all()

    def end(self) -> None:
        """Let go of what never became whole; nothing more is taken, and nobody waits any more."""
        with self._lock:
            self._ended = True
            self._arriving.clear()
            self._changed.notify_all()
