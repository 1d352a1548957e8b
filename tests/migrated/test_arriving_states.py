"""What a peer says of device states decides neither how much memory they take nor how many there are.

DEVICE_STATE -> place -> piece_done -> (loaded) -> memory is free again
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import xxhash

from migrated.destination.states import ArrivedState, ArrivingStates
from migrated.vmm.seam import StateBounds
from protocol import messages
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.messages import MAX_STATES

MIB = 1 << 20
WAIT_S = 10.0
BOUNDS = StateBounds(
    {**{(f"d{n}", "non-iterable"): 16 * MIB for n in range(64)}, ("ram", "iterable"): 16 * MIB}, 192 * MIB
)
"""Every device may have a large state, but not all of them at once."""


def piece(order: int = 0, **changes: Any) -> messages.DeviceState:
    values = {
        "order": order, "name": "ram", "kind": "iterable", "final": False, "offset": 0, "total_bytes": 8,
        "digest": xxhash.xxh3_64_intdigest(bytes(8)), "save_ns": 0,
    }  # fmt: skip
    return messages.DeviceState(**{**values, **changes})


def final(order: int, **changes: Any) -> messages.DeviceState:
    return piece(order, **{"name": f"d{order}", "kind": "non-iterable", "final": True, **changes})


def arrive(states: ArrivingStates, meta: messages.DeviceState) -> ArrivedState:
    """A state whole in one piece of zeros."""
    state, view = states.place(meta, meta.total_bytes)
    view[:] = bytes(meta.total_bytes)
    assert states.piece_done(state, meta.total_bytes)
    return state


def test_a_state_is_whole_when_all_its_pieces_are_there() -> None:
    states = ArrivingStates(BOUNDS)
    digest = xxhash.xxh3_64_intdigest(b"abcdefgh")
    first, view = states.place(piece(digest=digest), 3)
    view[:] = b"abc"
    assert not states.piece_done(first, 3)
    second, view = states.place(piece(digest=digest, offset=3), 5)
    view[:] = b"defgh"
    assert second is first
    assert states.piece_done(second, 5)
    assert bytes(first.data) == b"abcdefgh"


def test_a_promise_takes_no_memory() -> None:
    states = ArrivingStates(BOUNDS)
    before_kib = _resident_kib()
    for order in range(12):
        states.place(final(order, total_bytes=16 * MIB), 1)
    assert _resident_kib() - before_kib < 8 << 10, "192 MiB were promised"


def _resident_kib() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def test_final_states_are_bounded_together_and_become_free_by_loading() -> None:
    states = ArrivingStates(BOUNDS)
    waiting = [states.place(final(order, total_bytes=16 * MIB), 1)[0] for order in range(12)]
    with pytest.raises(RemoteProtocolError, match="wait to be loaded") as refused:
        states.place(final(12), 1)
    assert refused.value.code is ErrorCode.TOO_LARGE
    states.loaded(waiting[0])
    states.place(final(12), 1)


class Bringing(threading.Thread):
    """A channel that brings the first piece of a state. ``outcome`` is what became of it."""

    def __init__(self, states: ArrivingStates, meta: messages.DeviceState) -> None:
        super().__init__(daemon=True)
        self.outcome: ArrivedState | RemoteProtocolError | None = None
        self._states, self._meta = states, meta
        self.start()

    def run(self) -> None:
        try:
            self.outcome, _ = self._states.place(self._meta, 1)
        except RemoteProtocolError as error:
            self.outcome = error


def test_a_channel_waits_while_states_of_rounds_wait_to_be_loaded() -> None:
    """0, 1 wait to be loaded | 2 begins, as large | 0 is loaded | 2 is taken"""
    states = ArrivingStates(BOUNDS)
    waiting = [states.place(piece(order, total_bytes=16 * MIB), 1)[0] for order in range(2)]
    bringing = Bringing(states, piece(2, total_bytes=16 * MIB))
    bringing.join(0.05)
    assert bringing.is_alive()
    states.loaded(waiting[0])
    bringing.join(WAIT_S)
    assert isinstance(bringing.outcome, ArrivedState)


def test_two_channels_that_waited_for_the_same_state_are_given_the_same_one() -> None:
    states = ArrivingStates(BOUNDS)
    waiting = [states.place(piece(order, total_bytes=16 * MIB), 1)[0] for order in range(2)]
    bringing = [Bringing(states, piece(2, total_bytes=MIB, offset=offset)) for offset in (0, 1)]
    states.loaded(waiting[0])
    for one in bringing:
        one.join(WAIT_S)
    assert isinstance(bringing[0].outcome, ArrivedState)
    assert bringing[0].outcome is bringing[1].outcome


def test_the_state_that_is_loaded_next_never_waits_for_those_behind_it() -> None:
    states = ArrivingStates(BOUNDS)
    for order in (1, 2):
        states.place(piece(order, total_bytes=16 * MIB), 1)
    states.place(piece(0, total_bytes=16 * MIB), 1)


def test_nobody_waits_beyond_the_end() -> None:
    states = ArrivingStates(BOUNDS)
    for order in range(2):
        states.place(piece(order, total_bytes=16 * MIB), 1)
    bringing = Bringing(states, piece(2, total_bytes=16 * MIB))
    bringing.join(0.05)
    states.end()
    bringing.join(WAIT_S)
    assert "is ending" in str(bringing.outcome)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (piece(0), piece(0), "comes twice"),
        (piece(0), piece(MAX_STATES), "beyond the 1024"),
        (piece(0, final=True), piece(1, final=True), "final state of device ram .* comes twice"),
        (piece(0), piece(1, total_bytes=17 * MIB), "our VMM takes at most 16777216"),
        (piece(0), piece(1, name="d0", kind="non-iterable"), "comes in a round, which only iterable devices have"),
        (piece(0), piece(1, name="d0", kind="iterable"), "which the guest lacks"),
    ],
)
def test_every_state_comes_once_and_of_a_device_that_is_there(
    first: messages.DeviceState, second: messages.DeviceState, words: str
) -> None:
    states = ArrivingStates(BOUNDS)
    arrive(states, first)
    with pytest.raises(RemoteProtocolError, match=words):
        states.place(second, 1)


def test_a_state_cannot_be_cut_into_pieces_of_a_byte() -> None:
    states = ArrivingStates(BOUNDS)
    most = 16 + MIB // 4096
    for offset in range(most):
        states.place(piece(0, total_bytes=MIB, offset=offset), 1)
    with pytest.raises(RemoteProtocolError, match=f"more than {most} pieces"):
        states.place(piece(0, total_bytes=MIB, offset=most), 1)


def test_pieces_that_overlap_never_make_a_state_whole_twice() -> None:
    states = ArrivingStates(BOUNDS)
    state, _ = states.place(piece(0), 5)
    other, _ = states.place(piece(0, offset=3), 5)
    assert not states.piece_done(state, 5)
    assert not states.piece_done(other, 5)


def test_after_the_end_nothing_is_taken() -> None:
    states = ArrivingStates(BOUNDS)
    states.end()
    with pytest.raises(RemoteProtocolError, match="is ending"):
        states.place(piece(0), 1)
